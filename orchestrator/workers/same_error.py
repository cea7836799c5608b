"""Ends a run whose workers fail again and again with the same error.

This counts in Ray's controller and not in the run folder, which may be what cannot be written to.
"""

import traceback
from typing import Any

from ray.train import UserCallback

from orchestrator.runs.folder import RunFolder
from orchestrator.workers.diagnose import ending_of_tracebacks


class SameErrorAgain(Exception):  # noqa: N818
    """The workers failed with the same error too often. The message is that error."""


class SameErrorLimit(UserCallback):
    """Counts failures in a row that have an error in common and between which no step was saved.

    A mistake of the user ends the run at the first failure: the folder in which a worker records it
    may be another one than that of the driver.

    Args:
        folder: Folder of the run.
        limit: Number of failures that end the run.
    """

    def __init__(self, folder: RunFolder, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._step: int | None = None
        self._errors: set[str] = set()  # of all failures that are counted
        self._count = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise SameErrorAgain at the last failure. Ray then does not start the workers again."""
        # They have no traceback: Ray passes on the errors as they were raised.
        errors = {
            "".join(traceback.format_exception_only(error)).strip()
            for error in worker_exceptions.values()
        }
        for error in sorted(errors):
            ending = ending_of_tracebacks(self._folder, [error], len(worker_exceptions))
            if ending.cause == "exception" and ending.kind == "user":
                raise SameErrorAgain(error)
        step = self._saved_step()
        common = errors & self._errors
        if step == self._step and common:
            self._errors = common
            self._count += 1
        else:
            self._step, self._errors, self._count = step, errors, 1
        if self._count >= self._limit:
            raise SameErrorAgain(min(self._errors))

    def _saved_step(self) -> int | None:
        try:
            return max(self._folder.checkpoint_steps(), default=0)
        except OSError:
            return self._step
