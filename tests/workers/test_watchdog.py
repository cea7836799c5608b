"""Ranks that hang are named and ended, and their stacks are kept.

The ranks are real processes, which hang in Python, in C, or are stopped from outside.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import hangs, marks
from orchestrator.workers.marks import DONE, FAILED, Mark
from orchestrator.workers.watchdog import EXIT_HUNG, START_S, Pace, Watchdog

REPO = Path(__file__).resolve().parents[2]
HANGS = """
import ctypes, sys, time
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import watchdog as module
module.START_S = module.BACKSTOP_S = 0.5
folder, how, rank, phase = sys.argv[1:]
worker = Worker(rank=int(rank), world_size=2)
watchdog = module.Watchdog(RunFolder(folder), worker, 0.5, poll_s=0.1)
watchdog.report_phase(phase, 7)
print("ready", flush=True)
def wait_here():
    if how == "python":
        time.sleep(60)
    else:
        ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the GIL
wait_here()
"""
DEFAULT_LIMITS = HANGS.replace("module.START_S = module.BACKSTOP_S = 0.5", "")


def start(
    folder: RunFolder, how: str, rank: int = 0, phase: str = "gradient", code: str = HANGS
) -> subprocess.Popen:
    """Start a rank that hangs in `phase` of step 8."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder, how, str(rank), phase],
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def mark(rank: int, phase: str, step: int) -> Mark:
    return Mark(rank, 1, 10 + rank, "1", "h", "", step, phase, 1, 30.0, 0)


# ---- limits ----


def test_phase_may_take_ten_times_its_longest_and_never_less_than_the_floor():
    pace = Pace(30.0)
    kind = ("gradient", frozenset())
    assert pace.limit(kind) == START_S
    pace.add(kind, 500.0)  # the first one is the warm-up
    assert pace.limit(kind) == START_S
    pace.add(kind, 0.1)
    assert pace.limit(kind) == 30.0
    pace.add(kind, 6.0)
    pace.add(kind, 0.1)
    assert pace.limit(kind) == 60.0
    assert pace.limit(("update", frozenset())) == START_S


def test_wait_for_an_evaluation_may_take_as_long_as_a_batch_took_here(folder):
    watchdog = Watchdog(folder, Worker(), 30.0)
    for seconds in (200.0, 5.0, 200.0):
        watchdog.report_phase("agreement", 5)
        watchdog.report_phase("evaluation", 5)
        watchdog.entered -= seconds  # as if the phase had taken that long
    watchdog.report_phase("agreement", 5)
    assert watchdog.limit == pytest.approx(2000, rel=0.01)
    watchdog.close()


HEALTHY = """
import sys, time
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import watchdog as module
watchdog = module.Watchdog(RunFolder(sys.argv[1]), Worker(), 0.2, poll_s=0.05)
module.START_S = 30.0
for step in range(50):
    for phase in ("gradient", "exchange", "update"):
        watchdog.report_phase(phase, step)
watchdog.report_phase("evaluation", 50)  # never timed: START_S
time.sleep(1.5)
watchdog.report_phase("checkpoint", 50)  # waits for the disk: 20 times the floor
time.sleep(1.5)
watchdog.report_phase("gradient", 50)
module.START_S = 0.5
watchdog.report_phase("held", 50)  # no limit
time.sleep(1.5)
watchdog.report_phase("gradient", 50)
watchdog.close()
"""


def test_watchdog_does_not_end_healthy_ranks_with_long_phases(folder):
    done = subprocess.run([sys.executable, "-c", HEALTHY, folder], cwd=REPO)
    assert done.returncode == 0
    assert hangs.report(folder) is None


# ---- a rank that hangs ----


@pytest.mark.parametrize(("how", "status"), [("python", EXIT_HUNG), ("c", 1)])
def test_hung_rank_stores_its_stacks_and_ends(folder, how, status):
    process = start(folder, how)
    assert process.wait(30) == status
    assert "wait_here" in folder.hang_file(0).read_text()
    message = hangs.report(folder)
    assert message.startswith(f"rank 0 (process {process.pid} on ")
    assert "hung in gradient of step 8" in message
    assert [event["kind"] for event in events.read(folder)] == ["hang"]
    assert "wait_here" in (folder.hangs / "0001" / "hang-rank0.txt").read_text()
    assert hangs.report(folder) is None, "one hang was reported twice"


