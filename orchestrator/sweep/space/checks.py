"""What a sweep may not say: an experiment and its `sweep:` in, all that is wrong with them out, a line for each mistake."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.config.experiment import Experiment, field_docs
from orchestrator.config.messages import shown, unknown_field
from orchestrator.config.sweep import SweepSection
from orchestrator.errors import UserError
from orchestrator.sweep.space.dimensions import Choices, dimension, values_of

if TYPE_CHECKING:
    from orchestrator.sweep.space.expand import Trial

MOST_TRIALS = 10_000
LONGEST_NAME = 100  # a run's name has 128 characters: the seed follows
_COMPARED = "trials are compared at the same steps on the same tokens; set it once, for all of them"
# Fields that no sweep varies, or sections with a point at the end, and why.
FIXED = {
    "name": "a trial is named after what varies",
    "storage": "the trials lie in the folder of their sweep",
    "data.dir": "it follows from the other fields of data; vary those",
    "compute.": "it says where trials run, not what they learn",
    "tracking.": "it says where trials are shown, not what they learn",
    "sweep.": "a sweep holds no sweeps; give it a file of its own",
    "train.keep": "it does not change what a trial learns",
    "train.checkpoint_interval": "it does not change what a trial learns",
    "train.log_interval": _COMPARED,
    "train.eval_interval": _COMPARED,
    "train.eval_tokens": _COMPARED,
}


def problems(base: Experiment, settings: SweepSection) -> list[str]:
    """Lines about the section itself, before it is expanded."""
    found = [
        *_extent(settings),
        *_field_problems(settings),
        *_sampling(settings),
        *_stopping(settings),
        *_origin(settings),
    ]
    for name in settings.trials:
        if not re.fullmatch(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}", name):
            found.append(
                f"sweep.trials: {shown(name)} names a folder: at most {LONGEST_NAME} letters, digits, '.', '_' and '-'"
            )
    if settings.seeds > 1:
        found += [
            f"{where}.train.seed: sweep.seeds={settings.seeds} sets the seeds; leave one of the two out"
            for where, key, _ in _entries(settings)
            if key == "train.seed"
        ]
    if base.train.eval_interval is None:
        found.append(
            "train.eval_interval: null: trials are compared by val/loss; give the steps between two evaluations"
        )
    return found


def varied(settings: SweepSection) -> list[str]:
    """The fields that the sweep speaks of, in its order."""
    return list(dict.fromkeys(key for _, key, _ in _entries(settings)))


def _entries(settings: SweepSection) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, field, what is said of it): a list of values, or the words of a range."""
    yield from (("sweep.grid", key, values) for key, values in settings.grid.items())
    yield from (("sweep.space", key, words) for key, words in settings.space.items())
    for name, fields in settings.trials.items():
        yield from ((f"sweep.trials.{name}", key, [value]) for key, value in fields.items())


def _extent(settings: SweepSection) -> list[str]:
    if not (settings.grid or settings.trials or settings.sampler or settings.space):
        return [
            "sweep: says nothing to vary; give sweep.grid, sweep.trials, or sweep.space with a sweep.sampler (for seeds "
            "alone: sweep.grid.train.seed)"
        ]
    grid = math.prod(map(len, settings.grid.values())) if settings.grid else 0
    trials = (grid + len(settings.trials) + (settings.num_samples or 0)) * settings.seeds
    if trials > MOST_TRIALS:
        return [
            f"sweep: {trials} trials are more than {MOST_TRIALS}; vary fewer values, or draw some of them with "
            f"sweep.sampler: random"
        ]
    return []


def _field_problems(settings: SweepSection) -> list[str]:
    found, known = [], {key: doc for key, doc in field_docs().items() if not _fixed(key)}
    for where, key, words in _entries(settings):
        if why := _fixed(key):
            found.append(f"{where}.{key}: cannot be swept: {why}")
        elif key not in known:
            found.append(f"{where}.{unknown_field(key, known)}")
        else:
            try:
                values_of(key, words) if isinstance(words, list) else dimension(key, words)
            except UserError as error:
                found += [f"{where}.{line}" for line in str(error).split("\n")]
    return found


def _fixed(key: str) -> str | None:
    return next(
        (
            why
            for fixed, why in FIXED.items()
            if key == fixed or fixed.endswith(".") and key.startswith(fixed)
        ),
        None,
    )


def _sampling(settings: SweepSection) -> list[str]:
    found = [
        f"sweep.space.{key}: stands in sweep.grid too; keep one of the two"
        for key in settings.space
        if key in settings.grid
    ]
    if settings.sampler and settings.num_samples is None:
        found.append(
            f"sweep.num_samples: missing; say how many trials sweep.sampler={settings.sampler} draws"
        )
    if settings.sampler and not settings.space:
        found.append(f"sweep.space: missing; say what sweep.sampler={settings.sampler} draws from")
    if settings.num_samples is not None and not settings.sampler:
        found.append(
            f"sweep.num_samples: {settings.num_samples} samples and no sweep.sampler; give random or optuna"
        )
    elif settings.space and not settings.sampler:
        found.append(
            f"sweep.space: {', '.join(settings.space)} and no sweep.sampler; give random or optuna"
        )
    if settings.sampler == "optuna":
        found += [
            f"sweep.space.{key}: tokens are prepared before the first trial, and what optuna will ask for is not known "
            f"then; use sweep.sampler: random"
            for key in settings.space
            if key.startswith("data.")
        ]
    return found


