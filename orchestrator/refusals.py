"""Why an experiment was refused, in one line a field: pydantic's errors in, sentences for people out."""

import difflib
import json
from typing import Any

Error = dict[str, Any]  # one of ValidationError.errors()
Docs = dict[str, dict[str, Any]]  # config.field_docs()


def explain(errors: list[Error], known: Docs) -> list[str]:
    """Lines `section.field: "value" is not …`, one per mistake."""
    return [line for field in _by_field(errors, known).values()
            for line in _explain_one(field[0], field, known).split("\n")]


def _by_field(errors: list[Error], known: Docs) -> dict[str, list[Error]]:
    """Errors grouped by field: a union reports one per member, with the member's name in `loc`."""
    found: dict[str, list[Error]] = {}
    for e in errors:
        found.setdefault(_field_of(e, known), []).append(e)
    return found


def _field_of(error: Error, known: Docs) -> str:
    path = [str(p) for p in error["loc"]]
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return ".".join(p for p in path if p != "[key]")
    return ".".join(path[:2]) if ".".join(path[:2]) in known else path[0] if path else ""


def _explain_one(error: Error, members: list[Error], known: Docs) -> str:
    key = _field_of(error, known)
    if error["type"] in ("extra_forbidden", "invalid_key"):
        near = _nearest(key, known)
        return f"{key}: no such field" + (f"; did you mean {near}?" if near else "; --help lists them all")
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if key not in known:
        return f"{key}: {_shown(error['input'])} is no section with fields"
    return f"{key}: {_shown(error['input'])} is not {known[key]['type']}{max(map(_bounds, members), key=len)}"


def _nearest(key: str, known: Docs) -> str | None:
    """The field that an unknown key most likely means: one of its section, of the top, or of any section."""
    section, _, field = key.rpartition(".")
    top = [*dict.fromkeys(k.split(".")[0] for k in known)]
    for names in ([k for k in known if k.rpartition(".")[0] == section], top, known):
        by_leaf = {name.split(".")[-1]: name for name in names}
        if near := difflib.get_close_matches(field, by_leaf, 1):
            return by_leaf[near[0]]
    return None


def _shown(value: Any) -> str:
    """The value as one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _bounds(error: Error) -> str:
    ctx = error.get("ctx") or {}
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "of length at least"}
    parts = [f"{words[k]} {ctx[k]}" for k in words if k in ctx]
    return f" {' and '.join(parts)}" if parts else f" matching {ctx['pattern']}" if "pattern" in ctx else ""
