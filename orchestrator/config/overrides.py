"""From an experiment's file and `section.field=value` words to one nested dict; what it means is `config.py`'s to say."""

import os
from pathlib import Path
from typing import Any

from orchestrator.config.plain_yaml import read_yaml
from orchestrator.errors import UserError


def read_tree(
    path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = ()
) -> tuple[dict[str, Any], str]:
    """The file's tree (None: empty) with the words on top, and the place that messages name.

    A file's own name is the default of `name`.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: cannot be read as an experiment ({error.__class__.__name__}); give the path of a "
                f"YAML file"
            ) from None
        tree = read_yaml(text, str(path)) or {}
        if not isinstance(tree, dict):
            raise UserError(f"{path}: holds no sections (data:, model:, train: …)")
    for word in overrides:
        _apply(tree, word)
    tree = {
        key: value for key, value in tree.items() if value is not None
    }  # `train:` with every line commented out
    if path is not None:
        tree.setdefault("name", Path(path).stem)
    return tree, str(path or "command line")


def _apply(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals:
        raise UserError(f"'{word}': expected section.field=value, for example train.max_steps=100")
    if not all(key.split(".")):
        raise UserError(f"'{word}': '{key}' names no field; expected section.field=value")
    *sections, field = _path(key)
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"'{word}': {section} is no section")
    tree[field] = read_yaml(text, f"'{word[:80]}'")


def _path(key: str) -> list[str]:
    """The keys from the top down to what is set: within a sweep's grid, space and trials a field's name is one key."""
    parts = key.split(".")
    if parts[:2] in (["sweep", "grid"], ["sweep", "space"]) and len(parts) > 2:
        return [*parts[:2], ".".join(parts[2:])]
    if parts[:2] == ["sweep", "trials"] and len(parts) > 4:  # a trial's name may have points in it
        return [*parts[:2], ".".join(parts[2:-2]), ".".join(parts[-2:])]
    return parts
