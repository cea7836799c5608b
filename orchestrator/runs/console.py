"""Prints the progress of a run: one line per logged step, and the messages of events.

The console reads the files of the run folder, so it prints what was recorded. A full disk cannot be
recorded there, so the console checks for it itself.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from types import TracebackType

from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Line
from orchestrator.text import duration

FULL_BYTES = 4096  # with less free space, even an event may not be written


class Console:
    """Prints the lines and events that are written from now on, until the `with` block ends.

    Args:
        folder: Folder of the run.
        max_steps: Last step of the run.
        tokens: Returns the tokens of the first updates, for the time that remains.
        comment: Returns a line to print after a line of the journal, or None.
        interval_s: Pause between two reads of the files.
    """

    def __init__(
        self,
        folder: RunFolder,
        max_steps: int,
        tokens: Callable[[int], int],
        comment: Callable[[Line], str | None] | None = None,
        interval_s: float = 0.3,
    ) -> None:
        self.folder = folder
        self.max_steps = max_steps
        self.tokens = tokens
        self.comment = comment
        self.interval_s = interval_s
        self._tail = journal.Tail(folder)
        self._printed = {_identity(line) for line in self._tail.poll()}
        self._events_printed = len(events.read(folder))
        self._disk_was_full = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)

    def __enter__(self) -> "Console":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(timeout=5)

    def _follow(self) -> None:
        done = False
        while not done:
            # One more pass after the end prints the last lines.
            done = self._done.wait(self.interval_s)
            self._print_if_disk_is_full()
            self._print_events()
            with contextlib.suppress(OSError):  # the file system does not answer at the moment
                self._print_lines()

    def _print_lines(self) -> None:
        for line in self._tail.poll():
            if _identity(line) not in self._printed:
                self._printed.add(_identity(line))
                print(format_line(line, self.max_steps, self.tokens), flush=True)
                comment = None if self.comment is None else self.comment(line)
                if comment is not None:
                    print(comment, flush=True)

    def _print_events(self) -> None:
        found = events.read(self.folder)
        for event in found[self._events_printed :]:
            print(event.get("message"), flush=True)
        # A file that is just being written may have fewer.
        self._events_printed = max(self._events_printed, len(found))

    def _print_if_disk_is_full(self) -> None:
        is_full = _is_disk_full(self.folder)
        if is_full and not self._disk_was_full:
            print(
                f"{self.folder.path}: the disk is full. Training goes on; lines and checkpoints "
                "wait for room",
                flush=True,
            )
        self._disk_was_full = is_full


def _is_disk_full(folder: RunFolder) -> bool:
    """Return whether the disk is full; False if the file system does not report its free space."""
    try:
        disk = os.statvfs(folder.path)
    except OSError:
        return False
    if disk.f_blocks == 0:
        return False
    no_space = disk.f_bavail * disk.f_frsize < FULL_BYTES
    no_inodes = disk.f_files > 0 and disk.f_favail == 0
    return no_space or no_inodes


def _identity(line: Line) -> tuple[int, int]:
    """Return a key that differs between any two lines.

    A resumed attempt trains some steps again, so the step is not enough. Two lines may have the
    same millisecond, and the clocks of two nodes differ, so the timestamp is not enough either.
    """
    return line["step"], line["timestamp"]


def format_line(line: Line, max_steps: int, tokens: Callable[[int], int]) -> str:
    """Return a journal line as text for people.

    Example:
        `step 100/2,000 | loss 2.3456 | lr 1.0e-03 | 25,600 tok/s | MFU 41 % | ETA 1m32s`
    """
    step = line["step"]
    width = len(f"{max_steps:,}")
    parts = [f"step {step:>{width},}/{max_steps:,}"]
    if "train/loss" in line:
        parts.append(f"loss {line['train/loss']:.4f}")
        parts.append(f"lr {line['optim/lr']:.2e}")
    speed = line.get("perf/tokens_per_sec")
    if speed:
        parts.append(f"{speed:,.0f} tok/s")
    if "perf/mfu" in line:
        parts.append(f"MFU {line['perf/mfu']:.1%}")
    left = left_s(line, max_steps, tokens)
    if left is not None:
        parts.append(f"ETA {duration(left)}")
    if "val/loss" in line:
        bits = line["val/bits_per_byte"]
        parts.append(f"val loss {line['val/loss']:.4f}, {bits:.4f} bits/byte")
    return " | ".join(parts)


def left_s(line: Line, max_steps: int, tokens: Callable[[int], int]) -> float | None:
    """Return the seconds to the last step at the speed of a journal line; None without a speed."""
    speed = line.get("perf/tokens_per_sec")
    if not speed:
        return None
    return (tokens(max_steps) - tokens(line["step"])) / speed
