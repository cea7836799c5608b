"""Read an experiment file and `section.field=value` overrides."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator import own_files
from orchestrator.config.fields import Docs, without_empty
from orchestrator.config.models import kind_in
from orchestrator.config.yaml_text import has_comment, read_texts, read_yaml
from orchestrator.errors import UserError


def read_tree(
    path: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    docs: Callable[[str], Docs],
) -> tuple[dict[str, Any], str]:
    """Read a file, apply overrides, and load a user's files. Only the syntax is validated.

    Args:
        path: The file; None for an empty configuration. Its stem is the default of `name`.
        overrides: `section.field=value`; later ones win.
        docs: Describes the fields of a kind of model: a text field takes its text as it is.

    Returns:
        Nested sections, and the start of error messages: the path or "command line".

    Raises:
        UserError: The file cannot be read or is not YAML, or an override has no field or value.
    """
    tree = {} if path is None else _read_file(path)
    fields = docs(_kind_of_model(tree, overrides, path))
    _apply(overrides, tree, fields)
    tree = without_empty(tree, fields)
    own_files.resolve(tree, path)
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
    return _kind_of_model(_read_file(path), overrides, path)


def _kind_of_model(
    tree: dict[str, Any], overrides: Sequence[str], path: str | os.PathLike[str] | None
) -> str:
    model = tree.get("model")
    alone = {"model": dict(model) if isinstance(model, dict) else model}
    kinds = [word for word in overrides if word.startswith("model.kind=")]
    _apply([word for word in overrides if word.startswith("model=") or word in kinds], alone, {})
    model = alone["model"] or {}
    if kinds and isinstance(model, dict) and "kind" not in model:
        raise UserError(
            f"{kinds[-1]}: a later model=… replaces the whole section; give model=… first"
        )
    own_files.resolve(alone, path)
    return kind_in(alone)


def _apply(overrides: Sequence[str], tree: dict[str, Any], docs: Docs) -> None:
    """Apply overrides, and load the files that they name: the user has typed these paths."""
    typed: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override, docs)
        apply_override(typed, override, docs)
    own_files.resolve(typed)


def apply_override(tree: dict[str, Any], override: str, docs: Docs) -> None:
    """Change a tree as `section.field=value` says."""
    key, equals, text = override.partition("=")
    if not equals:
        example = "section.field=value, for example train.max_steps=100"
        raise UserError(f"'{override}': expected {example}")
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
            return read_texts(word, where)
        if word[:1] in ("'", '"'):
            with contextlib.suppress(UserError):
                unquoted = read_texts(word, where)
                if isinstance(unquoted, str):
                    return unquoted
        return text
    try:
        value = read_yaml(text, where)
        is_commented = has_comment(text)
    except UserError as error:
        hint = "; write quotes around a text that has a #" if "#" in text else ""
        raise UserError(f"{error}{hint}") from None
    if is_commented:
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
