"""A run as it stands on disk, for whoever makes a part of it again: its lines, its whole checkpoints, its attempts.

Eats a run's folder, which it only reads; a checkpoint is verified when it is first asked for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from model.schedule import learning_rate
from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError
from orchestrator.files import read_json
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep.records import read_spec
from orchestrator.train import rates


@dataclass
class Recorded:
    """A run as it stands on disk. A checkpoint is verified when it is first asked for."""

    run_dir: Path
    lines: dict[int, dict[str, Any]]  # of the journal, by step
    facts: dict[str, Any]  # run.json
    passed_over: list[str] = field(default_factory=list)
    _valid: dict[int, bool] = field(default_factory=dict)

    @classmethod
    def read(cls, run_dir: Path) -> "Recorded":
        """Raises UserError where no checkpoint is whole: nothing else tells what the run's numerics and data were."""
        lines = {line["step"]: line for line in journal.read(RunFolder(run_dir))}
        found = cls(run_dir, lines, read_json(run_dir / "run.json") or {})
        if next(found.whole(), None) is None:
            raise UserError(
                "\n".join(
                    [
                        f"{run_dir}: holds no whole checkpoint, and without one nothing tells on which data and "
                        f"numerics it ran; nothing can be compared",
                        *found.passed_over,
                    ]
                )
            )
        return found

    def standing(self) -> list[int]:
        return checkpoint.steps(self.run_dir / "checkpoints")

    def path(self, step: int) -> Path:
        return checkpoint.path_of(self.run_dir / "checkpoints", step)

    def is_valid(self, step: int) -> bool:
        if step not in self._valid:
            try:
                checkpoint.verify(self.path(step))
                self._valid[step] = True
            except UserError as error:
                self.passed_over.append(str(error))
                self._valid[step] = False
        return self._valid[step]

    @property
    def end(self) -> int:
        """The last step that left something to compare."""
        return max([*self.lines, next(self.whole())])

    def whole(self) -> Iterator[int]:
        """The checkpoints that are as they were written, the latest first."""
        return filter(self.is_valid, reversed(self.standing()))

    def witness(self, step: int) -> int:
        """The checkpoint that tells how step `step` was made: the first from there on, else the last before."""
        standing = self.standing()
        after = (s for s in standing if s >= step and self.is_valid(s))
        return next(after, None) or next(
            s for s in reversed(standing) if s < step and self.is_valid(s)
        )

    def attempts(self) -> list[dict[str, Any]]:
        """The attempts whose steps survived, by rising `from_step`: one that went further back undid those after it."""
        kept: list[dict[str, Any]] = []
        for attempt in self.facts.get("attempts") or []:
            while kept and kept[-1].get("from_step", 0) >= attempt.get("from_step", 0):
                kept.pop()
            kept.append(attempt)
        return kept

    def rates(self, experiment: Experiment) -> Callable[[int], float]:
        """Of a sweep's trial, whose checkpoints are those of its last stage, the stage's; else the schedule's."""
        order = read_spec(RunFolder((self.run_dir / "checkpoints").resolve().parent))
        return (
            rates.from_json(order.rates)
            if order
            else partial(learning_rate, experiment.lr_schedule())
        )
