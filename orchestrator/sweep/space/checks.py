"""Mistakes in a `sweep:` section: one line for each, all at once, before its trials are made."""

import math
import re
from typing import Any, NamedTuple

from orchestrator.config.experiment import Experiment, field_docs, fields_with
from orchestrator.config.fields import Effect
from orchestrator.config.messages import shown, unknown_field
from orchestrator.config.sweep import SweepSection
from orchestrator.errors import UserError
from orchestrator.sweep.space.dimensions import dimension, values_of
from orchestrator.sweep.space.names import LONGEST_NAME

MOST_TRIALS = 10_000
COMPARED = ("train.log_interval", "train.eval_interval", "train.eval_tokens")


class _Entry(NamedTuple):
    """The values or the range that a sweep gives for one field."""

    where: str
    key: str
    words: Any

    @property
    def place(self) -> str:
        return f"{self.where}.{self.key}"


def _entries(settings: SweepSection) -> list[_Entry]:
    found = [_Entry("sweep.grid", key, values) for key, values in settings.grid.items()]
    found += [_Entry("sweep.space", key, words) for key, words in settings.space.items()]
    for name, fields in settings.trials.items():
        found += [_Entry(f"sweep.trials.{name}", key, [value]) for key, value in fields.items()]
    return found


def varied_fields(settings: SweepSection) -> list[str]:
    """Return the fields that a sweep varies, in its order."""
    return list(dict.fromkeys(entry.key for entry in _entries(settings)))


# ---- the section ----


def section_problems(base: Experiment, settings: SweepSection) -> list[str]:
    """Return a line for each mistake."""
    problems = [
        *_extent(settings),
        *_fields(base, settings),
        *_sampling(settings),
        *_stopping(settings),
        *_origin(settings),
        *_names(settings),
        *_seeds(settings),
        *_types(settings),
    ]
    if base.train.eval_interval is None:
        problems.append(
            "train.eval_interval: null: trials are compared by val/loss; give the steps between "
            "two evaluations"
        )
    return problems


def _extent(settings: SweepSection) -> list[str]:
    if not (settings.grid or settings.trials or settings.sampler or settings.space):
        return [
            "sweep: no field to vary; give sweep.grid, sweep.trials, or sweep.space with a "
            "sweep.sampler (for seeds alone: sweep.grid.train.seed)"
        ]
    grid = math.prod(map(len, settings.grid.values())) if settings.grid else 0
    trials = (grid + len(settings.trials) + (settings.num_samples or 0)) * settings.seeds
    if trials > MOST_TRIALS:
        return [
            f"sweep: {trials} trials are more than {MOST_TRIALS}; vary fewer values, or draw some "
            "of them with sweep.sampler: random"
        ]
    return []


def _fields(base: Experiment, settings: SweepSection) -> list[str]:
    problems = []
    docs = field_docs(base.model.kind)
    known = {key: doc for key, doc in docs.items() if _why_fixed(key) is None}
    for entry in _entries(settings):
        why_fixed = _why_fixed(entry.key)
        if why_fixed is not None:
            problems.append(f"{entry.place}: cannot be swept: {why_fixed}")
        elif entry.key not in known:
            problems.append(f"{entry.where}.{unknown_field(entry.key, known)}")
        else:
            lines = _value_problems(entry, base.model.kind)
            problems += [f"{entry.where}.{line}" for line in lines]
    return problems


def _types(settings: SweepSection) -> list[str]:
    entries = [entry for entry in _entries(settings) if entry.key == "train.dtype"]
    values = [value for entry in entries for value in entry.words]
    if "auto" in values and len(values) > 1:
        place = next(entry.place for entry in entries if "auto" in entry.words)
        return [f"{place}: auto stands for one of the other types; give the types themselves"]
    return []


def _value_problems(entry: _Entry, kind: str) -> list[str]:
    try:
        if isinstance(entry.words, list):
            values_of(entry.key, entry.words, kind)
        else:
            dimension(entry.key, entry.words, kind)
    except UserError as error:
        return str(error).split("\n")
    return []


