"""The watchdog of a rank: ends the process if a phase of a step takes much longer than before.

The training loop reports each phase. A thread of the same process compares the time in the phase
with a limit that follows from earlier steps. At the limit it stores the stacks of all threads in
`hang-rank<r>.txt` and ends the process, so that the group can start again.

The thread cannot run in two cases. If another thread never releases the GIL, faulthandler's timer
ends the process; it needs no GIL. If the process is stopped (SIGSTOP), another rank or the driver
ends it, see `hangs.end_stuck`.
"""

import faulthandler
import math
import os
import socket
import threading
import time

import torch.distributed as dist

from orchestrator import files
from orchestrator.cluster import private
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import hangs, marks, memory
from orchestrator.workers.marks import AGREEMENT, DONE, EXCHANGE, FAILED, HELD, WAITING

START_S = 1800.0  # limit of a phase that was not timed yet: compilation, the first evaluation
FACTOR = 10  # limit of a phase, in multiples of the longest time so far
# Limit after a checkpoint, in multiples of the floor: the next one waits until it is on disk.
COMMIT_FACTOR = 20
BACKSTOP_S = 10.0  # added to the limit for faulthandler's timer, so that the thread comes first
END_S = 60.0  # for storing the stacks of all ranks
REARM_S = 1.0  # between two settings of the timers
EXIT_HUNG = 70  # exit status
# Phases of work that only some steps have. While one rank does it, the others wait longer.
EXTRA_WORK = {"evaluation": "evaluation", AGREEMENT: "evaluation", "checkpoint": "checkpoint"}

PhaseKind = tuple[str, frozenset[str]]  # the phase, and the extra work since the last exchange


class Pace:
    """How long each kind of phase took, and how long it may take.

    Args:
        floor_s: Smallest limit, `compute.hang_after_s`.
    """

    def __init__(self, floor_s: float) -> None:
        self.floor_s = floor_s
        self._longest: dict[PhaseKind, float] = {}
        self._warm: set[PhaseKind] = set()

    def add(self, kind: PhaseKind, seconds: float) -> None:
        """Add a duration. The first one of a kind is not counted: it includes the warm-up."""
        if kind in self._warm:
            self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)
        self._warm.add(kind)

    def limit(self, kind: PhaseKind) -> float:
        """Return the seconds that this kind of phase may take."""
        longest = self._longest.get(kind)
        if longest is None:
            return max(self.floor_s, START_S)
        return max(self.floor_s, FACTOR * longest)


