"""Finds fields that are valid one by one but contradict each other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from model.schedule import SCHEDULES

if TYPE_CHECKING:
    from orchestrator.config.experiment import Experiment


def contradictions(experiment: Experiment) -> list[str]:
    """Return one line per contradiction; each starts with the field to change."""
    return [
        *_batch_problems(experiment),
        *_schedule_problems(experiment),
        *_name_problems(experiment),
        *_model_problems(experiment),
        *_tracking_problems(experiment),
    ]


def _batch_problems(experiment: Experiment) -> list[str]:
    train = experiment.train
    if train.global_batch_size % train.micro_batch_size:
        return [
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size}"
        ]
    slots = train.reduction_slots
    if slots is not None and (not _is_power_of_two(slots) or experiment.micro_batches % slots):
        return [
            f"train.reduction_slots: {slots} must be a power of two that divides the "
            f"{experiment.micro_batches} micro-batches of a step "
            f"({train.global_batch_size} / {train.micro_batch_size})"
        ]
    workers = experiment.compute.num_workers
    if workers != "auto" and experiment.slots % workers:
        divisors = [n for n in range(1, experiment.slots + 1) if experiment.slots % n == 0]
        return [
            f"compute.num_workers: {workers} does not divide the {experiment.slots} reduction "
            f"slots; use one of {divisors}, or a smaller train.micro_batch_size "
            f"(now {train.micro_batch_size} of {train.global_batch_size})"
        ]
    return []


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


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
    model = experiment.model
    data = experiment.data
    problems = []
    if model.n_embd % model.n_head:
        problems.append(f"model.n_head: {model.n_head} does not divide model.n_embd={model.n_embd}")
    if data.append_eot and data.tokenizer == "char":
        problems.append(
            "data.append_eot: the char tokenizer has no end-of-text token; use byte or a tiktoken "
            "encoding"
        )
    return problems


def _tracking_problems(experiment: Experiment) -> list[str]:
    uri = experiment.tracking.uri
    if uri is None:
        return []
    problems = []
    if not re.match(r"^(https?|sqlite|postgresql|mysql)[+a-z0-9]*://?.", uri):
        without_password = re.sub("//.*@", "//…@", uri)
        problems.append(
            f"tracking.uri: '{without_password}' is not an address that is supported; "
            "use http(s)://…, sqlite:///… or postgresql://…"
        )
    if re.search(r"//[^/]*@", uri):
        problems.append(
            "tracking.uri: contains a user or a password, and the experiment is stored in every "
            "checkpoint; set $MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    return problems
