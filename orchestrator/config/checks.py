"""Finds fields that are valid one by one but contradict each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from model.schedule import SCHEDULES
from orchestrator.redact import has_password, hide_passwords

if TYPE_CHECKING:
    from orchestrator.config.experiment import Experiment

_TRACKING_URI = re.compile(r"(https?|sqlite|postgresql|mysql)[+a-z0-9]*://.")


def contradictions(experiment: Experiment) -> list[str]:
    """Return one line per contradiction; each starts with the field to change."""
    return [
        *_batch_problems(experiment),
        *_schedule_problems(experiment),
        *_name_problems(experiment),
        *_model_problems(experiment),
        *_tracking_problems(experiment),
        *password_problems(experiment.flat()),
    ]


def _batch_problems(experiment: Experiment) -> list[str]:
    train = experiment.train
    if train.global_batch_size % train.micro_batch_size:
        return [
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size}; set train.micro_batch_size="
            f"{math.gcd(train.global_batch_size, train.micro_batch_size)}"
        ]
    slots = train.reduction_slots
    if slots is not None and (not _is_power_of_two(slots) or experiment.micro_batches % slots):
        return [
            f"train.reduction_slots: {slots} must be a power of two that divides the "
            f"{experiment.micro_batches} micro-batches of a step "
            f"({train.global_batch_size} / {train.micro_batch_size}); set train.reduction_slots="
            f"{math.gcd(_power_of_two(slots), experiment.micro_batches)}"
        ]
    workers = experiment.compute.num_workers
    if workers != "auto" and experiment.slots % workers:
        fewer = f"compute.num_workers={min(_power_of_two(workers), experiment.slots)}"
        changes = change_for_workers(experiment, workers)
        return [
            f"compute.num_workers: {workers} does not divide the {experiment.slots} reduction "
            f"slots; set {fewer if changes is None else f'{changes}, or {fewer}'}"
        ]
    return []


def change_for_workers(experiment: Experiment, workers: int) -> str | None:
    """Return the overrides with which `workers` processes can share a step of the same batch.

    None: no change does, because their number is not a power of two or does not divide the batch.
    """
    train = experiment.train
    share, rest = divmod(train.global_batch_size, workers)
    if rest or not _is_power_of_two(workers):
        return None
    micro = math.gcd(share, train.micro_batch_size)
    changes = []
    if micro != train.micro_batch_size:
        changes.append(f"train.micro_batch_size={micro}")
    if (train.reduction_slots or 8) % workers:
        changes.append(f"train.reduction_slots={workers}")
    return " and ".join(changes)


def _is_power_of_two(number: int) -> bool:
    return number == _power_of_two(number)


def _power_of_two(limit: int) -> int:
    """Return the largest power of two up to `limit`."""
    return 1 << (limit.bit_length() - 1)


def _schedule_problems(experiment: Experiment) -> list[str]:
    schedule = experiment.schedule
    warmup = schedule.warmup_steps
    max_steps = experiment.train.max_steps
    end = schedule.decay_steps or max_steps
    end_field = "schedule.decay_steps" if schedule.decay_steps else "train.max_steps"
    if warmup >= max_steps:
        return [f"schedule.warmup_steps: {warmup} must be below train.max_steps={max_steps}"]
    if SCHEDULES[schedule.kind].has_end and warmup >= end:
        return [f"schedule.warmup_steps: {warmup} must be below {end_field}={end}"]
    decay_start = end - round(schedule.decay_fraction * end)
    if schedule.kind == "wsd" and warmup > decay_start:
        return [
            f"schedule.decay_fraction: with {schedule.decay_fraction} of {end_field}={end} the "
            f"decay starts at step {decay_start}, inside the warmup of {warmup} steps"
        ]
    return []


def _name_problems(experiment: Experiment) -> list[str]:
    if experiment.name not in ("data", "mlflow"):
        return []
    return [
        f"name: '{experiment.name}' is reserved for a folder of the storage that is not a run; "
        "choose another name"
    ]


def _model_problems(experiment: Experiment) -> list[str]:
    data = experiment.data
    problems = []
    try:
        experiment.model_config_for(n_vocab=1)
    except ValueError as error:
        problems.append(f"model.{error}")
    if data.append_eot and data.tokenizer == "char":
        problems.append(
            "data.append_eot: the char tokenizer has no end-of-text token; use byte or a tiktoken "
            "encoding"
        )
    return problems


def is_tracking_uri(uri: str) -> bool:
    """Return whether an address is one of a database or of an HTTP server."""
    try:
        parts = urlsplit(uri)
        has_host = bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", uri)
    except ValueError:  # such as the port 99999
        return False
    return bool(_TRACKING_URI.match(uri)) and (has_host or not uri.startswith("http"))


def _tracking_problems(experiment: Experiment) -> list[str]:
    uri = experiment.tracking.uri
    if uri is None:
        return []
    problems = []
    if not is_tracking_uri(uri):
        problems.append(
            f"tracking.uri: '{hide_passwords(uri)}' is not an address that is supported; "
            "use http(s)://…, sqlite:///… or postgresql://…"
        )
    if re.search(r"//[^/]*@", uri) or has_password(uri):
        problems.append(
            "tracking.uri: contains a user or a password, and the experiment is stored in every "
            "checkpoint; set $MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    return problems


def password_problems(fields: dict[str, Any]) -> list[str]:
    """Return one line for each field that contains a password in an address."""
    return [
        f"{field}: '{hide_passwords(text)}' contains a password, and the experiment is stored in "
        "every checkpoint; write $NAME in its place, and set the environment variable NAME"
        for field, value in fields.items()
        for text in _texts(value)
        if field != "tracking.uri" and "://" in text and has_password(text)
    ]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
