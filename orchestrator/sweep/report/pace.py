"""How far a running sweep is, and how long it still takes: from the stages that run now, too."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.cost.correct import Correction
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.states import RUNNING
from orchestrator.workers import marks

LEAST_S = 2.0  # seconds of steps that are needed to tell their pace


@dataclass(frozen=True)
class Now:
    """State of a sweep at one moment.

    Attributes:
        live: Steps that each running stage has made in this attempt, by its id.
        left_s: Seconds until the end; None if unknown.
    """

    live: dict[str, int]
    left_s: float | None


class Pace:
    """Follows the steps of the running stages.

    Args:
        progress: State of the sweep's stages.
        slots: Number of stages that can run at the same time.
        step_s: Planned seconds per step, used until steps were seen.
        planned_s: Planned seconds of the sweep; None if unknown.
        clock: Returns seconds.
    """

    def __init__(
        self,
        progress: Progress,
        slots: int,
        step_s: float | None = None,
        planned_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.progress = progress
        self.slots = slots
        self.planned_step_s = step_s
        self.correction = Correction(planned_s)
        self.clock = clock
        self._began = clock()
        # Time and steps when steps of an attempt were first seen, by stage and attempt.
        self._first: dict[tuple[str, int], tuple[float, int]] = {}

    def look(self) -> Now:
        """Read how far the running stages are."""
        live = {}
        seconds = 0.0
        steps = 0
        now = self.clock()
        for stage, state in list(self.progress.states.by_stage.items()):
            if state != RUNNING:
                continue
            live[stage] = made = self._made(stage)
            if made > 0:
                attempt = stage, len(self.progress.begun[stage])
                since, first = self._first.setdefault(attempt, (now, made))
                seconds += now - since
                steps += made - first
        return Now(live, self._left_s(live, self._step_s(seconds, steps)))

    def correct(self) -> str | None:
        """Return a line with the corrected time once, after the first minute of training."""
        now = self.look()
        if not self._first or now.left_s is None:
            return None
        training_s = self.clock() - min(since for since, _ in self._first.values())
        return self.correction.line(training_s, self.clock() - self._began, now.left_s)

    def _made(self, stage: str) -> int:
        """Return the steps of a running stage in this attempt."""
        ranks = marks.read(self.progress.folder.stage(stage))
        return max(0, ranks[0].step - self._first_step(stage)) if ranks else 0

    def _first_step(self, stage: str) -> int:
        """Return the step from which this attempt at a stage started."""
        return max(self.progress.begun[stage][-1], self.progress.tree.by_id[stage].start)

    def _step_s(self, seconds: float, steps: int) -> float | None:
        """Return the seconds per step of the stages that have ended here and of those that run."""
        results = self.progress.stored.results
        for stage in self.progress.tree.to_run & results.keys():
            if results[stage].seconds:
                seconds += results[stage].seconds
                steps += results[stage].steps_run
        if steps == 0 or seconds < LEAST_S:
            return self.planned_step_s
        return seconds / steps

    def _left_s(self, live: dict[str, int], step_s: float | None) -> float | None:
        if step_s is None:
            return None
        tree = self.progress.tree
        steps = 0.0
        longest = 0.0
        for stage in self.progress.states.pending:
            cost = tree.cost(stage)
            done = 0
            if stage.id in live:  # an earlier attempt may have made some of its steps
                done = min(cost, self._first_step(stage.id) - stage.start + live[stage.id])
            steps += cost - done
            longest = max(longest, self.progress.states.remaining[stage.id] - done)
        return step_s * max(steps / self.slots, longest)
