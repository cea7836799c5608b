"""Progress of a running sweep: a line when a stage ends, and every half minute."""

import time
from collections.abc import Callable

from orchestrator.sweep.progress import Progress
from orchestrator.sweep.states import DONE, RUNNING, WAITING
from orchestrator.sweep.tree import Stage
from orchestrator.text import duration

INTERVAL_S = 30.0


class ProgressLines:
    """Prints the progress of a sweep: call `tick` often, and `stage_ended` with each stage.

    Args:
        progress: State of the sweep's stages.
        slots: Number of stages that can run at the same time.
        best: Returns the best trial so far and its loss; None if no trial is done.
        seconds_per_step: Estimated time of a step, used until a stage has ended.
    """

    def __init__(
        self,
        progress: Progress,
        slots: int,
        best: Callable[[], tuple[str, float] | None],
        seconds_per_step: float | None = None,
    ) -> None:
        self.progress = progress
        self.slots = slots
        self.best = best
        self.seconds_per_step = seconds_per_step
        self.last = time.monotonic()

    def stage_ended(self, stage: Stage) -> None:
        """Print how a stage ended, and the progress."""
        state = self.progress.states.by_stage[stage.id]
        if state == WAITING:
            outcome = self.progress.wait_reasons[stage.id]
        elif state == DONE:
            outcome = " ".join(["done", *(f"| {name} has ended" for name in stage.ends)])
        else:
            outcome = f"{state}: {self.progress.stage_reason(stage.id) or ''}"
        first, *others = stage.trials
        trials = f"{first} and {len(others)} more" if others else first
        print(f"steps {stage.start:,}–{stage.stop:,} of {trials}: {outcome}")
        self._print_status()

    def tick(self) -> None:
        """Print the progress if enough time has passed."""
        if time.monotonic() - self.last >= INTERVAL_S:
            self._print_status()

    def _print_status(self) -> None:
        print(self.status(), flush=True)
        self.last = time.monotonic()

    def status(self) -> str:
        """Return one line: stages, trials, steps, the best trial, the time left."""
        progress = self.progress
        tree = progress.tree
        states = [progress.states.by_stage[stage] for stage in tree.to_run]
        ended = [state for state in states if state not in (WAITING, RUNNING)]
        names = [c.name for c in progress.trials.values() if not c.is_probe]
        done = [name for name in names if progress.states.of_trial(name) == DONE]
        saved = tree.steps_asked - tree.steps_to_run
        parts = [
            f"stages {len(ended)}/{len(states)}",
            f"trials {len(done)}/{len(names)}",
            f"{progress.steps_run:,} of {tree.steps_to_run:,} steps run, {saved:,} saved",
        ]
        best = self.best()
        if best is not None:
            parts.append(f"best {best[0]} {best[1]:.4f}")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"ETA {duration(left)}")
        return " | ".join(parts)

    def seconds_left(self) -> float | None:
        """Return an estimate from the stages that have run, else from `seconds_per_step`."""
        progress = self.progress
        each = self.seconds_per_step
        results = [
            r for stage, r in progress.stored.results.items() if stage in progress.tree.to_run
        ]
        results = [r for r in results if r.steps_run and r.seconds]
        if results:
            each = sum(r.seconds for r in results) / sum(r.steps_run for r in results)
        if each is None:
            return None
        pending = progress.states.pending
        steps_per_slot = sum(progress.tree.cost(s) for s in pending) / self.slots
        longest_path = max((progress.states.remaining[s.id] for s in pending), default=0)
        return each * max(steps_per_slot, longest_path)
