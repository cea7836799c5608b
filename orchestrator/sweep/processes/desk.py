"""Gives the files of a stage to another machine, and takes those that it has completed.

Files come in the order in which a restart can trust them: the lines of the journal before the
checkpoint that was written after them, and the result last. A checkpoint gets its name when all of
its files are here.

One process at a time has the turn to train a stage. `begin` ends the turn of the process before it,
which may still run: perhaps its machine was only cut off from the network.
"""

import contextlib
import errno
import json
import os
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import files, folders, own_code
from orchestrator.checkpoint import folders as checkpoint_folders
from orchestrator.checkpoint import store
from orchestrator.checkpoint.format import path_of, step_of, verify
from orchestrator.runs import events, journal, lock, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.records import parse_result, read_spec
from orchestrator.sweep.stage import begin_folder, has_result
from orchestrator.sweep.states import DONE
from orchestrator.workers.attempts import store_failure
from orchestrator.workers.diagnose import ending_of_tracebacks

Piece = tuple[str, int, bytes]  # path in the folder of the stage, first byte, content from there on


class LostTurnError(RuntimeError):
    """Another process has begun the stage, or the desk was started again."""


@dataclass(frozen=True)
class Handed:
    """What a stage begins with.

    Attributes:
        files: Content of its small files, by name.
        step: Step of its newest valid checkpoint; None: it has none.
        stop: Why the sweep was asked to stop; None if it was not.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    step: int | None = None
    stop: str | None = None


@dataclass
class _Turn:
    """The turn of a process to train a stage.

    Attributes:
        token: Tells it from other turns.
        keep: `train.keep`.
        incoming: Folder of the checkpoint that the process is sending.
        held: The lock of the stage, if the process is on another machine.
    """

    token: str
    keep: int
    incoming: Path | None = None
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


class Desk:
    """Serves all stages of a sweep, from several threads.

    Args:
        folder: Folder of the sweep.
        code: The user's models and optimizers.
    """

    def __init__(self, folder: Path, code: list[own_code.Source]) -> None:
        own_code.register(code)
        self.folder = SweepFolder(folder)
        self._turns: dict[str, _Turn] = {}
        self._last_tokens: dict[str, str] = {}
        self._locks: dict[str, threading.RLock] = defaultdict(threading.RLock)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(folders.holding(self.folder.path))

    def begin(self, stage: str, token: str, is_away: bool) -> Handed | None:
        """Give a process the turn to train a stage; None: the stage has its result.

        Args:
            stage: Id of the stage.
            token: Different for each turn.
            is_away: The process is on another machine, so that the desk writes for it.

        Raises:
            HeldError: A process of an earlier turn still writes in the folder.
        """
        with self._locks[stage]:
            self._last_tokens[stage] = token
            self._end(stage)
            folder = self.folder.stage(stage)
            spec = read_spec(folder)
            assert spec is not None, f"{folder.path} has no stage.json"
            experiment = spec.parsed_experiment()
            if has_result(folder, spec, experiment):
                return None
            turn = _Turn(token, experiment.train.keep)
            if is_away:
                turn.held.enter_context(lock.held(folder.writer_lock, lock.WRITER_WAIT_S))
            self._turns[stage] = turn
            if not is_away:
                return Handed()
            with self._turn(stage, token):
                begin_folder(folder, spec)
                step = _newest(folder)  # first: it may note an event, which is in a small file
                return Handed(_small_files(folder), step, stop.requested(self.folder))

    def read(self, file: Path, start: int, size: int) -> bytes:
        """Return a part of a file of a checkpoint on this machine."""
        with open(file, "rb") as opened:
            return os.pread(opened.fileno(), size, start)

    def take(self, stage: str, token: str, pieces: list[Piece]) -> str | None:
        """Write files of a stage. Return why the sweep was asked to stop; None if it was not."""
        with self._turn(stage, token) as (folder, _):
            for path, start, data in pieces:
                _write(folder.path / path, start, data)
        return stop.requested(self.folder)

    def begin_checkpoint(self, stage: str, token: str, step: int, size: int) -> None:
        """Make a folder for a checkpoint of `size` bytes."""
        with self._turn(stage, token) as (folder, turn):
            turn.incoming = store.begin(folder.checkpoints, step, size)

    def take_part(self, stage: str, token: str, piece: Piece) -> None:
        """Write a piece of a file of the checkpoint."""
        with self._turn(stage, token) as (_, turn):
            assert turn.incoming is not None
            name, start, data = piece
            _write(turn.incoming / name, start, data)

    def commit(self, stage: str, token: str) -> None:
        """Verify the checkpoint, whose files are all here, and give it its name."""
        with self._turn(stage, token) as (folder, turn):
            assert turn.incoming is not None
            for file in turn.incoming.iterdir():
                files.fsync(file)
            files.fsync(turn.incoming)
            step = verify(turn.incoming)["step"]
            journal.sync(folder)
            checkpoint_folders.rename(turn.incoming, path_of(folder.checkpoints, step))
            turn.incoming = None
            folder.checkpointed_file.touch()
            store.prune(folder.checkpoints, turn.keep)

    def end(self, stage: str, token: str, result: bytes | None) -> None:
        """End a turn.

        Args:
            stage: Id of the stage.
            token: That of the turn.
            result: Content of result.json; None: the stage has not ended, and continues later.
        """
        with self._turn(stage, token) as (folder, _):
            if result is not None:
                found = parse_result(json.loads(result))
                if found.outcome == DONE and not found.is_whole:
                    store.keep_only(folder.checkpoints, found.step)
                files.write_atomically(folder.result_file, result)
            self._end(stage)

    def failed(self, stage: str, token: str, text: str, ending: Ending | None) -> None:
        """Store the error of rank 0 on another machine, also if it could not begin the stage.

        Args:
            stage: Id of the stage.
            token: That of its turn.
            text: The traceback.
            ending: What follows from it; None: another attempt may succeed.
        """
        folder = self.folder.stage(stage)
        with self._locks[stage]:
            if self._last_tokens.get(stage, token) != token:
                return
            found = folder.read_ending()
            if found is not None and found.kind == "user":
                ending = None  # the error of a write here, which names the file
            store_failure(folder, 0, text, ending)

    @contextlib.contextmanager
    def _turn(self, stage: str, token: str) -> Iterator[tuple[RunFolder, _Turn]]:
        """Yield the folder and the turn of a stage. No other call writes in the `with` block.

        Raises:
            LostTurnError: It is not the turn of this process.
        """
        folder = self.folder.stage(stage)
        with self._locks[stage]:
            turn = self._turns.get(stage)
            if turn is None or turn.token != token:
                raise LostTurnError(f"stage {stage}: another process trains it now")
            try:
                yield folder, turn
            except OSError as error:
                text = "".join(traceback.format_exception(error))
                ending = ending_of_tracebacks(folder, [text], 1)
                if ending.kind == "user":  # such as a full disk here
                    folder.write_ending(ending)
                raise

    def _end(self, stage: str) -> None:
        turn = self._turns.pop(stage, None)
        if turn is not None:
            turn.held.close()


def _small_files(folder: RunFolder) -> dict[str, bytes]:
    """Return the files of a stage that a process needs, by name."""
    wanted = [folder.stage_file, folder.journal_file, *folder.aside_files(), folder.events_file]
    wanted.append(folder.checkpointed_file)
    return {file.name: files.read_bytes(file) for file in wanted if file.exists()}


def _newest(folder: RunFolder) -> int | None:
    def skip(message: str) -> None:
        events.note(folder, "checkpoint_damaged", message)

    found = store.latest_valid(folder.checkpoints, skip, set_aside=True)
    return None if found is None else step_of(found)


def _write(file: Path, start: int, data: bytes) -> None:
    """Write what comes after the first `start` bytes of a file; from 0 on, replace the file.

    Raises:
        LostTurnError: The file here has another size.
    """
    folders.make_folder(file.parent)
    if start == 0:
        files.write_atomically(file, data)
        return
    descriptor = files.opener(file, os.O_WRONLY | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        if size != start:
            raise LostTurnError(f"{file}: has {size} bytes instead of {start}")
        if os.write(descriptor, data) != len(data):  # the disk is full
            os.ftruncate(descriptor, start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    finally:
        os.close(descriptor)