@pytest.mark.parametrize("phase", ["gradient", "exchange", "agreement"])
def test_waiting_rank_ends_a_stopped_one_and_names_it(folder, phase):
    stopped = start(folder, "python", 1, phase)
    stopped.send_signal(signal.SIGSTOP)
    waiting = start(folder, "python", 0, "agreement" if phase == "agreement" else "exchange")
    assert waiting.wait(30) == EXIT_HUNG
    assert stopped.wait(30) == -signal.SIGKILL
    message = hangs.report(folder)
    assert message.startswith(f"rank 1 (process {stopped.pid} on ")
    assert "rank 0" not in message
    stacks = folder.hangs / "0001"
    assert f"is stopped in {phase} of step 8" in (stacks / "hang-rank1.txt").read_text()
    assert " takes longer" in (stacks / "hang-rank0.txt").read_text()


def test_stopped_rank_is_found_before_its_phase_was_timed(folder):
    stopped = start(folder, "python", 1)
    stopped.send_signal(signal.SIGSTOP)
    waiting = start(folder, "python", 0, "exchange", DEFAULT_LIMITS)
    assert waiting.wait(30) == EXIT_HUNG
    assert stopped.wait(30) == -signal.SIGKILL
    assert "hung in gradient (stopped) of step 8;" in hangs.report(folder)


@pytest.mark.parametrize(
    ("seen", "named"),
    [
        ([mark(0, "exchange", 5), mark(1, "exchange", 5), mark(2, "gradient", 5)], "rank 2 "),
        ([mark(0, "update", 6), mark(1, "gradient", 5)], "rank 1 "),
        ([mark(0, "exchange", 5), mark(1, "agreement", 5)], "the network"),
        ([mark(0, "failed", 5), mark(1, "exchange", 5)], "the network"),
        (
            [mark(0, "evaluation", 5), mark(1, "evaluation (stopped)", 5)],
            "rank 1 (process 11 on h) hung in evaluation (stopped) of step 6",
        ),
    ],
)
def test_verdict_names_the_rank_that_waited_for_no_other(seen, named):
    verdict = hangs.verdict(seen)
    assert named in verdict
    ranks = re.findall(r"rank \d", verdict)
    assert ranks == re.findall(r"rank \d", named), "another rank is named too"


# ---- marks ----


def test_mark_is_always_complete(folder):
    watchdog = Watchdog(folder, Worker(), 30.0)
    for step in (9, 10**9, 3):
        watchdog.report_phase("gradient", step)
        stored = json.loads((folder.rank_marks / "rank-0").read_text())
        assert stored["step"] == step
    watchdog.close()


@pytest.mark.parametrize(("failed", "phase"), [(False, DONE), (True, FAILED)])
def test_rank_that_ended_is_marked_and_no_hang(folder, failed, phase):
    Watchdog(folder, Worker(), 30.0).close(failed)
    assert [seen.phase for seen in marks.read(folder)] == [phase]
    assert hangs.report(folder) is None
    assert marks.read(folder) == [], "marks of workers that are gone were kept"


def test_process_that_reuses_a_pid_is_not_killed(folder):
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        old = replace(mark(0, "gradient", 0), pid=bystander.pid, host=socket.gethostname())
        hangs.end_stuck(folder, old)
        time.sleep(0.2)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


# ---- collectives ----

WAITS = """
import sys, time
import torch
import torch.distributed as dist
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import watchdog as module
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
if rank == 1:
    sys.stdin.read()
module.BACKSTOP_S = 3.5
watchdog = module.Watchdog(RunFolder(folder), Worker(rank=rank, world_size=2), 0.5)
watchdog.closed.set()  # ends its thread, as if another thread held the GIL
for step in range(3):
    watchdog.report_phase("exchange", step)
    watchdog.report_phase("update", step)
time.sleep(1.1)  # the timers are set again once a second
watchdog.report_phase("exchange", 3)
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(error)
"""


def test_collective_times_out_at_the_limit_of_its_phase(folder):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS, folder, str(rank)],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    try:
        output = ranks[1].communicate(timeout=60)[0]
        limit_ms = int(re.search(r"Timed out waiting (\d+)ms", output)[1])
        assert 2250 <= limit_ms < 60_000
    finally:
        ranks[0].kill()
        ranks[0].wait()
