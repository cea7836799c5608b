"""Ranks that hang, wait or take memory, for `forked.start`."""

import contextlib
import ctypes
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.cluster import private
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import hangs, memory, watchdog


def hang(job: dict) -> None:
    """Hang in `phase` of step 8, in "python", or in "c" with the GIL."""
    if job["quick"]:
        watchdog.START_S = watchdog.BACKSTOP_S = 0.5
    worker = Worker(rank=job["rank"], world_size=2)
    dog = watchdog.Watchdog(RunFolder(job["folder"]), worker, 0.5, poll_s=0.1)
    dog.report_phase(job["phase"], 7)

    def wait_here() -> None:
        if job["how"] == "python":
            time.sleep(60)
        else:
            ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the GIL

    wait_here()


def be_healthy(job: dict) -> None:
    """Have phases that take long, but not too long."""
    dog = watchdog.Watchdog(RunFolder(job["folder"]), Worker(), 0.2, poll_s=0.05)
    watchdog.START_S = 30.0
    for step in range(50):
        for phase in ("gradient", "exchange", "update"):
            dog.report_phase(phase, step)
    dog.report_phase("evaluation", 50)  # never timed: START_S
    time.sleep(1.5)
    dog.report_phase("checkpoint", 50)  # waits for the disk: 20 times the floor
    time.sleep(1.5)
    dog.report_phase("gradient", 50)
    watchdog.START_S = 0.5
    dog.report_phase("held", 50)  # no limit
    time.sleep(1.5)
    dog.report_phase("gradient", 50)
    dog.close()


def wait_in_a_collective(job: dict) -> None:
    """Rank 0 waits for rank 1, which joins the group and nothing else, and prints the error."""
    folder, rank = job["folder"], job["rank"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    if rank == 1:
        signal.pause()
    watchdog.BACKSTOP_S = 3.5
    dog = watchdog.Watchdog(RunFolder(folder), Worker(rank=rank, world_size=2), 0.5)
    dog.closed.set()  # ends its thread, as if another thread held the GIL
    for step in range(3):
        dog.report_phase("exchange", step)
        dog.report_phase("update", step)
    time.sleep(1.1)  # the timers are set again once a second
    dog.report_phase("exchange", 3)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        Path(folder, "error").write_text(str(error))


def set_collective_timeout(job: dict) -> None:
    store = f"file://{job['folder']}/group"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    private.set_collective_timeout(7.0)


def take_2_gib(job: dict) -> None:
    """Join a control group, report a phase, and take memory when the file `go` exists."""
    Path(job["group"], "cgroup.procs").write_text("0")
    folder = RunFolder(job["folder"])
    watchdog.Watchdog(folder, Worker(), 30.0).report_phase("gradient", 7)
    while not (folder.path / "go").exists():
        time.sleep(0.01)
    _taken = [bytearray(b"x" * 2**20) for _ in range(2000)]
    sys.exit("no limit")


def find_kills(job: dict) -> None:
    """Write which kill is found: at first, after a hang was noted, and after it was reported."""
    Path(job["group"], "cgroup.procs").write_text("0")
    folder = RunFolder(job["folder"])
    with open(folder.path / "found", "w") as out, contextlib.redirect_stdout(out):

        def find() -> None:
            kill = memory.find_kill(folder)
            print(kill and kill.by)

        find()
        folder.hang_file(0).write_text("it hung")
        find()  # a rank that hung was killed for that
        hangs.report(folder)
        find()
