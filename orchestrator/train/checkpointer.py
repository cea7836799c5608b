"""Writes checkpoints in a background thread while training goes on.

The training thread only copies the state into buffers in memory. The buffers are allocated once and
hold one state, so a save waits until the previous checkpoint is on disk. Of several ranks, each
copies and writes a part, and rank 0 completes the checkpoint (`ranks/writing.py`).
"""

import contextlib
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from orchestrator import files
from orchestrator.checkpoint import store, tensor_file
from orchestrator.checkpoint.format import part_name
from orchestrator.errors import NO_ROOM, NoRoomError
from orchestrator.folders import check_held
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.train.numerics import Worker
from orchestrator.train.ranks import writing

# For the last checkpoint, after an error: another rank may be gone, or wait for this one.
LEAVES_S = 10.0


class Checkpointer:
    """Saves checkpoints of a run; keeps the newest ones and the best one.

    If the disk is full, training goes on with the last checkpoint that was written: an event is
    recorded, and the next save tries again. Only if the last save failed, `wait` raises an error.

    The end of a `with` block waits for the last checkpoint.

    Args:
        folder: Folder of the run.
        keep: Number of newest checkpoints that stay, besides the one with the lowest val loss.
        lines: Journal of the run.
        worker: This process. All ranks must have a checkpointer and call its methods.
    """

    def __init__(
        self, folder: RunFolder, keep: int, lines: Journal, worker: Worker | None = None
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.lines = lines
        self.worker = worker or Worker()
        self._tell = writing.messages(self.worker)
        self._files: dict[str, tensor_file.TensorFile] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[NoRoomError | None] | None = None
        self._not_written: NoRoomError | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, tensor_file.TensorsOrSlices],
        texts: Mapping[str, str],
        facts: Mapping[str, Any],
    ) -> None:
        """Copy the state and return; a thread writes the copy.

        Args:
            step: Number of updates done.
            tensors: Tensors by name of their group ("model", "optimizer") and own name. Slices are
                held by this rank alone; tensors are the same on all ranks.
            texts: Content of the text files by file name. Those of rank 0 are written.
            facts: Further fields of the manifest, also of rank 0.

        Raises:
            OSError: The previous checkpoint could not be written, for another reason than a full
                disk.
        """
        self._finish_pending()
        if not self.worker.is_main:
            self._files = tensor_file.fill(self._files, self._own(tensors))
            parts = store.parts_of(self._files, {})
            self._pending = self._thread.submit(self._follow, parts)
            return
        disk_full = self.lines.catch_up()
        if disk_full is not None:
            # Lines of the journal are only in memory, so no checkpoint is written: a run that is
            # killed after it would resume after these lines and lose them.
            self._not_written = self._report_full_disk(step, disk_full)
            self._pending = self._thread.submit(self._skip, self._not_written)
            return
        self._files = tensor_file.fill(self._files, self._own(tensors))
        texts = dict(texts)
        if self.lines.file.exists():
            # The copy restores lines that are lost later: these steps are not trained again.
            texts[self.lines.file.name] = journal.read_text(self.folder)
        parts = store.parts_of(self._files, texts)
        self._pending = self._thread.submit(self._commit, step, parts, facts)

    def _own(
        self, tensors: Mapping[str, tensor_file.TensorsOrSlices]
    ) -> Mapping[str, tensor_file.TensorsOrSlices]:
        """Return what this rank writes, by name of the file."""
        rank, ranks = self.worker.rank, self.worker.world_size
        if ranks == 1:
            return tensors
        return {
            part_name(group, rank, ranks): tensor_file.own_share(content, rank, ranks)
            for group, content in tensors.items()
        }

    def wait(self) -> None:
        """Wait until everything that was saved is on disk.

        Raises:
            NoRoomError: The disk was full when the last checkpoint was to be written.
            OSError: As in `save`.
        """
        self._finish_pending()
        if self._not_written is not None:
            raise self._not_written

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for the thread and end it; print its error.

        Args:
            timeout_s: Leave the thread alone after this time; the process ends soon.
        """
        try:
            self._finish_pending(timeout_s)
        except Exception as error:
            reason = "another rank does not answer" if isinstance(error, TimeoutError) else error
            message = f"{self.folder.checkpoints}: the last checkpoint was not written: {reason}"
            print(message, file=sys.stderr, flush=True)
        self._thread.shutdown(wait=timeout_s is None)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # If training failed, an error of this class must not replace that error.
            if kind is None:
                self.wait()
        finally:
            self.close(LEAVES_S if kind is not None and self.worker.world_size > 1 else None)

    def _finish_pending(self, timeout_s: float | None = None) -> None:
        pending = self._pending
        self._pending = None
        if pending is not None:
            self._not_written = pending.result(timeout_s)

    def _commit(
        self, step: int, parts: store.Parts, facts: Mapping[str, Any]
    ) -> NoRoomError | None:
        """Write one checkpoint; return an error if the disk is full."""
        try:
            if self.worker.world_size > 1:
                folder = self.folder.checkpoints
                writing.lead(folder, step, parts, facts, self._prepare, self._tell)
            else:
                self._prepare()
                store.commit(self.folder.checkpoints, step, parts, facts)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return self._report_full_disk(step, error)
        with contextlib.suppress(OSError):  # the disk is full: the next commit tries again
            os.close(files.opener(self.folder.checkpointed_file, os.O_WRONLY | os.O_CREAT))
        store.prune(self.folder.checkpoints, self.keep)
        return None

    def _prepare(self) -> None:
        check_held(self.folder.checkpoints)
        # After a power failure, the journal must have all lines up to the checkpoint.
        journal.sync(self.folder)

    def _follow(self, parts: store.Parts) -> None:
        writing.follow(self.folder.checkpoints, parts, self._tell, self.worker.has_folder)

    def _skip(self, error: NoRoomError) -> NoRoomError:
        writing.skip(self._tell)
        return error

    def _report_full_disk(self, step: int, error: OSError) -> NoRoomError:
        steps = self.folder.checkpoint_steps()
        last = f"the last one is of step {steps[-1]}" if steps else "there is none yet"
        message = (
            f"{self.folder.checkpoints}: no room for the checkpoint of step {step} "
            f"({error.strerror}); {last}"
        )
        print(f"{message}; training goes on", flush=True)
        events.note(self.folder, "disk_full", message, step=step)
        return NoRoomError(
            f"{message}. Free some space there and run the same command again: it continues from "
            "the last checkpoint"
        )
