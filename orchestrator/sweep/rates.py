"""Learning rate of each step of a trial in a sweep.

A trial may follow the schedule of another run up to the step at which it branches off, and a probe
ends with an anneal to zero.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from model.schedule import Schedule, learning_rate


@dataclass(frozen=True)
class Rates:
    """Learning rate as a function of the 0-based step.

    Attributes:
        schedule: The schedule from step `splice` on.
        before: The schedule before step `splice`; None: `schedule` at all steps.
        splice: First step of `schedule`.
        anneal_at: First step of a straight line to zero; None: no anneal.
        anneal_steps: Length of that line. The first of its steps has the full rate and the last one
            1/anneal_steps of it, as in wsd's linear decay to a floor of zero.
    """

    schedule: Schedule
    before: Schedule | None = None
    splice: int = 0
    anneal_at: int | None = None
    anneal_steps: int = 1

    def __call__(self, step: int) -> float:
        """Return the learning rate of the update made at `step`."""
        if self.anneal_at is None or step < self.anneal_at:
            return self._rate_before_anneal(step)
        share = 1.0 - (step - self.anneal_at) / self.anneal_steps
        return self._rate_before_anneal(self.anneal_at) * share

    def _rate_before_anneal(self, step: int) -> float:
        if self.before is not None and step < self.splice:
            return learning_rate(self.before, step)
        return learning_rate(self.schedule, step)

    def first(self, steps: int) -> np.ndarray:
        """Return the learning rates of steps 0 to steps - 1, (steps,) float64."""
        return np.array([self(step) for step in range(steps)], np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for `from_json`."""
        return asdict(self)


def from_json(stored: dict[str, Any]) -> Rates:
    """Return the rates that `Rates.to_json` stored."""
    fields = dict(stored)
    fields["schedule"] = Schedule(**stored["schedule"])
    if stored["before"]:
        fields["before"] = Schedule(**stored["before"])
    return Rates(**fields)
