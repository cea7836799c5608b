"""Why an experiment was refused, in one line a field: pydantic's errors, or fields that contradict each other, in; sentences
for people out."""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Any

from model.schedule import HORIZON_FREE

if TYPE_CHECKING:
    from orchestrator.config.experiment import Experiment

Error = dict[str, Any]  # one of ValidationError.errors()
Docs = dict[str, dict[str, Any]]  # config.field_docs()


def explain(errors: list[Error], known: Docs) -> list[str]:
    """Lines `section.field: "value" is not …`, one per mistake."""
    return [
        line
        for field in _by_field(errors, known).values()
        for line in _explain_one(field[0], field, known).split("\n")
    ]


def _by_field(errors: list[Error], known: Docs) -> dict[str, list[Error]]:
    """Errors grouped by field: a union reports one per member, with the member's name in `loc`."""
    found: dict[str, list[Error]] = {}
    for e in errors:
        found.setdefault(_field_of(e, known), []).append(e)
    return found


def _field_of(error: Error, known: Docs) -> str:
    path = [str(p) for p in error["loc"]]
    if error["type"] in ("extra_forbidden", "invalid_key") or path[-1:] == ["[key]"]:
        return ".".join(p for p in path if p != "[key]")
    if path[:1] == ["sweep"]:
        return ".".join(path[:3])
    return ".".join(path[:2]) if ".".join(path[:2]) in known else path[0] if path else ""


def _explain_one(error: Error, members: list[Error], known: Docs) -> str:
    key = _field_of(error, known)
    if error["type"] in ("extra_forbidden", "invalid_key") or error["loc"][-1:] == ("[key]",):
        return unknown(key, known)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    bounds = max(map(_bounds, members), key=len)
    if parent := next(
        (k for k in known if key.startswith(f"{k}.")), None
    ):  # an entry of sweep.grid
        return f"{key}: {shown(error['input'])} is not {known[parent]['type'].partition(' to ')[2]}{bounds}"
    if key not in known:
        return f"{key}: {shown(error['input'])} is no section with fields"
    return f"{key}: {shown(error['input'])} is not {known[key]['type']}{bounds}"


def unknown(key: str, known: Docs) -> str:
    """The line for a key that no field has."""
    near = _nearest(key, known)
    return f"{key}: no such field" + (
        f"; did you mean {near}?" if near else "; --help lists them all"
    )


def _nearest(key: str, known: Docs) -> str | None:
    """The field that an unknown key most likely means: one of its section, of the top, or of any section."""
    section, _, field = key.rpartition(".")
    top = [*dict.fromkeys(k.split(".")[0] for k in known)]
    for names in ([k for k in known if k.rpartition(".")[0] == section], top, known):
        by_leaf = {name.split(".")[-1]: name for name in names}
        if near := difflib.get_close_matches(field, by_leaf, 1):
            return by_leaf[near[0]]
    return None


def shown(value: Any) -> str:
    """The value as one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _bounds(error: Error) -> str:
    ctx = error.get("ctx") or {}
    words = {
        "ge": "at least",
        "gt": "above",
        "le": "at most",
        "lt": "below",
        "min_length": "of length at least",
    }
    parts = [f"{words[k]} {ctx[k]}" for k in words if k in ctx]
    return (
        f" {' and '.join(parts)}"
        if parts
        else f" matching {ctx['pattern']}"
        if "pattern" in ctx
        else ""
    )


def type_words(annotation: Any) -> str:
    """A field's annotation in words for people."""
    text, origin = str(annotation), getattr(annotation, "__origin__", None)
    if text.startswith("typing.Literal"):
        return " | ".join(
            json.loads("[" + text[len("typing.Literal[") : -1].replace("'", '"') + "]")
        )
    if hasattr(annotation, "__metadata__"):
        return type_words(annotation.__origin__)
    if origin is list:
        return "a list of values" if annotation.__args__ == (Any,) else "a list of texts"
    if origin is dict:
        values = annotation.__args__[1]
        return "a mapping" if values is Any else f"a mapping to {type_words(values)}"
    if isinstance(annotation, type):
        return {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false"}[
            annotation.__name__
        ]
    parts = ["null" if a is type(None) else type_words(a) for a in annotation.__args__]
    return " or ".join(dict.fromkeys(parts))


# ---- fields that must agree ----
def contradictions(e: Experiment) -> list[str]:
    """Lines about fields that are right one by one and do not fit together."""
    problems = [*_batch_problems(e), *_schedule_problems(e)]
    if e.name in ("data", "mlflow"):
        problems.append(f"name: '{e.name}' is a folder of the storage itself; choose another")
    if e.model.n_embd % e.model.n_head:
        problems.append(
            f"model.n_head: {e.model.n_head} does not divide model.n_embd={e.model.n_embd}"
        )
    if e.data.append_eot and e.data.tokenizer == "char":
        problems.append(
            "data.append_eot: the char tokenizer has no end-of-text token; use byte or a tiktoken one"
        )
    if e.tracking.uri and not re.match(
        r"^(https?|sqlite|postgresql|mysql)[+a-z0-9]*://?.", e.tracking.uri
    ):
        masked = re.sub("//.*@", "//…@", e.tracking.uri)
        problems.append(
            f"tracking.uri: '{masked}' is none of http(s)://…, sqlite:///…, postgresql://…"
        )
    if e.tracking.uri and re.search(r"//[^/]*@", e.tracking.uri):
        problems.append(
            "tracking.uri: holds a password or a user, and the experiment travels with every checkpoint; "
            "set $MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return problems


def _batch_problems(e: Experiment) -> list[str]:
    t, workers = e.train, e.compute.num_workers
    if t.global_batch_size % t.micro_batch_size:
        return [
            f"train.global_batch_size: {t.global_batch_size} is no multiple of "
            f"train.micro_batch_size={t.micro_batch_size}"
        ]
    if t.reduction_slots and (
        t.reduction_slots & (t.reduction_slots - 1) or e.micro_batches % t.reduction_slots
    ):
        return [
            f"train.reduction_slots: {t.reduction_slots} must be a power of two that divides the {e.micro_batches} "
            f"micro-batches of a step ({t.global_batch_size} / {t.micro_batch_size})"
        ]
    if workers != "auto" and e.slots % workers:
        return [
            f"compute.num_workers: {workers} does not divide the {e.slots} reduction slots; use one of "
            f"{[w for w in range(1, e.slots + 1) if e.slots % w == 0]}, or a smaller train.micro_batch_size "
            f"(now {t.micro_batch_size} of {t.global_batch_size})"
        ]
    return []


def _schedule_problems(e: Experiment) -> list[str]:
    s, problems = e.schedule, []
    end, label = (
        (s.decay_steps, "schedule.decay_steps")
        if s.decay_steps
        else (e.train.max_steps, "train.max_steps")
    )
    if s.warmup_steps >= e.train.max_steps:
        problems.append(
            f"schedule.warmup_steps: {s.warmup_steps} is not shorter than "
            f"train.max_steps={e.train.max_steps}"
        )
    elif s.kind not in HORIZON_FREE and s.warmup_steps >= end:
        problems.append(
            f"schedule.warmup_steps: {s.warmup_steps} is not shorter than {label}={end}"
        )
    elif s.kind == "wsd" and s.warmup_steps > end - round(s.decay_fraction * end):
        problems.append(
            f"schedule.decay_fraction: {s.decay_fraction} of {label}={end} begins inside the warmup of "
            f"{s.warmup_steps} steps"
        )
    return problems
