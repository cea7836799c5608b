"""What a person sees while a sweep runs: one table that redraws itself, or steady lines where nobody can redraw.

Eats the keeper's books and the journals of the running stages; yields text.
"""

import sys
import time
from collections.abc import Callable

from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep.progress import Keeper
from orchestrator.sweep.stage_states import DONE, RUNNING, WAITING
from orchestrator.sweep.tree import Stage
from orchestrator.text import duration

REDRAW_S, STEADY_S = 0.5, 30.0
SHOWN = 12  # running stages at most


class Table:
    """`stage_ended` and `tick` are the keeper's `watch` and `tick`; `books` is the keeper, set before they are called.

    Args:
        best: `(trial, loss)` of the best trial so far, or None.
        seconds_per_step: of one stage, expected; the stages that have run correct it.
    """

    def __init__(
        self,
        slots: int,
        best: Callable[[], tuple[str, float] | None],
        seconds_per_step: float | None = None,
        out=None,
    ):
        self.slots, self.best, self.expected = slots, best, seconds_per_step
        self.out = out or sys.stdout
        self.redraws = self.out.isatty()
        self.drawn, self.last = 0, time.monotonic()
        self.books: Keeper | None = None

    def stage_ended(self, stage: Stage) -> None:
        state = self.books.progress.state[stage.id]
        if state == WAITING:
            what = self.books.waits[stage.id]
        elif state == DONE:
            what = " ".join(["done", *(f"| {name} has ended" for name in stage.ends)])
        else:
            what = f"{state}: {self.books.reasons.get(stage.id, '')}"
        self._clear()
        print(
            f"steps {stage.start:,}–{stage.stop:,} of {_of(stage)}: {what}",
            file=self.out,
            flush=True,
        )
        if not self.redraws:
            print(self.status(), file=self.out, flush=True)
        self.last = time.monotonic()

    def tick(self) -> None:
        if time.monotonic() - self.last < (REDRAW_S if self.redraws else STEADY_S):
            return
        self.last = time.monotonic()
        self._clear()
        lines = [self.status(), *self.running()] if self.redraws else [self.status()]
        print("\n".join(lines), file=self.out, flush=True)
        self.drawn = len(lines) if self.redraws else 0

    def status(self) -> str:
        """One line: stages, trials, steps, the best so far, when it ends."""
        k = self.books
        states = [k.progress.state[i] for i in k.plan.to_run]
        names = [c.name for c in k.candidates.values() if not c.probe]
        done = sum(k.progress.trial(name) == DONE for name in names)
        parts = [
            f"stages {sum(s not in (WAITING, RUNNING) for s in states)}/{len(states)}",
            f"trials {done}/{len(names)}",
            f"{k.steps_run:,} of {k.plan.steps_to_run:,} steps run, {k.plan.steps_asked - k.plan.steps_to_run:,} saved",
        ]
        if best := self.best():
            parts.append(f"best {best[0]} {best[1]:.4f}")
        if (left := self.seconds_left()) is not None:
            parts.append(f"ETA {duration(left)}")
        return " | ".join(parts)

    def running(self) -> list[str]:
        """A line for each stage that runs now: where it is, for how many trials."""
        lines = []
        for stage in self.books.plan.stages:
            if self.books.progress.state[stage.id] == RUNNING:
                folder = self.books.stages / stage.id
                last = journal.last(RunFolder(folder)) or {"step": stage.start}
                loss = f"loss {last['train/loss']:.4f}" if "train/loss" in last else ""
                where = (
                    f"  {stage.start:>7,}–{stage.stop:<7,} at {max(last['step'], stage.start):<7,}"
                )
                what = loss if (folder / ".writer").exists() else "waiting for a worker"
                lines.append(f"{where} {what:12} {_of(stage)}"[:119])
        return lines[:SHOWN] + (
            [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        )

    def seconds_left(self) -> float | None:
        k = self.books
        results = [
            r
            for i, r in k.stored.results.items()
            if i in k.plan.to_run and r["steps_run"] and r["seconds"]
        ]
        each = (
            sum(r["seconds"] for r in results) / sum(r["steps_run"] for r in results)
            if results
            else self.expected
        )
        if each is None:
            return None
        left = [k.plan.cost(s) for s in k.progress.pending]
        roots = [k.progress.remaining[s.id] for s in k.progress.pending]
        return each * max(sum(left) / self.slots, max(roots, default=0))

    def _clear(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="", file=self.out)
            self.drawn = 0


def _of(stage: Stage) -> str:
    return stage.trials[0] + (f" and {len(stage.trials) - 1} more" if len(stage.trials) > 1 else "")
