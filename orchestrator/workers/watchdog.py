"""A worker that hangs is found, named and ended, so that its group can start again.

Eats beats, one whenever the loop enters another phase; yields `.ranks/rank-<r>` in the run's folder (where each worker
is), and for a hang `hang-rank<r>.txt` with the stacks of all threads and the end of the process. How long a phase may
take follows from how long it took before. A process that is stopped from outside cannot watch itself: its neighbours on
the machine, or the driver, look into it and end it, however long what they wait in may take.
"""

import contextlib
import faulthandler
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from orchestrator import files as own_file
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import system_memory

START_S = 1800.0  # for what was not measured yet: compiling, a first evaluation
FACTOR = 10  # times the longest so far
BACKSTOP_S = 10.0  # beyond the limit, for who hangs with the interpreter in its hands
EXIT_HUNG = 70
MARK_BYTES = 512
EXCHANGE, AGREEMENT = (
    "exchange",
    "agreement",
)  # phases in which a worker waits for the others: it hangs for somebody else
# What is not part of every step, by its phases; the others then wait longer for rank 0.
EXTRA = {"evaluation": "evaluation", AGREEMENT: "evaluation", "checkpoint": "checkpoint"}
DONE, FAILED = "done", "failed"
HELD = "held"  # by who reads the lines, for as long as he likes: Tune, between two evaluations
OVER = (EXCHANGE, AGREEMENT, HELD, DONE, FAILED)  # where nobody hangs of himself
STOPPED = " (stopped)"  # behind the phase of a process that took no part, wherever it was
COMMIT_FACTOR = 20  # times the floor, at least, where somebody may wait for a disk


class Pace:
    """How long each phase took, and so how long it may: pure but for its memory."""

    def __init__(self, floor_s: float):
        self.floor_s, self.longest, self.seen = floor_s, {}, {}

    def add(self, kind: Any, seconds: float) -> None:
        """Book one duration; the first of a kind warms things up and says little."""
        self.seen[kind] = self.seen.get(kind, 0) + 1
        if self.seen[kind] > 1:
            self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)

    def limit(self, kind: Any) -> float:
        """Seconds that this kind may take; never below the floor, and generous while it was not measured."""
        return max(self.floor_s, FACTOR * self.longest[kind] if kind in self.longest else START_S)


