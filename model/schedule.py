"""Learning rate as a function of the step: a Schedule and a 0-based step in, a Python float out. No state.

`step` counts the updates already made, so learning_rate(schedule, 0) is the rate of the first update. Warmup is the
same for every kind: lr(step) = max_lr (step + 1) / (warmup_steps + 1) while step < warmup_steps, as nanoGPT has it
(https://github.com/karpathy/nanoGPT, train.py): the first update is never wasted on a rate of 0.

In the formulas below: floor = max_lr min_lr_ratio, and r = (step - warmup_steps) / (decay_steps - warmup_steps) runs
from 0 at the end of warmup to 1 at `decay_steps`, from where on the rate is the floor. A run of decay_steps updates
ends at step decay_steps - 1, one update before the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Schedule:
    """What learning_rate needs.

    kind: one of KINDS. max_lr: the peak. min_lr_ratio: floor as a share of the peak, 0..1. warmup_steps, decay_steps:
    the steps at which warmup and decay end. decay_fraction, decay_shape: wsd only, the share of decay_steps that its
    decay takes, and one of DECAY_SHAPES.

    Raises ValueError, quoting the value, for anything that gives no schedule, a warmup into the decay included.
    """

    kind: str
    max_lr: float
    min_lr_ratio: float = 0.1
    warmup_steps: int = 0
    decay_steps: int = field(kw_only=True)
    decay_fraction: float = 0.2
    decay_shape: str = "linear"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"schedule kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.decay_shape not in DECAY_SHAPES:
            raise ValueError(
                f"decay_shape must be one of {', '.join(DECAY_SHAPES)}, got {self.decay_shape!r}"
            )
        if not 0 <= self.max_lr < math.inf:
            raise ValueError(f"max_lr must be a finite number of at least 0, got {self.max_lr!r}")
        for name in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)!r}")
        if self.warmup_steps < 0 or self.decay_steps < 1:
            raise ValueError(
                f"need warmup_steps >= 0, decay_steps >= 1, got {self.warmup_steps}, {self.decay_steps}"
            )
        decay_start = wsd_decay_start(self) if self.kind == "wsd" else self.decay_steps
        if self.kind not in HORIZON_FREE and self.warmup_steps > decay_start:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} ends after step {decay_start}, where the decay must "
                f"have begun (decay_steps={self.decay_steps}): shorten the warmup"
            )


def learning_rate(schedule: Schedule, step: int) -> float:
    """The rate of the update made at 0-based `step`. Raises ValueError for a negative step.

    >>> s = Schedule("cosine", 1e-3, warmup_steps=3, decay_steps=11)
    >>> [round(learning_rate(s, step), 6) for step in (0, 1, 2, 3, 7, 11, 99)]
    [0.00025, 0.0005, 0.00075, 0.001, 0.00055, 0.0001, 0.0001]
    """
    if step < 0:
        raise ValueError(f"step counts from 0, got {step}")
    if step < schedule.warmup_steps:
        return schedule.max_lr * (step + 1) / (schedule.warmup_steps + 1)
    return _KINDS[schedule.kind](schedule, step)


def cosine(schedule: Schedule, step: int) -> float:
    """floor + (max_lr - floor) (1 + cos(pi r)) / 2 after warmup. Source: SGDR, arXiv:1608.03983; nanoGPT's get_lr.

    >>> cosine(Schedule("cosine", 1.0, min_lr_ratio=0.0, decay_steps=4), 2)
    0.5
    """
    return _between(
        schedule, _cosine_shape(_progress(step, schedule.warmup_steps, schedule.decay_steps))
    )


def linear(schedule: Schedule, step: int) -> float:
    """floor + (max_lr - floor) (1 - r) after warmup. Source: "Straight to Zero", arXiv:2502.15938 (with floor 0).

    >>> linear(Schedule("linear", 1.0, min_lr_ratio=0.0, decay_steps=4), 3)
    0.25
    """
    return _between(
        schedule, _linear_shape(_progress(step, schedule.warmup_steps, schedule.decay_steps))
    )


def wsd(schedule: Schedule, step: int) -> float:
    """Warmup, stable, decay: max_lr, then floor + (max_lr - floor) shape(p) over the last part of decay_steps.

    p runs from 0 at wsd_decay_start to 1 at decay_steps, a decay_fraction of decay_steps in all; shape(p) is 1 - p
    ("linear"), (1 + cos(pi p)) / 2 ("cosine") or 1 - sqrt(p) ("1-sqrt"). Runs of different lengths share every step
    up to the first of their decay, which still has the peak, bit for bit.
    Source: MiniCPM, arXiv:2404.06395; 1-sqrt: Hägele et al., arXiv:2405.18392.

    >>> s = Schedule("wsd", 1.0, min_lr_ratio=0.0, decay_steps=100, decay_fraction=0.2)
    >>> [wsd(s, step) for step in (0, 80, 85, 90, 100)]
    [1.0, 1.0, 0.75, 0.5, 0.0]
    """
    start = wsd_decay_start(schedule)
    # At the start p is 0, and the formula may miss by a bit the peak that longer runs have there.
    if step < start or step == start < schedule.decay_steps:
        return schedule.max_lr
    return _between(
        schedule, DECAY_SHAPES[schedule.decay_shape](_progress(step, start, schedule.decay_steps))
    )


def constant(schedule: Schedule, step: int) -> float:
    """max_lr at every step after warmup; decay_steps and min_lr_ratio play no part.

    >>> constant(Schedule("constant", 3e-4, decay_steps=1), 10**6)
    0.0003
    """
    return schedule.max_lr


def inverse_sqrt(schedule: Schedule, step: int) -> float:
    """max_lr sqrt((warmup_steps + 1) / (step + 1)) after warmup, never below the floor; decay_steps plays no part.

    It knows no end, so runs of different lengths share every step. Source: Vaswani et al., arXiv:1706.03762, section 5.3,
    with the peak in place of the model's width.

    >>> s = Schedule("inverse_sqrt", 1.0, min_lr_ratio=0.1, warmup_steps=3, decay_steps=1)
    >>> [inverse_sqrt(s, step) for step in (3, 15, 10**6)]
    [1.0, 0.5, 0.1]
    """
    return max(
        schedule.max_lr * schedule.min_lr_ratio,
        schedule.max_lr * math.sqrt((schedule.warmup_steps + 1) / (step + 1)),
    )


def wsd_decay_start(schedule: Schedule) -> int:
    """The first step of wsd's decay: decay_steps less its decay_fraction, rounded to whole steps.

    >>> wsd_decay_start(Schedule("wsd", 1.0, decay_steps=1000, decay_fraction=0.2))
    800
    """
    return schedule.decay_steps - round(schedule.decay_fraction * schedule.decay_steps)


def _progress(step: int, start: int, end: int) -> float:
    return 1.0 if step >= end else (step - start) / (end - start)


def _between(schedule: Schedule, share: float) -> float:
    floor = schedule.max_lr * schedule.min_lr_ratio
    return floor + share * (schedule.max_lr - floor)


def _linear_shape(p: float) -> float:
    return 1.0 - p


def _cosine_shape(p: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * p))


def _one_minus_sqrt_shape(p: float) -> float:
    return 1.0 - math.sqrt(p)


DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": _linear_shape,
    "cosine": _cosine_shape,
    "1-sqrt": _one_minus_sqrt_shape,
}
_KINDS: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
    "inverse_sqrt": inverse_sqrt,
}
HORIZON_FREE = ("constant", "inverse_sqrt")  # decay_steps plays no part in them
KINDS = tuple(_KINDS)
