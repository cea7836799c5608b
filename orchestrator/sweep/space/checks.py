"""Mistakes in a sweep: one line for each, and all at once.

`section_problems` checks the `sweep:` section before its trials are made, `trial_problems` checks
the trials together.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.config.experiment import Experiment, field_docs
from orchestrator.config.messages import shown, unknown_field
from orchestrator.config.sweep import SweepSection
from orchestrator.errors import UserError
from orchestrator.sweep.space.dimensions import Choices, Range, dimension, values_of
from orchestrator.sweep.space.names import LONGEST_NAME

if TYPE_CHECKING:
    from orchestrator.sweep.space.expand import Trial

MOST_TRIALS = 10_000
_COMPARED = "trials are compared at the same steps on the same tokens; set it once, for all of them"
# Fields, or sections with a dot at the end, that no sweep varies, and why.
FIXED = {
    "name": "a trial is named after what varies",
    "storage": "the trials are in the folder of their sweep",
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


class _Entry(NamedTuple):
    """What a sweep says about one field: a list of values, or the words of a range."""

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
    """Return a line for each mistake in the section itself."""
    problems = [
        *_extent(settings),
        *_fields(settings),
        *_sampling(settings),
        *_stopping(settings),
        *_origin(settings),
        *_names(settings),
        *_seeds(settings),
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
            "sweep: says nothing to vary; give sweep.grid, sweep.trials, or sweep.space with a "
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


def _fields(settings: SweepSection) -> list[str]:
    problems = []
    known = {key: doc for key, doc in field_docs().items() if _why_fixed(key) is None}
    for entry in _entries(settings):
        why_fixed = _why_fixed(entry.key)
        if why_fixed is not None:
            problems.append(f"{entry.place}: cannot be swept: {why_fixed}")
        elif entry.key not in known:
            problems.append(f"{entry.where}.{unknown_field(entry.key, known)}")
        else:
            lines = _value_problems(entry)
            problems += [f"{entry.where}.{line}" for line in lines]
    return problems


def _value_problems(entry: _Entry) -> list[str]:
    try:
        if isinstance(entry.words, list):
            values_of(entry.key, entry.words)
        else:
            dimension(entry.key, entry.words)
    except UserError as error:
        return str(error).split("\n")
    return []


def _why_fixed(key: str) -> str | None:
    for fixed, why in FIXED.items():
        if key == fixed or (fixed.endswith(".") and key.startswith(fixed)):
            return why
    return None


def _sampling(settings: SweepSection) -> list[str]:
    sampler = settings.sampler
    problems = [
        f"sweep.space.{key}: stands in sweep.grid too; keep one of the two"
        for key in settings.space
        if key in settings.grid
    ]
    if sampler and settings.num_samples is None:
        problems.append(
            f"sweep.num_samples: missing; say how many trials sweep.sampler={sampler} draws"
        )
    if sampler and not settings.space:
        problems.append(f"sweep.space: missing; say what sweep.sampler={sampler} draws from")
    if not sampler and settings.num_samples is not None:
        problems.append(
            f"sweep.num_samples: {settings.num_samples} samples and no sweep.sampler; give random "
            "or optuna"
        )
    elif not sampler and settings.space:
        problems.append(
            f"sweep.space: {', '.join(settings.space)} and no sweep.sampler; give random or optuna"
        )
    if sampler == "optuna":
        problems += [
            f"sweep.space.{key}: tokens are prepared before the first trial, and optuna's samples "
            "are not known then; use sweep.sampler: random"
            for key in settings.space
            if key.startswith("data.")
        ]
    return problems


def _stopping(settings: SweepSection) -> list[str]:
    if settings.sampler == "optuna" and settings.stop != "none":
        return [
            f"sweep.stop: {settings.stop} compares all trials with one another, and optuna asks "
            "for one after the other; use none, or sweep.sampler: random"
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
                f"sweep.{name}: {value} is for sweep.stop=anneal_probe, and it is {settings.stop}"
            )
    return problems


def _origin(settings: SweepSection) -> list[str]:
    if settings.from_ is None:
        return []
    problems = [
        f"{entry.place}: sweep.from={settings.from_} branches off one run, and all but schedule.* "
        "and train.max_steps is that run's"
        for entry in _entries(settings)
        if not entry.key.startswith("schedule.") and entry.key != "train.max_steps"
    ]
    if settings.seeds > 1:
        problems.append(
            f"sweep.seeds: {settings.seeds}: sweep.from={settings.from_} branches off one run, and "
            "its seed is one"
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
            f"sweep.from: {shown(text)} is not RUN@STEP, a run and the updates it had made, for "
            "example base@2000"
        )
    return match[1], int(match[2])


def _names(settings: SweepSection) -> list[str]:
    plain = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")
    return [
        f"sweep.trials: {shown(name)} names a folder: at most {LONGEST_NAME} letters, digits, "
        "'.', '_' and '-'"
        for name in settings.trials
        if not plain.fullmatch(name)
    ]


def _seeds(settings: SweepSection) -> list[str]:
    if settings.seeds == 1:
        return []
    return [
        f"{entry.place}: sweep.seeds={settings.seeds} sets the seeds; leave one of the two out"
        for entry in _entries(settings)
        if entry.key == "train.seed"
    ]


# ---- the trials together ----


def trial_problems(settings: SweepSection, trials: "Sequence[Trial]") -> list[str]:
    """Return a line for each mistake that the trials show together."""
    counts = Counter(trial.name for trial in trials)
    problems = [
        f"sweep.trials: {shown(name)} names two trials; choose another name"
        for name, count in counts.items()
        if count > 1
    ]
    problems += _probe_step(settings, trials)
    if settings.from_ is not None:
        _, step = origin(settings.from_)
        problems += [
            f"sweep.from: {settings.from_} is not before the end of trial {trial.name}, "
            f"train.max_steps={trial.experiment.train.max_steps}"
            for trial in trials
            if trial.experiment.train.max_steps <= step
        ]
    if settings.stop == "asha":
        problems += _asha(settings, trials)
    return problems


def _probe_step(settings: SweepSection, trials: "Sequence[Trial]") -> list[str]:
    """Check that the trials differ before the step of the probes, and go on after it."""
    step = settings.probe_step
    if settings.stop != "anneal_probe" or step is None or not trials:
        return []
    problems = []
    warmup = max(trial.experiment.schedule.warmup_steps for trial in trials)
    if step <= warmup:
        problems.append(
            f"sweep.probe_step: {step} lies inside a warmup of {warmup} steps, where trials are "
            "not told apart yet"
        )
    if settings.from_ is not None and step <= origin(settings.from_)[1]:
        problems.append(
            f"sweep.probe_step: {step} is not behind the branch of sweep.from={settings.from_}"
        )
    longest = max(trial.experiment.train.max_steps for trial in trials)
    if step >= longest:
        problems.append(
            f"sweep.probe_step: {step} leaves nothing to save: no trial has more than {longest} "
            "steps"
        )
    return problems


def _asha(settings: SweepSection, trials: "Sequence[Trial]") -> list[str]:
    """Check that all trials have one schedule shape: the curves of different shapes cross."""
    flats = [trial.experiment.flat() for trial in trials]
    shape = [key for key in field_docs() if key.startswith("schedule.")]
    shape.remove("schedule.max_lr")
    different = []
    for key in [*shape, "train.max_steps"]:
        is_drawn = key in settings.space and _varies(dimension(key, settings.space[key]))
        if is_drawn or len({flat[key] for flat in flats}) > 1:
            different.append(key)
    if not different:
        return []
    return [
        f"sweep.stop: asha stops trials by their loss in mid-run, and {', '.join(different)} differ "
        "here: the curves of different schedules cross, so it would stop the wrong ones; use "
        "anneal_probe, or none"
    ]


def _varies(dimension: Choices | Range) -> bool:
    return not isinstance(dimension, Choices) or len(dimension.values) > 1
