"""Progress of a running sweep: a table that is redrawn in a terminal, or lines in a log file.

In a terminal, the table has one line for the sweep and one for each running stage. In a log file,
the line of the sweep is written when a stage ends, and every half minute.
"""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from orchestrator.runs import journal
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.states import DONE, RUNNING, WAITING
from orchestrator.sweep.tree import Stage
from orchestrator.text import duration

REDRAW_S = 0.5
STEADY_S = 30.0
SHOWN = 12  # running stages in the table, at most
WIDTH = 119


class Table:
    """Prints the progress of a sweep: call `tick` often, and `stage_ended` with each stage.

    Args:
        progress: State of the sweep's stages.
        slots: Number of stages that can run at the same time.
        best: Returns the best trial so far and its loss; None if no trial is done.
        seconds_per_step: Estimated time of a step, used until a stage has ended.
        out: Where to print; the default is standard output.
    """

    def __init__(
        self,
        progress: Progress,
        slots: int,
        best: Callable[[], tuple[str, float] | None],
        seconds_per_step: float | None = None,
        out: TextIO | None = None,
    ) -> None:
        self.progress = progress
        self.slots = slots
        self.best = best
        self.seconds_per_step = seconds_per_step
        self.out = out or sys.stdout
        self.redraws = self.out.isatty()
        self.drawn = 0  # lines of the table on the terminal now
        self.last = time.monotonic()

    def stage_ended(self, stage: Stage) -> None:
        """Print how a stage ended, above the table."""
        state = self.progress.states.by_stage[stage.id]
        if state == WAITING:
            outcome = self.progress.wait_reasons[stage.id]
        elif state == DONE:
            outcome = " ".join(["done", *(f"| {name} has ended" for name in stage.ends)])
        else:
            outcome = f"{state}: {self.progress.stage_reason(stage.id) or ''}"
        lines = [f"steps {stage.start:,}–{stage.stop:,} of {_trials_of(stage)}: {outcome}"]
        if not self.redraws:
            lines.append(self.status())
        self._print(lines)

    def tick(self) -> None:
        """Print the progress if enough time has passed."""
        interval = REDRAW_S if self.redraws else STEADY_S
        if time.monotonic() - self.last < interval:
            return
        if self.redraws:
            lines = [self.status(), *self.running()]
            self._print(lines)
            self.drawn = len(lines)
        else:
            self._print([self.status()])

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

    def running(self) -> list[str]:
        """Return a line for each running stage: its steps, its loss, its trials."""
        states = self.progress.states.by_stage
        stages = [s for s in self.progress.tree.stages if states[s.id] == RUNNING]
        lines = [self._running_line(stage) for stage in stages[:SHOWN]]
        if len(stages) > SHOWN:
            lines.append(f"  … and {len(stages) - SHOWN} more")
        return lines

    def _running_line(self, stage: Stage) -> str:
        folder = self.progress.folder.stage(stage.id)
        last = journal.last(folder) or {"step": stage.start}
        step = max(last["step"], stage.start)
        if not folder.writer_lock.exists():
            state = "waiting for a worker"
        else:
            state = f"loss {last['train/loss']:.4f}" if "train/loss" in last else ""
        steps = f"{stage.start:>7,}–{stage.stop:<7,} at {step:<7,}"
        return f"  {steps} {state:12} {_trials_of(stage)}"[:WIDTH]

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

    def _print(self, lines: list[str]) -> None:
        """Print lines in place of the table on the terminal."""
        erase = f"\x1b[{self.drawn}F\x1b[J" if self.drawn else ""
        print(erase + "\n".join(lines), file=self.out, flush=True)
        self.drawn = 0
        self.last = time.monotonic()


def _trials_of(stage: Stage) -> str:
    first, *others = stage.trials
    return f"{first} and {len(others)} more" if others else first
