"""Finds fields that are valid one by one but contradict each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from model.optim import OPTIMIZERS
from model.schedule import SCHEDULES
from orchestrator.own_code import failure, is_own, parts
from orchestrator.redact import has_password, hide_passwords

if TYPE_CHECKING:
    from orchestrator.config.experiment import Experiment

_TRACKING_URI = re.compile(r"(https?|sqlite|postgresql|mysql)[+a-z0-9]*://.")


def contradictions(experiment: Experiment) -> list[str]:
    """Return one line per contradiction; each starts with the field to change."""
    return [
        *(_batch_schedule_problems(experiment) or _batch_problems(experiment)),
        *_schedule_problems(experiment),
        *_name_problems(experiment),
        *_model_problems(experiment),
        *_tracking_problems(experiment),
        *_sharding_problems(experiment),
        *password_problems(experiment.flat()),
    ]


def _batch_problems(experiment: Experiment) -> list[str]:
    """Return one line, with all changes after which batch, slots and workers fit."""
    reason = ""
    changes: dict[str, int] = {}
    while (found := _misfit(experiment)) is not None:
        text, field, value = found
        reason = reason or text
        changes[f"train.{field}"] = value
        train = experiment.train.model_copy(update={field: value})
        experiment = experiment.model_copy(update={"train": train})
    ways = [f"{field}={value}" for field, value in changes.items()]
    workers, slots = max(experiment.compute.worker_counts, default=0), experiment.slots
    if workers > slots:
        ways.append(f"compute.num_workers={slots}")
        if not reason:
            reason = f"compute.num_workers: {workers} is more than the {slots} reduction slots"
            more = change_for_slots(experiment, 1 << (workers - 1).bit_length())
            if more is not None:
                ways = [f"{' and '.join(more)}, or {ways[0]}"]
    return [f"{reason}; set {' and '.join(ways)}"] if reason else []


def _misfit(experiment: Experiment) -> tuple[str, str, int] | None:
    """Return why a step cannot be divided, and the field of `train` and its value that divide it.

    None: each step has whole micro-batches, equally many in each slot.
    """
    micro, slots = experiment.micro_batch, experiment.slots
    for step, size in experiment.batch_sizes.stretches:
        field = "train.global_batch_size: "
        if experiment.train.batch_schedule is not None:
            field = f"train.batch_schedule: step {step}: "
        if size % micro:
            reason = f"{field}{size} is not a multiple of train.micro_batch_size={micro}"
            return reason, "micro_batch_size", math.gcd(size, micro)
        count = size // micro
        if slots != _power_of_two(slots) or count % slots:
            reason = (
                f"train.reduction_slots: {slots} must be a power of two that divides the {count} "
                f"micro-batches of a step ({size} / {micro})"
            )
            return reason, "reduction_slots", math.gcd(_power_of_two(slots), count)
    return None


def _batch_schedule_problems(experiment: Experiment) -> list[str]:
    train = experiment.train
    schedule = train.batch_schedule
    if schedule is None:
        if train.global_batch_size is not None:
            return []
        return ["train.global_batch_size: null needs train.batch_schedule, such as {0: 64}"]
    steps = list(schedule)
    reason = None
    if train.global_batch_size is not None:
        reason = (
            f"it replaces train.global_batch_size={train.global_batch_size}; give one of them, or "
            "set train.global_batch_size=null"
        )
    elif steps[:1] != [0]:
        reason = "the first step must be 0"
    elif steps != sorted(steps):
        reason = f"the steps {', '.join(map(str, steps))} must rise"
    elif steps[-1] >= train.max_steps:
        reason = f"step {steps[-1]} must be below train.max_steps={train.max_steps}"
    return [] if reason is None else [f"train.batch_schedule: {reason}"]


def change_for_slots(experiment: Experiment, slots: int) -> list[str] | None:
    """Return the overrides with which a step of the same batch has at least that many slots.

    None: no change does, because the batch cannot be divided so.

    Args:
        experiment: The configuration.
        slots: A power of two.
    """
    smallest = math.gcd(*(size for _, size in experiment.batch_sizes.stretches))
    share, rest = divmod(smallest, slots)
    if rest:
        return None
    micro = math.gcd(share, experiment.micro_batch)
    changes = []
    if micro != experiment.micro_batch:
        changes.append(f"train.micro_batch_size={micro}")
    if (experiment.train.reduction_slots or 8) < slots:
        changes.append(f"train.reduction_slots={slots}")
    return changes


def _power_of_two(limit: int) -> int:
    """Return the largest power of two up to `limit`."""
    return 1 << (limit.bit_length() - 1)


def _schedule_problems(experiment: Experiment) -> list[str]:
    schedule = experiment.schedule
    warmup = schedule.warmup_steps
    max_steps = experiment.train.max_steps
    if warmup >= max_steps:
        return [f"schedule.warmup_steps: {warmup} must be below train.max_steps={max_steps}"]
    found = {"schedule": (schedule, "schedule.warmup_steps", warmup)}
    for name in ("weight_decay", "momentum"):
        section = getattr(schedule, name)
        steps = experiment.optim.momentum_warmup_steps if name == "momentum" else 0
        found[f"schedule.{name}"] = (section, "optim.momentum_warmup_steps", steps)
    problems = []
    for place, (section, warmup_field, warmup) in found.items():
        problems += _points_problems(place, section)
        problems += _decay_problems(experiment, place, section, warmup_field, warmup)
    return problems


def _points_problems(place: str, section: Any) -> list[str]:
    points = section.points
    if section.kind != "piecewise":
        if points is None:
            return []
        return [f"{place}.points: only for {place}.kind=piecewise, not {section.kind}"]
    if not points:
        return [f"{place}.points: missing; give a factor by step, such as {{0: 1, 1000: 0.1}}"]
    if list(points) != sorted(points):
        return [f"{place}.points: the steps {', '.join(map(str, points))} must rise"]
    return []


def _decay_problems(
    experiment: Experiment, place: str, section: Any, warmup_field: str, warmup: int
) -> list[str]:
    """Return a line if a decay begins before the warmup has ended."""
    if not SCHEDULES[section.kind].has_end:
        return []
    ends = {
        f"{place}.decay_steps": section.decay_steps,
        "schedule.decay_steps": experiment.schedule.decay_steps,
        "train.max_steps": experiment.train.max_steps,
    }
    end_field, end = next((name, steps) for name, steps in ends.items() if steps)
    if warmup >= end:
        return [f"{warmup_field}: {warmup} must be below {end_field}={end}"]
    fraction = section.decay_fraction or experiment.schedule.decay_fraction
    decay_start = end - round(fraction * end)
    if section.kind in ("wsd", "power") and warmup > decay_start:
        field = f"{place if section.decay_fraction else 'schedule'}.decay_fraction"
        return [
            f"{field}: with {fraction} of {end_field}={end} the decay starts at step "
            f"{decay_start}, inside the warmup of {warmup} steps"
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
        problems.append(f"model.{' '.join(str(error).split())}")
    except (Exception, SystemExit) as error:
        kind = experiment.model.kind
        if not is_own(kind):
            raise
        problems.append(str(failure("model", kind, error, parts(kind)["name"], "Config")))
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


def is_sharded(experiment: Experiment, num_workers: int) -> bool:
    """Return whether each worker updates only a part of the parameters."""
    wanted = experiment.train.shard_optimizer is not False
    return wanted and num_workers > 1 and _may_be_sharded(experiment)


def _may_be_sharded(experiment: Experiment) -> bool:
    kind = experiment.optim.kind
    # With float16, an update depends on whether any gradient of any shard is infinite.
    return (
        not is_own(kind) and OPTIMIZERS[kind].may_be_sharded and experiment.train.dtype != "float16"
    )


def _sharding_problems(experiment: Experiment) -> list[str]:
    train = experiment.train
    may_be_sharded = _may_be_sharded(experiment)
    problems = []
    if train.shard_optimizer is True and not may_be_sharded:
        problems.append(
            "train.shard_optimizer: true needs optim.kind adamw or muon, and a train.dtype that is "
            "not float16; set train.shard_optimizer=auto"
        )
    is_sharded = may_be_sharded and train.shard_optimizer is not False
    if train.overlap_exchange is True and (not is_sharded or is_own(experiment.model.kind)):
        problems.append(
            "train.overlap_exchange: true needs train.shard_optimizer=auto or true, optim.kind "
            "adamw or muon, a train.dtype that is not float16, and a model.kind that is not a "
            "file; set train.overlap_exchange=auto"
        )
    return problems


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
        f"every checkpoint; {_instead(text)}"
        for field, value in fields.items()
        for text in _texts(value)
        if field != "tracking.uri" and "://" in text and has_password(text)
    ]


def _instead(address: str) -> str:
    if re.match("(?i)(s3|gs):", address):
        return "leave it out, credentials come from the environment, such as AWS_ACCESS_KEY_ID"
    return "write $NAME in its place, and set the environment variable NAME"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