def _why_fixed(key: str) -> str | None:
    """Return why no sweep varies this field; None if one may."""
    if key in COMPARED:
        return "trials are compared at the same steps on the same tokens; set it for all of them"
    if key == "model.kind":
        return "each kind of model has fields of its own; run a sweep for each"
    if key in fields_with(Effect.NOTHING):
        return "it does not change what a trial learns"
    return None


def _sampling(settings: SweepSection) -> list[str]:
    sampler = settings.sampler
    problems = [
        f"sweep.space.{key}: is in sweep.grid too; remove one of the two"
        for key in settings.space
        if key in settings.grid
    ]
    if sampler and settings.num_samples is None:
        problems.append(
            f"sweep.num_samples: missing; give the number of trials for sweep.sampler={sampler}"
        )
    if sampler and not settings.space:
        problems.append(f"sweep.space: missing; sweep.sampler={sampler} draws values from it")
    if not sampler and settings.num_samples is not None:
        problems.append(
            f"sweep.num_samples: {settings.num_samples} samples, but no sweep.sampler; give random "
            "or optuna"
        )
    elif not sampler and settings.space:
        problems.append(
            f"sweep.space: {', '.join(settings.space)}, but no sweep.sampler; give random or optuna"
        )
    if sampler == "optuna":
        problems += [
            f"sweep.space.{key}: tokens are prepared before the first trial, when the samples of "
            "optuna are not known; use sweep.sampler: random"
            for key in settings.space
            if key.startswith("data.")
        ]
    return problems


def _stopping(settings: SweepSection) -> list[str]:
    if settings.sampler == "optuna" and settings.stop != "none":
        return [
            f"sweep.stop: {settings.stop} compares all trials with each other, but optuna proposes "
            "one after the other; use none, or sweep.sampler: random"
        ]
    if settings.stop == "anneal_probe":
        needed = {
            "probe_step": "the step at which it starts",
            "probe_steps": "the length of a probe, in steps",
        }
        return [
            f"sweep.{name}: missing; sweep.stop=anneal_probe needs {meaning}"
            for name, meaning in needed.items()
            if getattr(settings, name) is None
        ]
    problems = []
    for name in ("probe_step", "probe_steps", "probe_margin"):
        value = getattr(settings, name)
        if value != SweepSection.model_fields[name].default:
            problems.append(
                f"sweep.{name}: {value} is only for sweep.stop=anneal_probe, not {settings.stop}"
            )
    return problems


def _origin(settings: SweepSection) -> list[str]:
    if settings.from_ is None:
        return []
    problems = [
        f"{entry.place}: cannot vary with sweep.from={settings.from_}; all fields but schedule.*, "
        "optim.momentum_warmup_steps, train.batch_schedule and train.max_steps are those of the run"
        for entry in _entries(settings)
        if entry.key not in fields_with(Effect.PER_STEP, Effect.LENGTH)
    ]
    if settings.seeds > 1:
        problems.append(
            f"sweep.seeds: {settings.seeds} seeds, but sweep.from={settings.from_} is a run with "
            "one seed"
        )
    try:
        origin(settings.from_)
    except UserError as error:
        problems.append(str(error))
    return problems


def origin(text: str) -> tuple[str, int]:
    """Return the run and the step of `sweep.from`.

    Raises:
        UserError: The text is not RUN@STEP.
    """
    match = re.fullmatch(r"(.+)@([1-9][0-9]{0,14})", text)
    if match is None:
        raise UserError(
            f"sweep.from: {shown(text)} is not RUN@STEP, a run and a number of steps, for example "
            "base@2000"
        )
    return match[1], int(match[2])


def _names(settings: SweepSection) -> list[str]:
    plain = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")
    return [
        f"sweep.trials: {shown(name)} becomes the name of a folder; use at most {LONGEST_NAME} "
        "letters, digits, '.', '_' and '-'"
        for name in settings.trials
        if not plain.fullmatch(name)
    ]


def _seeds(settings: SweepSection) -> list[str]:
    if "train.seed" in settings.space:
        return [
            "sweep.space.train.seed: the winner would be the luckiest seed; use sweep.seeds, which "
            "compares means over seeds"
        ]
    if settings.seeds == 1:
        return []
    return [
        f"{entry.place}: sweep.seeds={settings.seeds} sets the seeds; remove one of the two"
        for entry in _entries(settings)
        if entry.key == "train.seed"
    ]
