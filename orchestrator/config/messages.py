"""Validation of a section, and its error messages: one line per field."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config.fields import Docs, Section
from orchestrator.errors import UserError

SomeSection = TypeVar("SomeSection", bound=Section)
UNKNOWN_FIELD = ("extra_forbidden", "invalid_key")  # types of pydantic's errors


def validate(
    model: type[SomeSection], tree: Mapping[str, Any], where: str, known: Docs, section: str = ""
) -> SomeSection:
    """Return `tree` as a checked section.

    Args:
        model: The class of the section.
        tree: Its fields.
        where: Start of every error line, such as the name of a file; may be empty.
        known: Description of all fields.
        section: Name of the section if `model` is not a whole file.

    Raises:
        UserError: One line per mistake.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = []
        for field, errors in _errors_by_field(error, known, section).items():
            lines += _explain(field, errors, known).split("\n")
        if where:
            lines = [f"{where}: {line}" for line in lines]
        raise UserError("\n".join(lines)) from None


def unknown_field(key: str, known: Iterable[str]) -> str:
    """Return the line for a field that does not exist; it suggests the most similar one."""
    similar = _most_similar(key, list(known))
    if similar is None:
        return f"{key}: no such field; --help lists all fields"
    return f"{key}: no such field; did you mean {similar}?"


def shown(value: Any) -> str:
    """Return a value as one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= 120:
        return text
    return f"{text[:117]}…"


def _errors_by_field(
    error: ValidationError, known: Docs, section: str
) -> dict[str, list[ErrorDetails]]:
    """Group the errors by field: for a union, pydantic reports one error per member type."""
    found: dict[str, list[ErrorDetails]] = {}
    for details in error.errors():
        path = [str(part) for part in details["loc"]]
        if section:
            path = [*section.split("."), *path]
        found.setdefault(_field_of(details, path, known), []).append(details)
    return found


def _is_about_key(error: ErrorDetails) -> bool:
    """Return whether the name of a field is wrong, and not its value."""
    return error["type"] in UNKNOWN_FIELD or error["loc"][-1:] == ("[key]",)


def _field_of(error: ErrorDetails, path: Sequence[str], known: Docs) -> str:
    """Return the field of an error. The rest of the path names a member of a union."""
    if _is_about_key(error):
        return ".".join(part for part in path if part != "[key]")
    if path[:1] == ["sweep"]:
        return ".".join(path[:3])
    for end in range(len(path), 0, -1):
        field = ".".join(path[:end])
        if field in known or any(name.startswith(f"{field}.") for name in known):
            return field
    return path[0] if path else ""


def _explain(field: str, errors: Sequence[ErrorDetails], known: Docs) -> str:
    first = errors[0]
    if _is_about_key(first):
        return unknown_field(field, known)
    if first["type"] == "value_error":  # from `checks.contradictions`
        return str(first["ctx"]["error"])
    value = shown(first["input"])
    bounds = max((_bounds(error) for error in errors), key=len)
    if field in known:
        return f"{field}: {value} is not {known[field].type}{bounds}"
    for name, doc in known.items():
        if field.startswith(f"{name}."):  # an entry of sweep.grid: "a mapping to a list of values"
            entry = doc.type.partition(" to ")[2]
            return f"{field}: {value} is not {entry}{bounds}"
    return f"{field}: {value} is not a section with fields"


_BOUNDS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "min_length": "of length at least",
}


def _bounds(error: ErrorDetails) -> str:
    """Return the limits of a value, such as " at least 1"; empty if there are none."""
    context = error.get("ctx") or {}
    limits = [f"{word} {context[key]}" for key, word in _BOUNDS.items() if key in context]
    if limits:
        return f" {' and '.join(limits)}"
    if "pattern" in context:
        return f" matching {context['pattern']}"
    return ""


def _most_similar(key: str, known: Sequence[str]) -> str | None:
    """Return the most similar field of the same section, else a section, else any field."""
    section, _, field = key.rpartition(".")
    same_section = [name for name in known if name.rpartition(".")[0] == section]
    top_level = list(dict.fromkeys(name.split(".")[0] for name in known))
    for names in (same_section, top_level, known):
        by_last_part = {name.split(".")[-1]: name for name in names}
        similar = difflib.get_close_matches(field, by_last_part, 1)
        if similar:
            return by_last_part[similar[0]]
    return None
