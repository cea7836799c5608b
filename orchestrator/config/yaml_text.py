"""Read and write YAML without the surprises of YAML 1.1.

`6e-4` is a number, `010` is text and not 8, `1:30` is text and not 90, and a key that is given
twice is an error. YAML can create no Python objects.
"""

import re
from collections.abc import Callable, Hashable
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from orchestrator.errors import UserError

MAX_CHARACTERS = 1 << 20  # an experiment has thousands; PyYAML takes one second for 100,000
# Python refuses to print an integer of more than a few thousand digits.
MAX_DIGITS = 40


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
        for key_node, value_node in node.value:
            if node.flow_style and _is_joined(key_node) and value_node.value == "":
                text = key_node.value
                problem = f"no blank after the colon of {text}; write {text.replace(':', ': ', 1)}"
                raise ConstructorError(None, None, problem, node.start_mark)
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


def _is_joined(key: Any) -> bool:
    """Return whether a key without quotes is a key and its value: YAML reads {0:8} so."""
    return isinstance(key, yaml.ScalarNode) and key.style is None and ":" in key.value.strip(":")


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


def read_texts(text: str, where: str) -> Any:
    """Parse YAML as a text or a list of texts; numbers and null are text, too.

    Raises:
        UserError: As for `read_yaml`.
    """
    return _parse(text, where, _texts)


def _values(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def _texts(text: str) -> Any:
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


def has_comment(text: str) -> bool:
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