def _stopping(settings: SweepSection) -> list[str]:
    if settings.sampler == "optuna" and settings.stop != "none":
        return [
            f"sweep.stop: {settings.stop} compares all trials with one another, and optuna asks for one after the other; "
            f"use none, or sweep.sampler: random"
        ]
    if settings.stop == "anneal_probe":
        return [
            f"sweep.{name}: missing; sweep.stop=anneal_probe needs {what}"
            for name, what in (
                ("probe_step", "the step at which it forks"),
                ("probe_steps", "the length of a probe, in steps"),
            )
            if getattr(settings, name) is None
        ]
    return [
        f"sweep.{name}: {getattr(settings, name)} is for sweep.stop=anneal_probe, and it is {settings.stop}"
        for name in ("probe_step", "probe_steps", "probe_margin")
        if getattr(settings, name) != SweepSection.model_fields[name].default
    ]


def _probing(settings: SweepSection, trials: "Sequence[Trial]") -> list[str]:
    """A probe compares trunks, and a warmup or what lies before a branch is none yet."""
    if settings.stop != "anneal_probe" or not settings.probe_step:
        return []
    warmup = max((t.experiment.schedule.warmup_steps for t in trials), default=0)
    found = []
    if settings.probe_step <= warmup:
        found.append(
            f"sweep.probe_step: {settings.probe_step} lies inside a warmup of {warmup} steps, where trials are not "
            f"told apart yet"
        )
    if (
        settings.from_
        and "@" in settings.from_
        and settings.probe_step <= origin(settings.from_)[1]
    ):
        found.append(
            f"sweep.probe_step: {settings.probe_step} is not behind the branch of sweep.from={settings.from_}"
        )
    return found


def _origin(settings: SweepSection) -> list[str]:
    if settings.from_ is None:
        return []
    found = [
        f"{where}.{key}: sweep.from={settings.from_} branches off one run, and all but schedule.* and train.max_steps "
        f"is that run's"
        for where, key, _ in _entries(settings)
        if not key.startswith("schedule.") and key != "train.max_steps"
    ]
    if settings.seeds > 1:
        found.append(
            f"sweep.seeds: {settings.seeds}: sweep.from={settings.from_} branches off one run, and its seed is one"
        )
    try:
        origin(settings.from_)
    except UserError as error:
        found.append(str(error))
    return found


def origin(text: str) -> tuple[str, int]:
    """(run, step) of `sweep.from`."""
    match = re.fullmatch(r"(.+)@([1-9][0-9]{0,14})", text)
    if not match:
        raise UserError(
            f"sweep.from: {shown(text)} is not RUN@STEP, a run and the updates it had made, for example base@2000"
        )
    return match[1], int(match[2])


def together(settings: SweepSection, trials: "Sequence[Trial]") -> list[str]:
    """Lines about what the trials may not be beside each other."""
    found = [
        f"sweep.trials: {shown(name)} names two trials; choose another name"
        for name, count in Counter(trial.name for trial in trials).items()
        if count > 1
    ]
    found += _probing(settings, trials)
    longest = max((trial.experiment.train.max_steps for trial in trials), default=math.inf)
    if settings.probe_step and settings.probe_step >= longest:
        found.append(
            f"sweep.probe_step: {settings.probe_step} leaves nothing to save: no trial has more than {longest} steps"
        )
    if settings.from_:
        _, step = origin(settings.from_)
        found += [
            f"sweep.from: {settings.from_} is not before the end of trial {trial.name}, "
            f"train.max_steps={trial.experiment.train.max_steps}"
            for trial in trials
            if trial.experiment.train.max_steps <= step
        ]
    return found + (_crossing(settings, trials) if settings.stop == "asha" else [])


def _crossing(settings: SweepSection, trials: "Sequence[Trial]") -> list[str]:
    """Why asha may not judge these trials, if it may not."""
    flats = [trial.experiment.flat() for trial in trials]
    shape = [
        key for key in field_docs() if key.startswith("schedule.") and key != "schedule.max_lr"
    ] + ["train.max_steps"]
    differs = [
        key
        for key in shape
        if len({flat[key] for flat in flats}) > 1
        or key in settings.space
        and _alternatives(key, settings.space[key])
    ]
    if not differs:
        return []
    return [
        f"sweep.stop: asha stops trials by their loss in mid-run, and {', '.join(differs)} differ here: the curves of "
        f"different schedules cross, so it would stop the wrong ones; use anneal_probe, or none"
    ]


def _alternatives(key: str, words: Any) -> bool:
    one = dimension(key, words)
    return not isinstance(one, Choices) or len(one.values) > 1
