"""All settings that may change from step to step of a run, as a function of the 0-based step.

Two runs that are equal in everything else have the same weights after n steps if the settings of
these steps are equal bit for bit. To let another setting change, add it to `StepSettings` and to
`Plan.value`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from model.schedule import SCHEDULES, Schedule, learning_rate

FIRST_MOMENTUM = 0.85  # at the start of a warmup


@dataclass(frozen=True)
class StepSettings:
    """Settings of one update.

    Attributes:
        lr: Learning rate.
        weight_decay: Factor of the weight decay of each group of parameters.
        momentum: Momentum of the groups that have one.
        batch_size: Sequences, over all workers.
    """

    lr: float
    weight_decay: float
    momentum: float
    batch_size: int


IN_WORDS = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "momentum": "momentum",
    "batch_size": "batch size",
}
NAMES = tuple(IN_WORDS)  # in the order of `StepSettings`


@dataclass(frozen=True)
class BatchSizes:
    """Sequences per update of each stretch of steps.

    Attributes:
        stretches: (first step, sequences), by rising step; the first one begins at step 0.
    """

    stretches: tuple[tuple[int, int], ...]

    def at(self, step: int) -> int:
        """Return the sequences of the update made at `step`.

        >>> [BatchSizes(((0, 4), (10, 8))).at(step) for step in (0, 9, 10)]
        [4, 4, 8]
        """
        return next(size for first, size in reversed(self.stretches) if first <= max(0, step))

    def before(self, step: int) -> int:
        """Return the sequences of the first `step` updates.

        >>> [BatchSizes(((0, 4), (10, 8))).before(step) for step in (0, 10, 12)]
        [0, 40, 56]
        """
        ends = [first for first, _ in self.stretches[1:]] + [step]
        stretches = zip(self.stretches, ends, strict=True)
        return sum(
            size * (min(end, step) - first) for (first, size), end in stretches if first < step
        )


@dataclass(frozen=True)
class Plan:
    """Settings of every step of a run.

    Attributes:
        lr: Schedule of the learning rate.
        weight_decay: Schedule of the factor, whose peak is 1.
        momentum: Schedule of the momentum after its warmup.
        batch_sizes: Sequences per update.
    """

    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule
    batch_sizes: BatchSizes

    def value(self, name: str, step: int) -> float:
        """Return one setting of the update made at `step`."""
        if name == "batch_size":
            return self.batch_sizes.at(step)
        if name == "momentum":
            return _momentum(self.momentum, step)
        return learning_rate(getattr(self, name), step)

    def constant(self, name: str) -> float | None:
        """Return a setting that is the same at all steps; None for others."""
        if name == "batch_size":
            is_constant = len(self.batch_sizes.stretches) == 1
        else:
            is_constant = getattr(self, name).is_constant
        return self.value(name, 0) if is_constant else None


def _momentum(schedule: Schedule, step: int) -> float:
    """Return the momentum of the update made at `step`.

    In the warmup, it rises linearly from 0.85, as in modded-nanogpt
    (https://github.com/KellerJordan/modded-nanogpt).

    >>> s = Schedule("constant", 0.95, warmup_steps=4, decay_steps=1)
    >>> [round(_momentum(s, step), 3) for step in (0, 2, 4, 100)]
    [0.85, 0.9, 0.95, 0.95]
    """
    if step >= schedule.warmup_steps:
        return SCHEDULES[schedule.kind].rate(schedule, step)
    return FIRST_MOMENTUM + (schedule.max_lr - FIRST_MOMENTUM) * step / schedule.warmup_steps


@dataclass(frozen=True)
class Steps:
    """Settings of every step: of a run, or of a trial that follows another run at first.

    Attributes:
        plan: The settings from step `splice` on.
        before: The settings before step `splice`; None: `plan` at all steps.
        splice: First step of `plan`.
        anneal_at: First step of a straight line of the learning rate to zero; None: no anneal.
        anneal_steps: Length of that line. The first of its steps has the full rate and the last one
            1/anneal_steps of it, as in wsd's linear decay to a floor of zero.
    """

    plan: Plan
    before: Plan | None = None
    splice: int = 0
    anneal_at: int | None = None
    anneal_steps: int = 1

    def __call__(self, step: int) -> StepSettings:
        """Return the settings of the update made at `step`."""
        return StepSettings(*(self.value(name, step) for name in NAMES))  # type: ignore[arg-type]

    def value(self, name: str, step: int) -> float:
        """Return one setting of the update made at `step`."""
        if name != "lr" or self.anneal_at is None or step < self.anneal_at:
            return self._plan_at(step).value(name, step)
        share = 1.0 - (step - self.anneal_at) / self.anneal_steps
        return self._plan_at(self.anneal_at).value(name, self.anneal_at) * share

    def _plan_at(self, step: int) -> Plan:
        return self.plan if self.before is None or step >= self.splice else self.before

    def constant(self, name: str) -> float | None:
        """Return a setting that is the same at all steps; None for others and for anneals."""
        if name == "lr" and self.anneal_at is not None:
            return None
        found = {plan.constant(name) for plan in (self.plan, self.before or self.plan)}
        return found.pop() if len(found) == 1 else None

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences per update, over all workers."""
        after = self.plan.batch_sizes
        if self.before is None or self.splice == 0:
            return after
        kept = [part for part in self.before.batch_sizes.stretches if part[0] < self.splice]
        later = [part for part in after.stretches if part[0] > self.splice]
        return BatchSizes((*kept, (self.splice, after.at(self.splice)), *later))


@functools.cache
def first_change(steps: Steps, name: str, count: int) -> int:
    """Return the first of `count` steps with another setting than step 0; `count` if none has."""
    if steps.constant(name) is not None:
        return count
    first = steps.value(name, 0)
    return next((step for step in range(count) if steps.value(name, step) != first), count)


def steps_of_json(stored: dict[str, Any]) -> Steps:
    """Return the settings that were stored as `dataclasses.asdict` gives them."""
    parts = {**stored, "plan": _plan_of_json(stored["plan"])}
    if stored["before"]:
        parts["before"] = _plan_of_json(stored["before"])
    return Steps(**parts)


def _plan_of_json(stored: dict[str, Any]) -> Plan:
    schedules = {
        name: Schedule(**{**stored[name], "points": _pairs(stored[name]["points"])})
        for name in ("lr", "weight_decay", "momentum")
    }
    return Plan(**schedules, batch_sizes=BatchSizes(_pairs(stored["batch_sizes"]["stretches"])))


def _pairs(stored: list[list[Any]]) -> tuple[tuple[Any, Any], ...]:
    return tuple((first, second) for first, second in stored)
