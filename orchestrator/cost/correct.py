"""The time that a run or a sweep takes, given again from its first minute of training.

The load of the machine may have changed since the plan was made.
"""

from orchestrator.text import duration

AFTER_S = 60.0  # seconds of training after which the time is given again
TOLERANCE = 0.1  # a plan that is off by less is not corrected


class Correction:
    """Corrects the planned time once.

    Args:
        planned_s: Planned seconds of the whole run; None if unknown.

    Attributes:
        corrected_s: Seconds of the whole run as corrected; None before that, and if the plan holds.
    """

    def __init__(self, planned_s: float | None) -> None:
        self.planned_s = planned_s
        self.corrected_s: float | None = None
        self._is_due = True

    def line(self, training_s: float, elapsed_s: float, left_s: float) -> str | None:
        """Return a line for the user once the first minute of training is over; else None.

        Args:
            training_s: Seconds since the first step.
            elapsed_s: Seconds since the start.
            left_s: Seconds that the remaining steps take at the pace since the first step.
        """
        if not self._is_due or training_s < AFTER_S or left_s <= 0:
            return None
        self._is_due = False
        total_s = elapsed_s + left_s
        if self.planned_s is None:
            self.corrected_s = total_s
            return f"expected: {duration(total_s)} in all, from the first minute of training"
        if abs(total_s / self.planned_s - 1) <= TOLERANCE:
            return None
        self.corrected_s = total_s
        return (
            f"expected: {duration(total_s)} in all, by the steps of the first minute, and not "
            f"{duration(self.planned_s)}: the machine is not as it was before"
        )
