"""The time that a run or a sweep takes, given again after its first steps and its first minute.

The load of the machine may have changed since the plan was made, or the plan was wrong.
"""

from orchestrator.text import duration

AFTER_S = 60.0  # a job of this length tells how long a step takes
DUE_S = (5.0, AFTER_S)  # seconds of training after which the time is given again
TOLERANCE = 0.1  # a time that is off by less is not corrected


class Correction:
    """Corrects the planned time.

    Args:
        planned_s: Planned seconds of the whole run; None if unknown.

    Attributes:
        corrected_s: Seconds of the whole run as last corrected; None if the plan holds.
    """

    def __init__(self, planned_s: float | None) -> None:
        self.planned_s = planned_s
        self.corrected_s: float | None = None
        self._due: tuple[float, ...] = DUE_S

    def line(self, training_s: float, elapsed_s: float, left_s: float) -> str | None:
        """Return a line for the user if a correction is due and the time is another; else None.

        Args:
            training_s: Seconds since the first step.
            elapsed_s: Seconds since the start.
            left_s: Seconds that the remaining steps take at the pace since the first step.
        """
        if not self._due or training_s < self._due[0] or left_s <= 0:
            return None
        self._due = tuple(due for due in self._due if due > training_s)
        before_s = self.corrected_s or self.planned_s
        assert before_s is not None
        total_s = elapsed_s + left_s
        if abs(total_s / before_s - 1) <= TOLERANCE:
            return None
        self.corrected_s = total_s
        return (
            f"expected: {duration(total_s)} in all, by the steps so far, and not "
            f"{duration(before_s)}"
        )
