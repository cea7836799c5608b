"""The metric journal of a run, metrics.jsonl: one line per logged step.

    {"step": 10, "timestamp": 1764012345678, "train/loss": 3.21, "optim/lr": 0.001}

`step` counts the updates done. `timestamp` is in milliseconds and never changes: MLflow stores a
line only once, also if it receives it twice. Rank 0 appends; console, tracking and reports read.

A resumed run moves the lines after its checkpoint into an aside, metrics.aside-<number>-from-
<step>.jsonl. They are kept because MLflow may have received them.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator import files, lines
from orchestrator.errors import NO_ROOM, NoRoomError
from orchestrator.files import fsync, write_atomically
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder

TAIL_BYTES = 8192  # several times the size of a line

Line = dict[str, Any]


class Journal:
    """Appends lines to the journal of a run. Each line is written whole or not at all.

    If the disk is full, lines wait in memory and are written in order as soon as there is room.

    Args:
        folder: Folder of the run, which must exist.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.file = folder.journal_file
        self.waiting: list[Line] = []
        self._disk_was_full = False

    def append(self, step: int, values: dict[str, float]) -> Line:
        """Write the line of a step, after those that wait. Return the line."""
        line = {"step": step, "timestamp": time.time_ns() // 1_000_000, **values}
        self.waiting.append(line)
        self.catch_up()
        return line

    def catch_up(self) -> OSError | None:
        """Write the lines that wait. Return the error if the disk is still full, else None."""
        while self.waiting:
            try:
                self.write(self.waiting[0])
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                self._note_full_disk(error)
                return error
            step = self.waiting.pop(0)["step"]
            if self._disk_was_full and not self.waiting:
                self._note(step, "there is room again, and the lines that waited are written")
                self._disk_was_full = False
        return None

    def close(self) -> None:
        """Write the lines that wait, after the last step.

        Raises:
            NoRoomError: The disk is still full.
        """
        error = self.catch_up()
        if error is not None:
            step = self.waiting[0]["step"]
            raise NoRoomError(
                f"{self.file}: no room for the line of step {step} ({error.strerror}). Free some "
                "room there and run the same command again: it goes on from the last checkpoint"
            )

    def write(self, line: Line) -> None:
        """Write a line that already has a timestamp.

        Raises:
            OSError: For example, the disk is full. The journal has not changed.
        """
        lines.append(self.file, line)

    def rewind(self, step: int, reduce: Callable[[Line], Line | None] | None = None) -> int:
        """Move every line after `step` into an aside, and drop an incomplete last line.

        Args:
            step: The last step whose line stays.
            reduce: Maps the line at `step` to the part of it that stays (None: nothing). If the
                two differ, the aside gets the whole line.

        Returns:
            The number of lines in the aside; 0 if there was nothing to move.
        """
        remaining: list[bytes] = []
        archived: list[bytes] = []
        for data in lines.read(self.file):
            line = parse(data)
            if line is None:  # no line of a step that remains: see `journal_copy`
                continue
            kept = _kept_part(line, step, reduce)
            if kept == line:
                remaining.append(data + b"\n")
            else:
                archived.append(data + b"\n")
                if kept is not None:
                    remaining.append(lines.encode(kept))
        if archived:
            # The name has the first step that is trained again. The lines do not tell it: if the
            # intervals change, the resumed run logs other steps.
            aside = self.folder.aside_file(generation(self.folder), max(step, -1) + 1)
            write_atomically(aside, b"".join(archived), durable=True)
        if self.file.exists():
            write_atomically(self.file, b"".join(remaining), durable=True)
        return len(archived)

    def _note_full_disk(self, error: OSError) -> None:
        if self._disk_was_full:
            return
        self._disk_was_full = True
        step = self.waiting[-1]["step"]
        self._note(
            step,
            f"no room for the line of step {step} ({error.strerror}); it waits in memory, and "
            "checkpoints wait for it; training goes on",
        )

    def _note(self, step: int, message: str) -> None:
        events.note(self.folder, "disk_full", f"{self.file}: {message}", step=step)


def _kept_part(line: Line, step: int, reduce: Callable[[Line], Line | None] | None) -> Line | None:
    """Return what remains of a line when the journal is rewound to `step`."""
    if line["step"] > step:
        return None
    if line["step"] == step and reduce is not None:
        return reduce(line)
    return line


def read(folder: RunFolder) -> list[Line]:
    """Return all lines in order, without those in asides. Damaged ones are skipped."""
    return _parsed(lines.read(folder.journal_file))


def read_text(folder: RunFolder) -> str:
    """Return the whole lines of the journal as one text."""
    return b"".join(line + b"\n" for line in lines.read(folder.journal_file)).decode()


def last(folder: RunFolder) -> Line | None:
    """Return the last line. Only the end of the file is read, so this can be called often."""
    try:
        with open(folder.journal_file, "rb", opener=files.opener) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            found = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return parse(found[-1]) if found else None


def sync(folder: RunFolder) -> None:
    """Force the journal to disk.

    A power failure must not remove lines that MLflow has received, or lines of steps before a
    checkpoint: these steps are not trained again.
    """
    with contextlib.suppress(FileNotFoundError):
        fsync(folder.journal_file)
        fsync(folder.path)  # a resume may have replaced the file


class Tail:
    """Follows a growing journal and reads each line once.

    A resume replaces the file. `poll` then returns all its lines again; the caller can recognize
    known lines by step and timestamp.

    Attributes:
        inode: Identifies the open file; None before the file exists.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.inode: int | None = None
        self._path = folder.journal_file
        self._file: BinaryIO | None = None
        self._offset = 0

    def poll(self) -> list[Line]:
        """Return the lines that were written since the last call."""
        self._reopen_if_replaced()
        if self._file is None:
            return []
        self._file.seek(self._offset)
        whole, newline, _ = self._file.read().rpartition(b"\n")
        if not newline:
            return []
        self._offset += len(whole) + 1
        return _parsed(whole.split(b"\n"))

    def _reopen_if_replaced(self) -> None:
        # The file stays open between two calls: otherwise the new file could get the same inode.
        try:
            if os.stat(self._path).st_ino == self.inode:
                return
            file = open(self._path, "rb", buffering=0, opener=files.opener)  # noqa: SIM115
        except FileNotFoundError:
            return
        if self._file is not None:
            self._file.close()
        self._file = file
        self._offset = 0
        self.inode = os.fstat(file.fileno()).st_ino


@dataclass(frozen=True)
class Aside:
    """Lines that one resume moved out of the journal.

    Attributes:
        number: Counts the resumes that moved lines, from 0.
        first_step: First step that was trained again; 0 if the name of the file does not tell.
    """

    path: Path
    number: int
    first_step: int

    def read(self) -> list[Line]:
        """Return the lines in the order of the former journal."""
        return _parsed(lines.read(self.path))


def asides(folder: RunFolder) -> list[Aside]:
    """Return all asides, oldest first."""
    found = []
    for path in folder.aside_files():
        match = re.fullmatch(r"\D*(\d+)(?:-from-(\d+))?", path.stem)
        if match is not None and files.is_plain(path):
            found.append(Aside(path, int(match[1]), int(match[2] or 0)))
    return sorted(found, key=lambda aside: aside.number)


def generation(folder: RunFolder) -> int:
    """Return the number of the next aside: how often a resume has moved lines."""
    found = asides(folder)
    return found[-1].number + 1 if found else 0


def parse(data: bytes) -> Line | None:
    """Return a line of the journal; None if it is damaged."""
    return lines.parse(data, step=int, timestamp=int)


def _parsed(found: list[bytes]) -> list[Line]:
    return [line for line in map(parse, found) if line is not None]