class Watchdog:
    """Watches this process, from its creation until `close`. Use it as a context manager.

    Args:
        folder: Folder of the run or stage.
        worker: Rank of this process.
        floor_s: Smallest limit of a phase, `compute.hang_after_s`.
        poll_s: Seconds between two looks of the thread.
    """

    def __init__(
        self, folder: RunFolder, worker: Worker, floor_s: float, poll_s: float = 0.5
    ) -> None:
        self.folder = folder
        self.rank = worker.rank
        self.poll_s = poll_s
        self.pace = Pace(floor_s)
        self.phase = "start"
        self.step = 0
        self.limit = max(floor_s, START_S)  # of the current phase
        self.entered = time.monotonic()
        self.closed = threading.Event()
        self._far_look_at = 0.0  # seconds in the current phase
        self._extra_work: frozenset[str] = frozenset()
        self._oom_kills = memory.oom_kills()
        self._marks = marks.MarkFile(folder, worker, self._oom_kills)
        # Open until the end: faulthandler writes to the file descriptor.
        self._stacks = open(  # noqa: SIM115
            folder.hang_file(worker.rank), "w", encoding="utf-8", opener=files.opener
        )
        self._write_mark()
        self._arm()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(kind is not None)

    def report_phase(self, phase: str, step: int) -> None:
        """Report that this rank enters `phase` after `step` updates. Takes microseconds."""
        now = time.monotonic()
        self.pace.add((self.phase, self._extra_work), now - self.entered)
        if self.phase == EXCHANGE:
            self._extra_work = frozenset()
        if phase in EXTRA_WORK:
            self._extra_work |= {EXTRA_WORK[phase]}
        self.phase = phase
        self.step = step
        self.entered = now
        self._far_look_at = 0.0
        self.limit = self._limit(phase)
        self._write_mark()
        if now - self._armed_at > REARM_S or self.limit > self._armed_limit:
            self._arm()

    def close(self, failed: bool = False) -> None:
        """Stop watching: this rank has ended."""
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()
        self.phase = FAILED if failed else DONE
        self._write_mark()
        self._marks.close()
        self._stacks.close()

    def _limit(self, phase: str) -> float:
        if phase == HELD:
            return math.inf
        limit = self.pace.limit((phase, self._extra_work))
        if phase == AGREEMENT:
            # Another rank evaluates a batch, perhaps of a shape that is new to it.
            limit = max(limit, self.pace.limit(("evaluation", self._extra_work)))
        if "checkpoint" in self._extra_work:
            # The phase may wait until an earlier checkpoint is on disk. Earlier durations do not
            # predict how long that takes.
            limit = max(limit, COMMIT_FACTOR * self.pace.floor_s)
        return limit

    def _write_mark(self) -> None:
        self._marks.write(self.phase, self.step, self.limit, self._oom_kills)

    def _arm(self) -> None:
        """Set the timers that also work if the thread cannot run.

        The timeout of the process group ends a wait for a rank that is gone. faulthandler's timer
        ends a process that holds the GIL.
        """
        self._armed_at = time.monotonic()
        if self.limit == math.inf:
            faulthandler.cancel_dump_traceback_later()
            self._armed_limit = 0.0
            return
        self._armed_limit = self.limit
        faulthandler.dump_traceback_later(self.limit + BACKSTOP_S, exit=True, file=self._stacks)
        if dist.is_initialized():
            private.set_collective_timeout(self.limit + BACKSTOP_S / 2)

    def _watch(self) -> None:
        """Look at the time of the current phase until the watchdog is closed."""
        while not self.closed.wait(self.poll_s):
            entered = self.entered
            waited = time.monotonic() - entered
            if waited > self.limit:
                self._end(waited)
            if waited > self.pace.floor_s:
                found = self._stopped_ranks(self._looks_far(waited))
                goes_on = self.entered != entered or self.closed.is_set()
                if found and not goes_on:
                    self._end(waited)
            # Kills of other processes during a long run are not ours.
            self._oom_kills = memory.oom_kills()

    def _looks_far(self, waited: float) -> bool:
        """Return whether to look at other machines now: each `floor_s`."""
        if waited < self._far_look_at:
            return False
        self._far_look_at = waited + self.pace.floor_s
        return self._is_first_here()

    def _is_first_here(self) -> bool:
        """Return whether this rank is the one of its machine that starts processes on others."""
        here = socket.gethostname()
        ranks = [mark.rank for mark in marks.read(self.folder) if mark.host == here]
        return self.rank == min(ranks, default=self.rank)

    def _stopped_ranks(self, looks_far: bool) -> set[int]:
        """Return the other ranks whose processes are stopped."""
        seen = [mark for mark in marks.read(self.folder) if mark.rank != self.rank]
        return hangs.stopped(seen) or (hangs.stopped_far(seen) if looks_far else set())

    def _end(self, waited: float) -> None:
        """Store the stacks, end the ranks that cannot end themselves, and end this process."""
        # Restart the timer: it must not end this process before the other ranks were examined.
        faulthandler.dump_traceback_later(END_S, exit=True, file=self._stacks)
        message = f"step {self.step + 1}: {self.phase} takes longer than {waited:.0f} s"
        print(message, file=self._stacks, flush=True)
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        time.sleep(2 * self.poll_s)  # the watchdogs of the other ranks store their stacks
        looks_far = self._is_first_here()
        stopped = self._stopped_ranks(looks_far)
        others = [mark for mark in marks.read(self.folder) if mark.rank != self.rank]
        if not looks_far:
            others = [mark for mark in others if mark.host == socket.gethostname()]
        hangs.end_stuck(
            self.folder,
            [mark for mark in others if mark.phase not in WAITING or mark.rank in stopped],
        )
        os._exit(EXIT_HUNG)
