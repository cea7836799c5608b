"""Validation of a section, and its error messages: one line per field."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from model.models import MODELS
from orchestrator.config.fields import BY_STEP, Docs, FieldDoc, Section
from orchestrator.config.models import section_of
from orchestrator.errors import UserError
from orchestrator.own_code import is_own

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
    names = list(known)
    if key in names:
        return (
            f"{key}: one key with dots; nest it: {key.replace('.', ': {')}: …{'}' * key.count('.')}"
        )
    section, _, field = key.rpartition(".")
    if field == "vocab_size":
        return (
            f"{key}: no such field; the vocabulary is that of data.tokenizer, rounded up to a "
            "multiple of model.pad_vocab_to"
        )
    section, _, field = key.partition(".")
    ours = [kind for kind in MODELS if not is_own(kind)]
    kinds = [kind for kind in ours if field in section_of(kind).model_fields]
    if section == "model" and kinds:
        return f"{key}: no such field; only model.kind={' or '.join(kinds)} has it"
    similar = _most_similar(key, names)
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
        whole = f"{field}{_only_path(first['input'])}"
        similar = _most_similar(field, list(known))
        is_section_wrong = similar is not None and whole.replace(field, similar, 1) in known
        return unknown_field(whole if is_section_wrong else field, known)
    if first["type"] == "value_error":  # from `checks.contradictions`
        return str(first["ctx"]["error"])
    value = shown(first["input"])
    bounds = max((_bounds(error) for error in errors), key=len)
    if field in known and known[field].type.startswith(BY_STEP):
        return _explain_by_step(field, first, known[field])
    if field in known:
        return f"{field}: {value} is not {known[field].type}{bounds}"
    for name, doc in known.items():
        if field.startswith(f"{name}."):  # an entry of sweep.grid: "a mapping to a list of values"
            entry = doc.type.partition(" to ")[2]
            return f"{field}: {value} is not {entry}{bounds}"
    hint = "; write a blank after each colon" if ":" in value else ""
    return f"{field}: {value} is not a section with fields{hint}"


def _explain_by_step(field: str, error: ErrorDetails, doc: FieldDoc) -> str:
    """Return the line for a mapping of steps to values, with an example of one."""
    example = re.search(r"\{0: [^}]*\}", doc.description)
    advice = f"; write it as {example[0] if example else '{0: 1, 1000: 0.1}'}"
    if error["type"] != "by_step":
        return f"{field}: {shown(error['input'])} is not {doc.type}{advice}"
    found: ErrorDetails = error["ctx"]["first"]
    value = shown(found["input"])
    step, *of_key = found["loc"]
    if of_key == ["[key]"]:
        return f"{field}: {value} is not a step, which is an integer of at least 0{advice}"
    kind = doc.type.removeprefix(BY_STEP).removesuffix(" or null")
    return f"{field}: step {step}: {value} is not {kind}{_bounds(found)}{advice}"


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
    """Return the most similar field or section of the same section, else of all.

    The last part of the name counts first, then the whole name.
    """
    section, _, field = key.rpartition(".")
    everything = dict.fromkeys(_prefixes(known))
    same_section = [name for name in everything if name.rpartition(".")[0] == section]
    for names in (same_section, everything):
        similar = difflib.get_close_matches(field, {name.split(".")[-1] for name in names}, 1)
        if similar:
            equal = [name for name in names if name.split(".")[-1] == similar[0]]
            return max(equal, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())
    return None


def _prefixes(known: Iterable[str]) -> Iterator[str]:
    """Yield all sections and fields."""
    for name in known:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            yield ".".join(parts[:end])


def _only_path(value: Any) -> str:
    """Return the keys of nested mappings of one key each, such as `.head.lr_scale`."""
    path = ""
    while isinstance(value, dict) and len(value) == 1:
        [(key, value)] = value.items()
        path = f"{path}.{key}"
    return path
