"""What a person sees while a run goes on: one steady line per logged step, read from the run's journal, and its events.

The driver follows the files as the tracking sender does, so that what is printed is what was recorded. Only of a disk that
is full it hears nothing from them, and looks itself.
"""

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from orchestrator.runs import events, journal
from orchestrator.text import duration

FULL_BYTES = 4096  # free, or fewer: not even an event may find room


class Console:
    """Prints the lines and events that are written in `run_dir` from now on; `with Console(…):` around the run."""

    def __init__(
        self, run_dir: Path, max_steps: int, tokens_per_step: int, interval_s: float = 0.3
    ):
        self.max_steps, self.tokens_per_step = max_steps, tokens_per_step
        self.interval_s, self.done = interval_s, threading.Event()
        self.run_dir, self.is_full = Path(run_dir), False
        self.tail, self.told = journal.Tail(run_dir), len(events.read(run_dir))
        self.seen = {_identity(record) for record in self.tail.poll()}
        self.thread = threading.Thread(target=self._follow, name="console", daemon=True)

    def __enter__(self) -> "Console":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join(timeout=5)

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self.done.wait(self.interval_s)  # after the end, one last look
            self._look_for_room()
            self._tell_events()
            for record in self.tail.poll():
                if _identity(record) not in self.seen:
                    self.seen.add(_identity(record))
                    print(format_record(record, self.max_steps, self.tokens_per_step), flush=True)

    def _tell_events(self) -> None:
        """There are few of them, so the file is read anew."""
        happened = events.read(self.run_dir)
        for event in happened[self.told :]:
            print(event.get("message"), flush=True)
        self.told = len(happened)

    def _look_for_room(self) -> None:
        before, self.is_full = self.is_full, _is_full(self.run_dir)
        if self.is_full and not before:
            print(
                f"{self.run_dir}: the disk is full. Training goes on; lines and checkpoints wait for room",
                flush=True,
            )


def _is_full(folder: Path) -> bool:
    """Whether nothing more can be written there, as far as the system says so."""
    with contextlib.suppress(OSError):
        room = os.statvfs(folder)
        return bool(room.f_blocks) and (
            room.f_bavail * room.f_frsize < FULL_BYTES or bool(room.f_files) and not room.f_favail
        )
    return False


def _identity(record: dict[str, Any]) -> tuple[int, int]:
    # With the time: a resumed attempt makes some steps again, and they are worth seeing. Not by it alone: two lines may
    # share a millisecond, and clocks of two nodes differ.
    return record["step"], record["timestamp"]


def format_record(record: dict[str, Any], max_steps: int, tokens_per_step: int) -> str:
    """`step 100/2,000 | loss 2.3456 | lr 1.0e-03 | 25,600 tok/s | MFU 41 % | ETA 1m32s | val 2.41 …`."""
    step, speed = record["step"], record.get("perf/tokens_per_sec")
    parts = [f"step {step:>{len(f'{max_steps:,}')},}/{max_steps:,}"]
    if "train/loss" in record:
        parts += [f"loss {record['train/loss']:.4f}", f"lr {record['optim/lr']:.2e}"]
    if speed:
        parts.append(f"{speed:,.0f} tok/s")
    if "perf/mfu" in record:
        parts.append(f"MFU {record['perf/mfu']:.1%}")
    if speed:
        parts.append(f"ETA {duration((max_steps - step) * tokens_per_step / speed)}")
    if "val/loss" in record:
        parts.append(
            f"val loss {record['val/loss']:.4f}, {record['val/bits_per_byte']:.4f} bits/byte"
        )
    return " | ".join(parts)