class Watchdog:
    """One worker's marks and its own watcher; `beat` costs some microseconds. `node`: the cluster's name of its machine."""

    def __init__(
        self, run_dir: Path, worker: Worker, floor_s: float, node: str = "", poll_s: float = 0.5
    ):
        self.run_dir, self.rank, self.attempt, self.poll_s = (
            Path(run_dir),
            worker.rank,
            worker.attempt,
            poll_s,
        )
        self.node = node
        self.pace, self.number, self.step, self.phase, self.kind = (
            Pace(floor_s),
            0,
            0,
            "start",
            frozenset(),
        )
        self.last, self.limit, self.closed = (
            time.monotonic(),
            max(floor_s, START_S),
            threading.Event(),
        )
        self.born, self.oom_kills = _born(os.getpid()), system_memory.oom_kills()
        (self.run_dir / ".ranks").mkdir(exist_ok=True)
        self.fd = own_file.opener(
            self.run_dir / ".ranks" / f"rank-{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        )
        self.file = open(
            self.run_dir / f"hang-rank{self.rank}.txt",
            "w",
            encoding="utf-8",  # noqa: SIM115 - for faulthandler
            opener=own_file.opener,
        )
        self._mark()
        self._arm()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, phase: str, step: int) -> None:
        """The worker enters `phase`; `step` counts updates done."""
        now = time.monotonic()
        self.pace.add((self.phase, self.kind), now - self.last)
        if self.phase == EXCHANGE:
            self.kind = frozenset()
        if phase in EXTRA:
            self.kind |= {EXTRA[phase]}
        self.phase, self.step, self.last = phase, step, now
        self.limit = self.pace.limit((phase, self.kind))
        if (
            phase == AGREEMENT
        ):  # for a batch of somebody else, who may meet a shape for the first time
            self.limit = max(self.limit, self.pace.limit(("evaluation", self.kind)))
        if (
            "checkpoint" in self.kind
        ):  # behind a commit that is still being written; its pauses say nothing of that
            self.limit = max(self.limit, COMMIT_FACTOR * self.pace.floor_s)
        if phase == HELD:
            self.limit = math.inf
        self._mark()
        if now - self.armed > 1.0 or self.limit > self.armed_for:
            self._arm()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """The worker is done: it has nothing more to say, and nobody waits for it but Ray."""
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()
        self.phase = FAILED if failed else DONE
        self._mark()
        os.close(self.fd)
        self.file.close()

    def _mark(self) -> None:
        self.number += 1
        mark = {
            "rank": self.rank,
            "attempt": self.attempt,
            "pid": os.getpid(),
            "born": self.born,
            "host": socket.gethostname(),
            "node": self.node,
            "step": self.step,
            "phase": self.phase,
            "number": self.number,
            "limit": round(self.limit, 1),
            "oom_kills": self.oom_kills,
        }
        with contextlib.suppress(OSError):  # no mark is worth a step: the disk may be full
            os.pwrite(self.fd, json.dumps(mark).encode().ljust(MARK_BYTES), 0)

    def _arm(self) -> None:
        """Behind the thread stand the group's own timeout, which ends a wait for somebody who is gone, and a watcher that needs
        no interpreter: who hangs may hold its lock."""
        if self.limit == math.inf:
            faulthandler.cancel_dump_traceback_later()
            self.armed_for = 0.0
            return
        self.armed, self.armed_for = time.monotonic(), self.limit
        faulthandler.dump_traceback_later(self.limit + BACKSTOP_S, exit=True, file=self.file)
        if dist.is_initialized():
            distributed_c10d._set_pg_timeout(
                timedelta(seconds=self.limit + BACKSTOP_S / 2)
            )  # there is no public way

    def _watch(self) -> None:
        while not self.closed.wait(self.poll_s):
            waited = time.monotonic() - self.last
            if waited > self.limit or (
                waited > self.pace.floor_s and any(map(self._is_stopped, marks(self.run_dir)))
            ):
                self._end(waited)
            self.oom_kills = (
                system_memory.oom_kills()
            )  # those of others in a long run are none of ours

    def _is_stopped(self, mark: dict[str, Any]) -> bool:
        """Whether a mark is that of a neighbour that is stopped: no wait for it has an end."""
        return mark["rank"] != self.rank and is_here(mark) and _status(mark["pid"]) == "stopped"

    def _end(self, waited: float) -> None:
        """Leave the stacks, look into neighbours that cannot do so themselves, and end."""
        print(
            f"step {self.step + 1}: {self.phase} takes longer than {waited:.0f} s",
            file=self.file,
            flush=True,
        )
        faulthandler.dump_traceback(self.file, all_threads=True)
        self.file.flush()
        time.sleep(2 * self.poll_s)  # who can speak for himself has done so by now
        for mark in marks(self.run_dir):
            if self._is_stopped(mark) or (mark["rank"] != self.rank and mark["phase"] not in OVER):
                end_stuck(self.run_dir, mark)
        os._exit(EXIT_HUNG)


def marks(run_dir: Path) -> list[dict[str, Any]]:
    """Where each worker was last seen, by rank."""
    found = []
    for file in sorted((Path(run_dir) / ".ranks").glob("rank-*")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(file.read_text("utf-8")))
    return sorted(found, key=lambda mark: mark["rank"])


def is_here(mark: dict[str, Any]) -> bool:
    """Whether the process of a mark lives on this machine."""
    return (
        mark["host"] == socket.gethostname()
        and mark["born"] is not None
        and _born(mark["pid"]) == mark["born"]
    )


