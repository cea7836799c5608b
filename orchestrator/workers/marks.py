"""The current phase of each rank: one file per rank in `.ranks/`, overwritten whenever it changes.

The driver and the other ranks read these marks to find a rank that hangs or was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from orchestrator import files, folders
from orchestrator.runs.folder import RunFolder

if TYPE_CHECKING:
    from orchestrator.train.numerics import Worker

MARK_BYTES = 512  # fixed, so that a mark can be overwritten in place with one system call

# Phases in which a rank waits for the others.
EXCHANGE = "exchange"
AGREEMENT = "agreement"
# The code that reads the journal lines has control: Ray Tune, between two evaluations of a stage.
HELD = "held"
# The rank has ended.
DONE = "done"
FAILED = "failed"
# In these phases, a rank is not itself the cause of a hang.
WAITING = (EXCHANGE, AGREEMENT, HELD, DONE, FAILED)
# Added to the phase of a process that does not run, such as after SIGSTOP.
STOPPED = " (stopped)"


@dataclass(frozen=True)
class Mark:
    """What one rank reported last.

    Attributes:
        born: Start time of the process in clock ticks, which tells it from a later process with
            the same `pid`; None where the system does not tell.
        node: Ray's id of the machine; empty without Ray.
        step: Updates done.
        number: Counts the reports of this process.
        limit: Seconds that the phase may take.
        oom_kills: Processes that the kernel had killed for lack of memory, see `memory.oom_kills`.
    """

    rank: int
    attempt: int
    pid: int
    born: str | None
    host: str
    node: str
    step: int
    phase: str
    number: int
    limit: float
    oom_kills: int

    @property
    def is_over(self) -> bool:
        """True if the rank has ended by itself."""
        return self.phase in (DONE, FAILED)

    @property
    def is_stopped(self) -> bool:
        """True if the process was found stopped."""
        return self.phase.endswith(STOPPED)

    def is_local(self) -> bool:
        """Return whether the process runs on this machine now."""
        if self.host != socket.gethostname() or self.born is None:
            return False
        return _born(self.pid) == self.born

    def process_status(self) -> str:
        """Return the state of a local process, such as "stopped"."""
        try:
            return psutil.Process(self.pid).status()
        except psutil.Error:
            return "in an unknown state"


class MarkFile:
    """The mark of this process.

    Args:
        folder: Folder of the run or stage.
        worker: Rank and attempt of this process.
        oom_kills: Kills until now.
    """

    def __init__(self, folder: RunFolder, worker: Worker, oom_kills: int) -> None:
        folders.make_folder(folder.rank_marks)
        self._descriptor = files.opener(
            folder.mark_file(worker.rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        )
        pid = os.getpid()
        self._last = Mark(
            rank=worker.rank,
            attempt=worker.attempt,
            pid=pid,
            born=_born(pid),
            host=socket.gethostname(),
            node=_ray_node(),
            step=0,
            phase="start",
            number=0,
            limit=0.0,
            oom_kills=oom_kills,
        )

    def write(self, phase: str, step: int, limit: float, oom_kills: int) -> None:
        """Replace the mark."""
        self._last = replace(
            self._last,
            phase=phase,
            step=step,
            number=self._last.number + 1,
            limit=round(limit, 1),
            oom_kills=oom_kills,
        )
        text = json.dumps(asdict(self._last))
        with contextlib.suppress(OSError):  # a full disk must not stop the training
            os.pwrite(self._descriptor, text.encode().ljust(MARK_BYTES), 0)

    def close(self) -> None:
        """Close the file. The last mark stays."""
        os.close(self._descriptor)


def read(folder: RunFolder) -> list[Mark]:
    """Return the marks of all ranks, in the order of the ranks. Unreadable ones are left out."""
    found = []
    for file in folder.mark_files():
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Mark(**json.loads(files.read_text(file))))
    return sorted(found, key=lambda mark: mark.rank)


def note_stopped(folder: RunFolder, mark: Mark) -> None:
    """Write into the mark of another rank that its process is stopped."""
    phase = mark.phase.removesuffix(STOPPED) + STOPPED
    files.rewrite(folder.mark_file(mark.rank), json.dumps(asdict(replace(mark, phase=phase))))


def remove(folder: RunFolder) -> None:
    """Remove all marks. A later, smaller group of workers would not overwrite all of them."""
    for file in folder.mark_files():
        file.unlink(missing_ok=True)


def _ray_node() -> str:
    """Return Ray's id of this machine; empty if this process does not belong to Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    return ray.get_runtime_context().get_node_id()


def _born(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot."""
    try:
        # psutil's `create_time` changes when the clock of the machine is set.
        text = Path(f"/proc/{pid}/stat").read_text("utf-8")
        return text.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
