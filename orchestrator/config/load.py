"""Read an experiment file and `section.field=value` overrides; write a configuration as YAML.

YAML is read without the surprises of YAML 1.1: `6e-4` is a number, `010` is text and not 8, `1:30`
is text and not 90, and a key that is given twice is an error. It can create no Python objects.
"""

import contextlib
import os
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from orchestrator.config.fields import Docs, without_empty
from orchestrator.config.models import kind_in
from orchestrator.errors import UserError

# An experiment has thousands of characters. PyYAML takes one second for 100,000.
MAX_CHARACTERS = 1 << 20
# Python refuses to print an integer of more than a few thousand digits.
MAX_DIGITS = 40


# ---- a file and its overrides ----


def read_tree(
    path: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    docs: Callable[[str], Docs],
) -> tuple[dict[str, Any], str]:
    """Read a file and apply overrides. Nothing is validated except the syntax.

    Args:
        path: The file; None for an empty configuration. Its stem is the default of `name`.
        overrides: `section.field=value`; later ones win.
        docs: Describes the fields of a kind of model: a text field takes its text as it is.

    Returns:
        Nested sections, and the start of error messages: the path or "command line".

    Raises:
        UserError: The file cannot be read or is not YAML, or an override has no field or value.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_file(path)
    fields = docs(_kind_of_model(tree, overrides))
    for override in overrides:
        _apply(tree, override, fields)
    tree = without_empty(tree, fields)
    if path is None:
        return tree, "command line"
    tree.setdefault("name", Path(path).stem)
    return tree, str(path)


def _read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as an experiment ({type(error).__name__}); give the path of a "
            "YAML file"
        ) from None
    tree = read_yaml(text, str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: has no sections; write sections such as data:, model: and train:")
    return tree


def kind_of_model(path: str | os.PathLike[str], overrides: Sequence[str]) -> str:
    """Return the kind of model of a file and its overrides.

    Raises:
        UserError: The file cannot be read or is not YAML.
    """
    return _kind_of_model(_read_file(path), overrides)


def _kind_of_model(tree: dict[str, Any], overrides: Sequence[str]) -> str:
    model = tree.get("model")
    alone = {"model": dict(model) if isinstance(model, dict) else model}
    kinds = [word for word in overrides if word.startswith("model.kind=")]
    for override in overrides:
        if override.startswith("model=") or override in kinds:
            _apply(alone, override, {})
    model = alone["model"] or {}
    if kinds and isinstance(model, dict) and "kind" not in model:
        raise UserError(
            f"{kinds[-1]}: a later model=… replaces the whole section; give model=… first"
        )
    return kind_in(alone)


def _apply(tree: dict[str, Any], override: str, docs: Docs) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(
            f"'{override}': expected section.field=value, for example train.max_steps=100"
        )
    if not all(key.split(".")):
        raise UserError(f"'{override}': '{key}' is not a field; expected section.field=value")
    *sections, field = _keys(key, docs)
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"'{override}': {section} is not a section")
    is_of_trial = key.startswith("sweep.trials.")  # `field` is then the whole name of a field
    described = docs.get(field if is_of_trial else key)
    kind = described.type if described is not None else ""
    is_optional = "null" in kind or not sections  # without sections: null is as if not given
    tree[field] = _value(text, f"'{override[:80]}'", kind, is_optional)


def _value(text: str, where: str, kind: str, is_optional: bool) -> Any:
    """Read the right side of an override.

    A text field takes it as it is, also `1e5`, `a: b` or `a #b`. Only quotes around the whole text
    are removed. `null`, nothing and `[a, b]` have a meaning where the field allows null or a list.

    Args:
        text: The right side.
        where: Start of error messages.
        kind: Type of the field in words.
        is_optional: The field may be null.
    """
    word = text.strip()
    if kind.startswith("text"):
        if is_optional and word in ("null", ""):
            return None
        if "list" in kind and word.startswith("[") and word.endswith("]"):
            return _parse(word, where, _texts)
        if word[:1] in ("'", '"'):
            with contextlib.suppress(UserError):
                unquoted = _parse(word, where, _texts)
                if isinstance(unquoted, str):
                    return unquoted
        return text
    try:
        value = read_yaml(text, where)
        has_comment = _has_comment(text)
    except UserError as error:
        hint = "; write quotes around a text that has a #" if "#" in text else ""
        raise UserError(f"{error}{hint}") from None
    if has_comment:
        raise UserError(f"{where}: an override has no comment; leave out what follows #")
    return value


def _keys(field: str, docs: Docs) -> list[str]:
    """Split the name of a field into the keys of the nested sections.

    In a sweep, the name of the varied field is one key: sweep.grid.train.seed has three keys. The
    name of a trial, as in sweep.trials.lr-0.1.train.seed, may contain dots.
    """
    parts = field.split(".")
    if parts[:2] in (["sweep", "grid"], ["sweep", "space"]) and len(parts) > 2:
        return [*parts[:2], ".".join(parts[2:])]
    if parts[:2] == ["sweep", "trials"] and len(parts) > 4:
        # The longest end that is a field; none if the field is misspelled.
        ends = range(3, len(parts) - 1)
        start = next((i for i in ends if ".".join(parts[i:]) in docs), len(parts) - 2)
        return [*parts[:2], ".".join(parts[2:start]), ".".join(parts[start:])]
    return parts


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys and aliases. See `_use_plain_numbers` for numbers."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        # No experiment needs an alias (`*name`), and a file of ten lines with nested aliases can
        # expand to more values than fit in memory.
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML refuses it below
            if key in seen:
                raise ConstructorError(None, None, f"'{key}' is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        if len(node.value) > MAX_DIGITS:
            problem = f"a number of {len(node.value)} digits"
            raise ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Args:
        text: The YAML.
        where: Start of the error message, such as the name of the file.

    Raises:
        UserError: The text is not YAML, or has a duplicate key or an alias, or is too long.
    """
    return _parse(text, where, _values)


def _values(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def _texts(text: str) -> Any:
    """Return a text or a list of texts; numbers and null are text, too."""
    node = yaml.compose(text, _Loader)
    if isinstance(node, yaml.SequenceNode):
        return [_text(part) for part in node.value]
    return _text(node)


def _text(node: Any) -> str | None:
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _parse(text: str, where: str, parse: Callable[[str], Any]) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{where}: has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read; "
            "give an experiment file"
        )
    try:
        return parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}{place}: not YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # the date 2024-99-99; 10,000 open brackets
        raise UserError(f"{where}: not YAML: {error}") from None


def _has_comment(text: str) -> bool:
    """Return whether valid YAML has a comment: a # between two of its tokens."""
    end = 0
    for token in yaml.scan(text, _Loader):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return False


def write_yaml(tree: Any) -> str:
    """Return text that `read_yaml` reads back as an equal tree."""
    # ASCII only: PyYAML writes some Unicode line breaks that it reads back as spaces.
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=False)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` would read as numbers, such as a run with the name 1e5."""


_INT = re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F][\da-fA-F_]*)$")
_FLOAT = re.compile(
    r"^([-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?"
    r"|\d[\d_]*[eE][-+]?\d+"
    r"|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN))$"
)


def _use_plain_numbers(cls: Any) -> None:
    """Replace YAML 1.1's rules for numbers.

    Numbers of base 60 and octal numbers become text. Exponents need no point and no sign: 6e-4 and
    1e5 become numbers.
    """
    cls.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":int", ":float"))]
        for first, rules in cls.yaml_implicit_resolvers.items()
    }
    cls.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


_use_plain_numbers(_Loader)
_use_plain_numbers(_Dumper)
