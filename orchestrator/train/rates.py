"""The learning rate of every step of a trial: a schedule's, or one that leaves another run's or ends in a probe's anneal.

Eats schedules; yields numbers. Plain values in and out of JSON, so that a stage carries its rates wherever it runs.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from model.schedule import Schedule, learning_rate


@dataclass(frozen=True)
class Rates:
    """`schedule` at every step; but `before` up to step `splice`, and from step `anneal_at` on a straight line to zero.

    The first annealed step still has its full rate and the last of `anneal_steps` has 1/anneal_steps of it, as wsd's
    linear decay with a floor of zero.
    """

    schedule: Schedule
    before: Schedule | None = None
    splice: int = 0
    anneal_at: int | None = None
    anneal_steps: int = 1

    def __call__(self, step: int) -> float:
        if self.anneal_at is not None and step >= self.anneal_at:
            return self._planned(self.anneal_at) * (
                1.0 - (step - self.anneal_at) / self.anneal_steps
            )
        return self._planned(step)

    def _planned(self, step: int) -> float:
        return learning_rate(
            self.before if self.before and step < self.splice else self.schedule, step
        )

    def first(self, steps: int) -> np.ndarray:
        """The rates of steps 0 … steps - 1, float64."""
        return np.fromiter((self(step) for step in range(steps)), np.float64, steps)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(stored: dict[str, Any]) -> Rates:
    before = stored["before"]
    return Rates(
        **{
            **stored,
            "schedule": Schedule(**stored["schedule"]),
            "before": Schedule(**before) if before else None,
        }
    )