def end_stuck(run_dir: Path, mark: dict[str, Any]) -> None:
    """Note what a stuck worker of this machine is doing, and kill it. A process that is stopped takes no other signal."""
    if not is_here(mark):
        return
    if _status(mark["pid"]) == "stopped":  # wherever it was, others now wait for it
        place = Path(run_dir) / ".ranks" / f"rank-{mark['rank']}"
        own_file.rewrite(
            place, json.dumps(mark | {"phase": f"{mark['phase'].removesuffix(STOPPED)}{STOPPED}"})
        )
    file = Path(run_dir) / f"hang-rank{mark['rank']}.txt"
    if file.exists() and not file.stat().st_size:
        own_file.rewrite(
            file,
            f"process {mark['pid']} is {_status(mark['pid'])} in {mark['phase']} of step {mark['step'] + 1}\n"
            f"{_look_into(mark['pid'])}",
        )
    with contextlib.suppress(ProcessLookupError):
        os.kill(mark["pid"], signal.SIGKILL)


def has_hung(run_dir: Path) -> bool:
    """Whether the last attempt ended by a hang that is not reported yet."""
    return any(file.stat().st_size for file in Path(run_dir).glob("hang-rank*.txt"))


def report(run_dir: Path) -> str | None:
    """The verdict on a hang that ended an attempt: noted as an event, its stacks put away. None: there was none.

    Called where no worker runs: by the next attempt before it begins, or by the driver at the end.
    """
    files = sorted(Path(run_dir).glob("hang-rank*.txt"))
    stacks = [file for file in files if file.stat().st_size]
    message = None
    if stacks:
        seen = marks(run_dir)
        number = 1 + max(
            (int(d.name) for d in (Path(run_dir) / "hangs").glob("[0-9]*") if d.name.isdecimal()),
            default=0,
        )
        folder = Path(run_dir) / "hangs" / f"{number:04d}"
        try:
            folder.mkdir(parents=True)
            for file in stacks:
                shutil.move(file, folder / file.name)
            message = f"{verdict(seen)}; the stacks are in {folder}"
        except OSError as error:  # who hung is worth more than where
            message = f"{verdict(seen)}; the stacks are lost ({error.strerror})"
        events.note(RunFolder(run_dir), "hang", message, marks=seen)
    for file in (
        *files,
        *(Path(run_dir) / ".ranks").glob("rank-*"),
    ):  # of a later, smaller group some would be left
        file.unlink(missing_ok=True)
    return message


def verdict(seen: list[dict[str, Any]]) -> str:
    """Who hung, out of where each worker was last seen: those who were stopped, or else those who waited for nobody."""
    stopped = [m for m in seen if m["phase"].endswith(STOPPED)]
    stuck = [m for m in seen if m["phase"] not in OVER]
    behind = stopped or [m for m in stuck if m["step"] == min(s["step"] for s in stuck)]
    if not behind:
        return "every worker waited for the others: the network between them is suspect"
    return "; ".join(
        f"rank {m['rank']} (process {m['pid']} on {m['host']}) hung in {m['phase']} of step {m['step'] + 1}"
        + ("" if m in stopped else f", longer than {m['limit']:.0f} s")
        for m in behind
    )


def _look_into(pid: int) -> str:
    """A process's Python stacks from outside, where this machine allows it."""
    tool = shutil.which(
        "py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    )
    if tool is None:
        return "no py-spy on this machine to look into it\n"
    try:
        done = subprocess.run(
            [tool, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}\n"
    return done.stdout or f"py-spy: {done.stderr}"


def _status(pid: int) -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
        return next(
            line.partition("(")[2].rstrip(")") for line in lines if line.startswith("State:")
        )
    return "in an unknown state"


def _born(pid: int) -> str | None:
    """When the process began: numbers of processes are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
