"""Mistakes that show only when all trials of a sweep are known: one line for each."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.config.experiment import field_docs
from orchestrator.config.messages import shown
from orchestrator.config.sweep import SweepSection
from orchestrator.sweep.space.checks import origin
from orchestrator.sweep.space.dimensions import Choices, Range, dimension

if TYPE_CHECKING:
    from orchestrator.sweep.space.expand import Trial


def trial_problems(settings: SweepSection, trials: "Sequence[Trial]") -> list[str]:
    """Return a line for each mistake."""
    counts = Counter(trial.name for trial in trials)
    problems = [
        f"sweep.trials: {shown(name)} names two trials; choose another name, for "
        "a trial or for a file of optim.kind"
        for name, count in counts.items()
        if count > 1
    ]
    problems += _probe_step(settings, trials)
    problems += branch_problems(settings, trials)
    if settings.stop == "asha":
        problems += _asha(settings, trials)
    return problems


def branch_problems(settings: SweepSection, trials: "Sequence[Trial]") -> list[str]:
    """Return a line for each trial that ends before `sweep.from` branches off."""
    if settings.from_ is None:
        return []
    _, step = origin(settings.from_)
    return [
        f"sweep.from: {settings.from_} is not before the end of trial {trial.name}, "
        f"train.max_steps={trial.experiment.train.max_steps}"
        for trial in trials
        if trial.experiment.train.max_steps <= step
    ]


def _probe_step(settings: SweepSection, trials: "Sequence[Trial]") -> list[str]:
    """Check that trials can differ before the step of the probes, and that one goes on after it."""
    step = settings.probe_step
    if settings.stop != "anneal_probe" or step is None or not trials:
        return []
    problems = []
    warmup = max(trial.experiment.schedule.warmup_steps for trial in trials)
    if step <= warmup:
        problems.append(
            f"sweep.probe_step: {step} lies inside a warmup of {warmup} steps; give a step after it"
        )
    if settings.from_ is not None and step <= origin(settings.from_)[1]:
        problems.append(
            f"sweep.probe_step: {step} is not after the branch of sweep.from={settings.from_}"
        )
    longest = max(trial.experiment.train.max_steps for trial in trials)
    if step >= longest:
        problems.append(
            f"sweep.probe_step: {step} saves no step: no trial has more than {longest} steps"
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
        f"sweep.stop: asha stops trials by their loss in mid-run, and {', '.join(different)} "
        "differ here. The curves of different schedules cross, so asha would stop the wrong "
        "trials; use anneal_probe or none"
    ]


def _varies(dimension: Choices | Range) -> bool:
    return not isinstance(dimension, Choices) or len(dimension.values) > 1
