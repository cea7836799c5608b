"""Where a process trains its stages."""

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestrator.cluster.nodes import folder_problem
from orchestrator.runs.folder import SweepFolder
from orchestrator.workers.attempts import record_failure

if TYPE_CHECKING:
    from orchestrator.train.numerics import Worker

Call = Callable[..., Any]  # calls a method of the desk: its name and its arguments


class Place:
    """Trains stages in the folder of the sweep. `Away` sends files in the methods that are empty.

    Args:
        sweep: The folder.
        call: Calls the desk, so that it ends an earlier turn on another machine; None: there is no
            desk.

    Attributes:
        sweep: The folder of the sweep, or one of this machine with the stages of this process.
    """

    def __init__(self, sweep: SweepFolder, call: Call | None) -> None:
        self.sweep = sweep
        self._call = call

    def problem(self, stage: str) -> str | None:
        """Return why a stage cannot be trained here; None if it can."""
        return folder_problem(self.sweep.stage(stage).path)

    def begin(self, stage: str) -> bool:
        """Prepare the folder of a stage. Return False if the stage has its result."""
        return self._call is None or self._call("begin", stage, uuid.uuid4().hex, False) is not None

    def sync(self) -> None:
        """Send all complete files and lines to the folder of the sweep."""

    def finish(self) -> None:
        """Send the rest, then the result, after the stage has ended."""

    def give_up(self) -> None:
        """Send the rest as far as possible, after an error or if the stage was stopped."""

    def failed(self, stage: str, worker: "Worker", error: Exception) -> None:
        """Record the error of a stage that was given up."""
        record_failure(self.sweep.stage(stage), worker, error)

    def close(self) -> None:
        """End: this process trains no more stages."""
