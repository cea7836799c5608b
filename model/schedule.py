"""Learning rate of each step, a function of a `Schedule` and the 0-based step.

To add a schedule, write its function and add one entry to `SCHEDULES`.

`step` counts the updates already made: `learning_rate(schedule, 0)` is the rate of the first
update. The formulas below use

- floor = max_lr min_lr_ratio
- r = (step - warmup_steps) / (decay_steps - warmup_steps), which rises from 0 at the end of warmup
  to 1 at `decay_steps`. From there on the rate is the floor. A run of `decay_steps` updates ends
  one update before the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Schedule:
    """Settings of a learning-rate schedule.

    Attributes:
        kind: A key of `SCHEDULES`.
        max_lr: Peak learning rate.
        min_lr_ratio: The floor as a share of the peak, 0 to 1.
        warmup_steps: Step at which warmup ends.
        decay_steps: Step at which the decay ends.
        decay_fraction: Only for wsd and power: share of `decay_steps` that decays, 0 to 1.
        decay_shape: Only for wsd: a key of `DECAY_SHAPES`.
        exponent: Only for power.
        points: Only for piecewise: (step, factor of the peak), by rising step.
    """

    kind: str
    max_lr: float
    min_lr_ratio: float = 0.1
    warmup_steps: int = 0
    decay_steps: int = field(kw_only=True)
    decay_fraction: float = 0.2
    decay_shape: str = "linear"
    exponent: float = 1.2
    points: tuple[tuple[int, float], ...] = ()

    @property
    def is_constant(self) -> bool:
        """True if the rate is `max_lr` at every step."""
        return self.kind == "constant" and self.warmup_steps == 0


def learning_rate(schedule: Schedule, step: int) -> float:
    """Return the learning rate of the update made at the 0-based `step`.

    During warmup the rate rises linearly: max_lr (step + 1) / (warmup_steps + 1). Its first value
    is above 0, so that the first update changes the weights. Source: nanoGPT, train.py
    (https://github.com/karpathy/nanoGPT).

    >>> s = Schedule("cosine", 1e-3, warmup_steps=3, decay_steps=11)
    >>> [round(learning_rate(s, step), 6) for step in (0, 1, 2, 3, 7, 11, 99)]
    [0.00025, 0.0005, 0.00075, 0.001, 0.00055, 0.0001, 0.0001]
    """
    if step < schedule.warmup_steps:
        return schedule.max_lr * (step + 1) / (schedule.warmup_steps + 1)
    return SCHEDULES[schedule.kind].rate(schedule, step)


# ---- schedules after warmup ----


def cosine(schedule: Schedule, step: int) -> float:
    """Return floor + (max_lr - floor) (1 + cos(pi r)) / 2.

    Sources: SGDR, arXiv:1608.03983; nanoGPT, get_lr.

    >>> cosine(Schedule("cosine", 1.0, min_lr_ratio=0.0, decay_steps=4), 2)
    0.5
    """
    return _above_floor(schedule, _cosine_share(decay_progress(schedule, step)))


def linear(schedule: Schedule, step: int) -> float:
    """Return floor + (max_lr - floor) (1 - r).

    Source: "Straight to Zero", arXiv:2502.15938 (with floor 0).

    >>> linear(Schedule("linear", 1.0, min_lr_ratio=0.0, decay_steps=4), 3)
    0.25
    """
    return _above_floor(schedule, _linear_share(decay_progress(schedule, step)))


def wsd(schedule: Schedule, step: int) -> float:
    """Return max_lr, and in the last part of `decay_steps` floor + (max_lr - floor) share(p).

    The name means warmup, stable, decay. p rises from 0 at `wsd_decay_start` to 1 at `decay_steps`;
    share(p) is 1 - p ("linear"), (1 + cos(pi p)) / 2 ("cosine") or 1 - sqrt(p) ("1-sqrt"). Runs of
    different lengths have the same rates, to the last bit, up to the first step of their decay.
    Sources: MiniCPM, arXiv:2404.06395; 1-sqrt: Hägele et al., arXiv:2405.18392.

    >>> s = Schedule("wsd", 1.0, min_lr_ratio=0.0, decay_steps=100, decay_fraction=0.2)
    >>> [wsd(s, step) for step in (0, 80, 85, 90, 100)]
    [1.0, 1.0, 0.75, 0.5, 0.0]
    """
    return _late_decay(schedule, step, DECAY_SHAPES[schedule.decay_shape].share)


def power(schedule: Schedule, step: int) -> float:
    """Return max_lr, and in the last part of `decay_steps` floor + (max_lr - floor) (1 - p)^e.

    p is that of wsd, e is `exponent`. With floor 0, this is min(max_lr, c (decay_steps - step)^e),
    with the c that leaves max_lr at `wsd_decay_start`. Source: "PowerCool", e = 1.2, in track 3 of
    modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt).

    >>> s = Schedule("power", 1.0, 0.0, decay_steps=100, decay_fraction=0.4, exponent=2)
    >>> [round(power(s, step), 4) for step in (0, 60, 80, 90, 100)]
    [1.0, 1.0, 0.25, 0.0625, 0.0]
    """
    return _late_decay(schedule, step, lambda p: (1.0 - p) ** schedule.exponent)


def _late_decay(schedule: Schedule, step: int, share: Callable[[float], float]) -> float:
    start = wsd_decay_start(schedule)
    # At `start`, p is 0, but the formula could differ from the peak in the last bit. A longer run
    # has exactly the peak at this step.
    if step < start or step == start < schedule.decay_steps:
        return schedule.max_lr
    return _above_floor(schedule, share(_progress(step, start, schedule.decay_steps)))


def piecewise(schedule: Schedule, step: int) -> float:
    """Return max_lr times the factor of `points`: straight lines between them, flat outside.

    `decay_steps` and `min_lr_ratio` have no effect. Source: `piecewise_interpolate_schedule` of
    optax (https://optax.readthedocs.io).

    >>> s = Schedule("piecewise", 2.0, decay_steps=1, points=((0, 0.5), (10, 1.0), (20, 0.0)))
    >>> [piecewise(s, step) for step in (0, 5, 10, 15, 99)]
    [1.0, 1.5, 2.0, 1.0, 0.0]
    """
    (start, before), *later = schedule.points
    for end, after in later:
        if step < end:
            share = max(0, step - start) / (end - start)
            return schedule.max_lr * (before + (after - before) * share)
        start, before = end, after
    return schedule.max_lr * before


def constant(schedule: Schedule, step: int) -> float:
    """Return max_lr. `decay_steps` and `min_lr_ratio` have no effect.

    >>> constant(Schedule("constant", 3e-4, decay_steps=1), 10**6)
    0.0003
    """
    return schedule.max_lr


def inverse_sqrt(schedule: Schedule, step: int) -> float:
    """Return max_lr sqrt((warmup_steps + 1) / (step + 1)), but at least the floor.

    `decay_steps` has no effect. Source: Vaswani et al., arXiv:1706.03762, section 5.3, with the
    peak in place of the width of the model.

    >>> s = Schedule("inverse_sqrt", 1.0, min_lr_ratio=0.1, warmup_steps=3, decay_steps=1)
    >>> [inverse_sqrt(s, step) for step in (3, 15, 10**6)]
    [1.0, 0.5, 0.1]
    """
    rate = schedule.max_lr * math.sqrt((schedule.warmup_steps + 1) / (step + 1))
    return max(schedule.max_lr * schedule.min_lr_ratio, rate)


def wsd_decay_start(schedule: Schedule) -> int:
    """Return the first step of the decay of wsd and power.

    >>> wsd_decay_start(Schedule("wsd", 1.0, decay_steps=1000, decay_fraction=0.2))
    800
    """
    return schedule.decay_steps - round(schedule.decay_fraction * schedule.decay_steps)


def decay_progress(schedule: Schedule, step: int) -> float:
    """Return r in the formulas: the part of the decay that is over, 0 to 1."""
    return _progress(step, schedule.warmup_steps, schedule.decay_steps)


def _progress(step: int, start: int, end: int) -> float:
    if step >= end:
        return 1.0
    return (step - start) / (end - start)


def _above_floor(schedule: Schedule, share: float) -> float:
    floor = schedule.max_lr * schedule.min_lr_ratio
    return floor + share * (schedule.max_lr - floor)


# ---- shapes of a decay: share of (max_lr - floor) that remains at progress p, 0 to 1 ----


def _linear_share(p: float) -> float:
    return 1.0 - p


def _cosine_share(p: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * p))


def _one_minus_sqrt_share(p: float) -> float:
    return 1.0 - math.sqrt(p)


# ---- tables ----


@dataclass(frozen=True)
class DecayShape:
    """One shape of the decay of wsd."""

    share: Callable[[float], float]
    help: str  # one line for `--help`


@dataclass(frozen=True)
class ScheduleKind:
    """One shape of the learning rate.

    Attributes:
        rate: Learning rate after warmup, as a function of the schedule and the 0-based step.
        help: One line for `--help`.
        has_end: False if `decay_steps` has no effect. Runs of different lengths then have the same
            rates at all of their common steps.
    """

    rate: Callable[[Schedule, int], float]
    help: str
    has_end: bool = True


DECAY_SHAPES: dict[str, DecayShape] = {
    "linear": DecayShape(_linear_share, "a straight line"),
    "cosine": DecayShape(_cosine_share, "half a cosine wave"),
    "1-sqrt": DecayShape(_one_minus_sqrt_share, "1 - sqrt(p): fast at first, then slower"),
}
SCHEDULES: dict[str, ScheduleKind] = {
    "cosine": ScheduleKind(cosine, "half a cosine wave from the peak to the floor"),
    "linear": ScheduleKind(linear, "a straight line from the peak to the floor"),
    "wsd": ScheduleKind(
        wsd, "the peak, then a decay to the floor over the last decay_fraction of decay_steps"
    ),
    "power": ScheduleKind(
        power, "as wsd; the decay is a power of the steps that are left, see exponent"
    ),
    "piecewise": ScheduleKind(
        piecewise, "straight lines between the factors of the peak in points", has_end=False
    ),
    "constant": ScheduleKind(constant, "the peak at every step", has_end=False),
    "inverse_sqrt": ScheduleKind(
        inverse_sqrt, "falls as 1 / sqrt(step), but not below the floor", has_end=False
    ),
}
