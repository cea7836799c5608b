"""The metric journal: `metrics.jsonl` in a run's folder, the truth about its curve.

One line per logged step, `{"step": 10, "timestamp": 1764012345678, "train/loss": 3.21, …}`: `step` counts updates done,
`timestamp` is in milliseconds and fixed here for ever, so that sending a line twice changes nothing. Rank 0 appends;
everyone else reads. A resumed run moves the lines after its checkpoint's step aside, into `metrics.aside-<n>-from-<step>.jsonl`.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import files
from orchestrator.errors import NO_ROOM, UserError
from orchestrator.files import fsync
from orchestrator.runs import events

FILE = "metrics.jsonl"
TAIL_BYTES = 8192  # a line has some hundreds


class Journal:
    """Appends to `run_dir/metrics.jsonl`; a line is either whole or not there.

    Where there is no room for one, it and those after it wait in memory, and are written in order once there is.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / FILE
        self.late: list[dict[str, Any]] = []
        self.is_short = False  # of room, and said so

    def append(self, step: int, metrics: dict[str, float]) -> dict[str, Any]:
        """Write one line, after those that are late; returns the record as readers will see it."""
        record = {"step": step, "timestamp": time.time_ns() // 1_000_000, **metrics}
        self.late.append(record)
        self.catch_up()
        return record

    def catch_up(self) -> OSError | None:
        """Write the lines that are late; returns why that is not possible yet, where there is no room."""
        step = self.late[-1]["step"] if self.late else None
        while self.late:
            try:
                self.keep(self.late[0])
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                if not self.is_short:
                    self._note(
                        step,
                        f"no room for the line of step {step} ({error.strerror}); it waits in memory, and "
                        f"checkpoints wait for it; training goes on",
                    )
                self.is_short = True
                return error
            self.late.pop(0)
        if self.is_short:
            self._note(step, "there is room again, and the lines that waited are written")
            self.is_short = False
        return None

    def close(self) -> None:
        """After the last line.

        Raises:
            UserError: there is no room for what is late.
        """
        if error := self.catch_up():
            raise UserError(
                f"{self.path}: no room for the line of step {self.late[0]['step']} ({error.strerror}). Free some room "
                f"there and run the same command again: it goes on from the last checkpoint"
            )

    def _note(self, step: int | None, message: str) -> None:
        events.note(self.path.parent, "disk_full", f"{self.path}: {message}", step=step)

    def keep(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write one line, that has its time already, with one system call."""
        line = json.dumps(record).encode() + b"\n"
        with open(self.path, "ab", buffering=0, opener=files.opener) as file:
            start = file.seek(0, os.SEEK_END)
            if file.write(line) != len(
                line
            ):  # a full disk takes what fits: the next line must not be glued to it
                file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return record

    def rewind(
        self, step: int, reduce: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    ) -> int:
        """Move every line after `step` aside, and drop a torn last line; returns how many lines moved.

        Args:
            reduce: what of the line at `step` itself stays (None: nothing); one that it changes is kept aside as it was.
        """
        keep, aside = [], []
        for line in _whole_lines(self.path):
            record = json.loads(line)
            stays = (
                reduce(record)
                if reduce and record["step"] == step
                else record
                if record["step"] <= step
                else None
            )
            keep += [line if stays == record else json.dumps(stays).encode()] if stays else []
            aside += [line] if stays != record else []
        if aside:
            # The step is in the name, for a step made again need not be one that was moved: intervals may change.
            _write(
                self.path.with_name(
                    f"metrics.aside-{generation(self.path.parent):04d}-from-{max(step, -1) + 1}.jsonl"
                ),
                aside,
            )
        if self.path.exists():
            _write(self.path, keep)
        return len(aside)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The run's surviving history, one record per logged step, in order."""
    return [json.loads(line) for line in _whole_lines(Path(run_dir) / FILE)]


def sync(run_dir: Path) -> None:
    """Have every line on the disk. What a checkpoint goes on from, or others were told, no power cut may take back."""
    with contextlib.suppress(FileNotFoundError):
        fsync(Path(run_dir) / FILE)
        fsync(Path(run_dir))  # a resume puts another file in its place


def last(run_dir: Path) -> dict[str, Any] | None:
    """The last whole line, from the end of the file: whoever asks twice a second does not read it all."""
    try:
        with open(Path(run_dir) / FILE, "rb", opener=files.opener) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else None


def by_interval(
    record: dict[str, Any], log_interval: int | None, eval_interval: int | None
) -> dict[str, Any] | None:
    """What a line would hold if its run did not end there; None where nothing was due."""

    def due(key: str) -> bool:
        interval = (
            eval_interval if key.startswith("val/") or key == "train/eval_loss" else log_interval
        )
        return bool(interval) and record["step"] % interval == 0

    kept = {k: v for k, v in record.items() if k not in ("step", "timestamp") and due(k)}
    return {"step": record["step"], "timestamp": record["timestamp"], **kept} if kept else None


class Tail:
    """Follows a growing journal without reading it again; `poll` returns the records that are new since the last one.

    A resume replaces the file: then everything that survived comes once more, and the caller tells by timestamps.
    """

    def __init__(self, run_dir: Path):
        self.path, self.file, self.inode, self.offset = Path(run_dir) / FILE, None, None, 0

    def poll(self) -> list[dict[str, Any]]:
        if not self._open():
            return []
        self.file.seek(self.offset)
        whole, _, _ = self.file.read().rpartition(b"\n")
        if not whole:
            return []
        self.offset += len(whole) + 1
        return [json.loads(line) for line in whole.split(b"\n")]

    def _open(self) -> bool:
        """Whether `self.file` is what the path means now. Kept open: a file system gives a freed inode away again."""
        try:
            if os.stat(self.path).st_ino != self.inode:
                file = open(self.path, "rb", buffering=0, opener=files.opener)  # noqa: SIM115 - closed when it is replaced or forgotten
                self.file, self.inode, self.offset = file, os.fstat(file.fileno()).st_ino, 0
        except FileNotFoundError:
            return False
        return True


def aside_files(run_dir: Path) -> list[Path]:
    """Files of lines that resumes moved aside, oldest first."""
    return sorted(
        filter(files.is_plain, Path(run_dir).glob("metrics.aside-*.jsonl")), key=number_of
    )


def number_of(aside: Path) -> int:
    """The number in the name of an aside file."""
    return int(aside.stem.split("-")[1])


def begin_of(aside: Path) -> int:
    """The first step that was made again after the lines in this aside file; 0 where its name does not say."""
    return int(([*aside.stem.split("-from-"), "0"])[1])


def generation(run_dir: Path) -> int:
    """One more than the last aside's number: how often lines were moved aside, as long as nobody deletes the last."""
    return max(map(number_of, aside_files(run_dir)), default=-1) + 1


def _whole_lines(path: Path) -> list[bytes]:
    try:
        data = files.read_bytes(path)
    except FileNotFoundError:
        return []
    return data.split(b"\n")[:-1]  # what follows the last newline is empty or torn


def _write(path: Path, lines: list[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    with open(temporary, "wb") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
