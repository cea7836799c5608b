"""The writer of a run's checkpoints: a copy in memory on the training thread, everything else in a thread of its own.

Eats the tensors, texts and facts of a state; yields a committed checkpoint a little later. The copies are made in buffers
that are kept, so that a run pays for them once; they hold one state, so a save waits for the one before it.
"""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.checkpoint import tensor_file
from orchestrator.errors import NO_ROOM, UserError
from orchestrator.runs import events, journal


class Writer:
    """Commits to `directory` and prunes it down to the latest `keep` and the best. As a context it ends with `wait`.

    Where there is no room for a checkpoint, training goes on with the last good one: the event is noted in `run_dir`, the
    next save tries again, and only `wait` raises, if it was the last.
    """

    def __init__(self, directory: Path, keep: int, run_dir: Path):
        self.directory, self.keep, self.run_dir = Path(directory), keep, Path(run_dir)
        self._files: dict[str, tensor_file.TensorFile] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[UserError | None] | None = None
        self._unwritten: UserError | None = None

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, torch.Tensor]],
        texts: dict[str, str],
        facts: dict[str, Any],
    ) -> None:
        """Copy the state, and have it committed while the caller goes on; arguments as `checkpoint.save`'s.

        Raises:
            OSError and whatever else the commit before this one ended with, except for want of room.
        """
        self._join()
        self._files = tensor_file.fill(self._files, tensors)
        self._pending = self._thread.submit(
            self._commit, step, checkpoint.parts_of(self._files, texts), facts
        )

    def leave_out(self, step: int, error: OSError) -> None:
        """`save`, where it is known that there is no room."""
        self._join()
        self._unwritten = self._no_room(step, error)

    def wait(self) -> None:
        """Until everything that was saved is committed.

        Raises:
            UserError: there was no room for the last one. Besides, what `save` raises.
        """
        self._join()
        if self._unwritten:
            raise self._unwritten

    def close(self) -> None:
        """End the thread once it has committed what was saved; a failure that nobody will ask for is printed."""
        try:
            self._join()
        except Exception as error:
            print(
                f"{self.directory}: the last checkpoint was not written: {error}",
                file=sys.stderr,
                flush=True,
            )
        self._thread.shutdown()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    def _join(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            self._unwritten = pending.result()

    def _commit(
        self, step: int, parts: dict[str, bytes | memoryview], facts: dict[str, Any]
    ) -> UserError | None:
        """Returns what the user is told where there was no room."""
        try:
            journal.sync(self.run_dir)
            checkpoint.commit(self.directory, step, parts, facts)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return self._no_room(step, error)
        checkpoint.prune(self.directory, self.keep)
        return None

    def _no_room(self, step: int, error: OSError) -> UserError:
        last = max(checkpoint.steps(self.directory), default=None)
        kept = "none is there yet" if last is None else f"the last one is of step {last}"
        message = f"{self.directory}: no room for the checkpoint of step {step} ({error.strerror}); {kept}"
        print(f"{message}; training goes on", flush=True)
        events.note(self.run_dir, "disk_full", message, step=step)
        return UserError(
            f"{message}. Free some room there and run the same command again: it goes on from the last one"
        )
