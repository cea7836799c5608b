"""Reads what a run folder has for a replay: journal, attempts and valid checkpoints."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store as checkpoint
from orchestrator.checkpoint.format import Fingerprints
from orchestrator.config.experiment import Experiment
from orchestrator.config.steps import Steps
from orchestrator.errors import UnreadableError, UserError
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder, RunRecord
from orchestrator.sweep.records import read_spec


@dataclass(frozen=True)
class Stretch:
    """Steps to train again.

    Attributes:
        first: First step to compare.
        last: Last step to compare.
        begin: Step of the checkpoint from which the training starts; None: new weights.
    """

    first: int
    last: int
    begin: int | None

    @property
    def origin(self) -> str:
        """Where the training starts, in words."""
        if self.begin is None:
            return "step 0"
        return f"the checkpoint of step {self.begin:,}"

    def includes(self, step: int) -> bool:
        """Return whether the line and the checkpoint of `step` are compared."""
        is_trained = self.begin is None or step > self.begin
        return is_trained and self.first <= step <= self.last


class RecordedRun:
    """What a run folder has for a replay. Nothing in the folder is changed.

    Args:
        folder: Folder of the run or trial.

    Attributes:
        lines: Lines of the journal by step.
        record: Content of run.json; empty without one.
        damaged: Why checkpoints were skipped, one message per checkpoint.

    Raises:
        UserError: No checkpoint is valid. Only a checkpoint has the fingerprints of the data and
            numerics of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.lines = {line["step"]: line for line in journal.read(folder)}
        self.record = folder.read_record() or RunRecord()
        self.damaged: list[str] = []
        self._is_valid: dict[int, bool] = {}
        if next(self.valid_steps(), None) is None:
            reason = (
                f"{folder.path}: has no valid checkpoint, so its data and numerics are not known; "
                "nothing can be compared"
            )
            raise UserError("\n".join([reason, *self.damaged]))

    def is_valid(self, step: int) -> bool:
        """Return whether a checkpoint is valid. It is verified once."""
        if step not in self._is_valid:
            try:
                checkpoint.verify(self.folder.checkpoint(step))
                self._is_valid[step] = True
            except UnreadableError:
                raise
            except UserError as error:
                self.damaged.append(str(error))
                self._is_valid[step] = False
        return self._is_valid[step]

    def valid_steps(self) -> Iterator[int]:
        """Yield the steps of valid checkpoints, newest first."""
        return filter(self.is_valid, reversed(self.folder.checkpoint_steps()))

    def source(self, step: int) -> Path:
        """Return the checkpoint whose files describe how `step` was trained.

        It is the first valid one at or after `step`, else the last valid one before.
        """
        steps = self.folder.checkpoint_steps()
        later = [candidate for candidate in steps if candidate >= step]
        earlier = [candidate for candidate in reversed(steps) if candidate < step]
        return self.folder.checkpoint(next(filter(self.is_valid, later + earlier)))

    def fingerprints(self, step: int) -> Fingerprints:
        """Return the fingerprints of the data and numerics with which `step` was trained."""
        return checkpoint.read_manifest(self.source(step))["fingerprints"]

    def attempts(self) -> list[dict[str, Any]]:
        """Return the attempts whose steps are still part of the run, by first step.

        An attempt that resumed from an earlier step replaced the attempts that began at or after
        that step.
        """
        kept: list[dict[str, Any]] = []
        for attempt in self.record.get("attempts", []):
            while kept and kept[-1].get("from_step", 0) >= attempt.get("from_step", 0):
                kept.pop()
            kept.append(attempt)
        return kept

    def experiment(self, step: int) -> Experiment:
        """Return the experiment of the run folder, else that of the checkpoint for `step`."""
        if self.folder.experiment_file.is_file():
            return self.folder.read_experiment()
        return RunFolder(self.source(step)).read_experiment()

    def steps(self, experiment: Experiment) -> Steps:
        """Return the settings of every step."""
        # In the folder of a trial, `checkpoints` is a symlink to those of its last stage.
        spec = read_spec(RunFolder(self.folder.checkpoints.resolve().parent))
        if spec is not None:
            return spec.settings
        return experiment.steps()

    def stretch(self, steps: tuple[int | None, int | None] | None = None) -> Stretch:
        """Return which steps to train again.

        Args:
            steps: First and last step. None stands for the start and the end of the run. Without
                `steps`, the stretch goes from the second-to-last checkpoint to the end. If there is
                only one checkpoint, it begins at step 0.

        Raises:
            UserError: The run does not have these steps, or stored nothing that can be compared.
        """
        end = max([*self.lines, next(self.valid_steps())])
        if steps is None:
            first = next(islice(self.valid_steps(), 1, None), 0)
            last = end
        else:
            first = steps[0] or 0
            last = end if steps[1] is None else steps[1]
        if not 0 <= first < last <= end:
            raise UserError(
                f"--steps: {first}:{last} is not within this run, which has steps 0:{end}"
            )
        begin = next((step for step in self.valid_steps() if step <= first), None)
        found = Stretch(first, last, begin)
        if not any(map(found.includes, [*self.lines, *self.folder.checkpoint_steps()])):
            raise UserError(
                f"--steps: nothing was logged in steps {first}:{last}, and they have no "
                f"checkpoint; {self.folder.journal_file} has the steps that were logged"
            )
        return found
