"""Progress of a running sweep: a line when a stage ends, and every half minute."""

import math
import time
from collections.abc import Callable

from orchestrator.cluster import gauges
from orchestrator.runs import journal
from orchestrator.sweep.report.pace import Now, Pace
from orchestrator.sweep.states import DONE, RUNNING, WAITING
from orchestrator.sweep.tree import Stage
from orchestrator.text import duration

INTERVAL_S = 30.0


class ProgressLines:
    """Prints the progress of a sweep: call `tick` often, and `stage_ended` with each stage.

    Args:
        pace: Steps that were made, and the time that is left.
        best: Returns the best trial so far and its loss; None if no trial is done.
    """

    def __init__(
        self,
        pace: Pace,
        best: Callable[[], tuple[str, float] | None],
    ) -> None:
        self.progress = pace.progress
        self.pace = pace
        self.best = best
        self.last = time.monotonic()
        self.asked = -math.inf  # when the estimate was last asked for

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
        """Print the estimate when it is due, and the progress if enough time has passed."""
        now = time.monotonic()
        if now - self.asked >= 1.0:
            self.asked = now
            comment = self.pace.comment()
            if comment is not None:
                print(comment, flush=True)
        if now - self.last >= INTERVAL_S:
            self._print_status()

    def _print_status(self) -> None:
        print(self.status(), flush=True)
        self.last = time.monotonic()

    def status(self) -> str:
        """Return one line: stages, trials, steps, the best trial, the time left. Set the gauges."""
        progress = self.progress
        tree = progress.tree
        states = [progress.states.by_stage[stage] for stage in tree.to_run]
        ended = [state for state in states if state not in (WAITING, RUNNING)]
        names = [c.name for c in progress.trials.values() if not c.is_probe]
        done = [name for name in names if progress.states.of_trial(name) == DONE]
        saved = tree.steps_asked - tree.steps_to_run
        now = self.pace.look()
        run = progress.steps_run + sum(now.live.values())
        parts = [
            f"stages {len(ended)}/{len(states)}",
            f"trials {len(done)}/{len(names)}",
            f"{run:,} of {tree.steps_to_run:,} steps run, {saved:,} saved",
        ]
        best = self.best()
        if best is not None:
            parts.append(f"best {best[0]} {best[1]:.4f}")
        if now.left_s is not None:
            parts.append(f"ETA {duration(now.left_s)}")
        self._set_gauges(now, run, None if best is None else best[1])
        return " | ".join(parts)

    def _set_gauges(self, now: Now, steps: int, best: float | None) -> None:
        folder = self.progress.folder
        last = [journal.last(folder.stage(stage)) or {} for stage in now.live]
        gauges.show(
            folder.name,
            step=steps,
            steps=self.progress.tree.steps_to_run,
            val_loss=best,
            tokens_per_second=sum(line.get("perf/tokens_per_sec", 0.0) for line in last),
            left_seconds=now.left_s,
        )
