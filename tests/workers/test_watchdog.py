"""Workers that hang are named, their stacks kept, and they end: real processes, hung in Python, in C and from outside."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import watchdog
from orchestrator.workers.watchdog import EXIT_HUNG, START_S, Pace, Watchdog

REPO = Path(__file__).resolve().parents[2]
HANGS = """
import ctypes, sys, time
from pathlib import Path
from orchestrator.workers import watchdog
from orchestrator.train.numerics import Worker
watchdog.START_S = watchdog.BACKSTOP_S = 0.5
dog = watchdog.Watchdog(Path(sys.argv[1]), Worker(rank=int(sys.argv[3]), world_size=2), 0.5, poll_s=0.1)
dog.beat(sys.argv[4], 7)
print("in it", flush=True)
def wait_here():
    time.sleep(60) if sys.argv[2] == "python" else ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the interpreter's lock
wait_here()
"""


def start(folder: Path, how: str, rank: int = 0, phase: str = "gradient") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, folder, how, str(rank), phase],
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "in it\n"
    return process


def test_a_phase_may_take_ten_times_its_longest_and_never_less_than_the_floor():
    pace = Pace(30.0)
    assert pace.limit("a") == START_S
    pace.add("a", 500.0)  # the first warms up
    assert pace.limit("a") == START_S
    pace.add("a", 0.1)
    assert pace.limit("a") == 30.0
    pace.add("a", 6.0)
    pace.add("a", 0.1)
    assert pace.limit("a") == 60.0
    assert pace.limit("b") == START_S


@pytest.mark.parametrize("how", ["python", "c"])
def test_a_worker_that_hangs_leaves_its_stacks_and_ends(tmp_path, how):
    process = start(tmp_path, how)
    assert process.wait(30) == (EXIT_HUNG if how == "python" else 1)
    assert "wait_here" in (tmp_path / "hang-rank0.txt").read_text()
    said = watchdog.report(tmp_path)
    assert said.startswith(f"rank 0 (process {process.pid} on ")
    assert "hung in gradient of step 8" in said
    assert [e["kind"] for e in events.read(RunFolder(tmp_path))] == ["hang"]
    assert "wait_here" in (tmp_path / "hangs" / "0001" / "hang-rank0.txt").read_text()
    assert watchdog.report(tmp_path) is None, "one hang was reported twice"


@pytest.mark.parametrize("phase", ["gradient", "exchange", "agreement"])
def test_who_waits_ends_the_one_that_is_stopped_and_names_it(tmp_path, phase):
    stopped = start(tmp_path, "python", 1, phase)
    stopped.send_signal(signal.SIGSTOP)
    waits = start(tmp_path, "python", 0, "agreement" if phase == "agreement" else "exchange")
    assert waits.wait(30) == EXIT_HUNG
    assert stopped.wait(30) == -signal.SIGKILL
    said = watchdog.report(tmp_path)
    assert said.startswith(f"rank 1 (process {stopped.pid} on ")
    assert "rank 0" not in said
    assert (
        f"is stopped in {phase} of step 8"
        in (tmp_path / "hangs" / "0001" / "hang-rank1.txt").read_text()
    )
    assert " takes longer" in (tmp_path / "hangs" / "0001" / "hang-rank0.txt").read_text()


def test_who_waits_in_what_was_not_measured_yet_finds_a_stopped_one_all_the_same(tmp_path):
    stopped = start(tmp_path, "python", 1)
    stopped.send_signal(signal.SIGSTOP)
    code = HANGS.replace("watchdog.START_S = watchdog.BACKSTOP_S = 0.5", "")
    waits = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path, "python", "0", "exchange"], cwd=REPO
    )
    assert waits.wait(30) == EXIT_HUNG
    assert stopped.wait(30) == -signal.SIGKILL
    assert "hung in gradient (stopped) of step 8;" in watchdog.report(tmp_path)


def test_a_healthy_long_phase_after_short_ones_is_left_alone(tmp_path):
    code = (
        HANGS.partition("dog =")[0]
        + """
dog = watchdog.Watchdog(Path(sys.argv[1]), Worker(), 0.2, poll_s=0.05)
watchdog.START_S = 30.0
for step in range(50):
    for phase in ("gradient", "exchange", "update"):
        dog.beat(phase, step)
dog.beat("evaluation", 50)  # never measured: it has START_S
time.sleep(1.5)
dog.beat("checkpoint", 50)
time.sleep(1.5)  # waits for a commit: twenty times the floor
dog.beat("gradient", 50)
watchdog.START_S = 0.5
dog.beat(watchdog.HELD, 50)
time.sleep(1.5)
dog.beat("gradient", 50)
dog.close()
"""
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=REPO)
    assert done.returncode == 0
    assert watchdog.report(tmp_path) is None


def test_a_worker_that_failed_is_not_done(tmp_path):
    dog = Watchdog(tmp_path, Worker(), 30.0)
    dog.close(failed=True)
    assert [m["phase"] for m in watchdog.marks(tmp_path)] == [watchdog.FAILED]
    assert "network" in watchdog.verdict(
        watchdog.marks(tmp_path) + [{"rank": 1, "phase": "exchange"}]
    )
    watchdog.report(tmp_path)
    assert watchdog.marks(tmp_path) == [], "marks of a group that is gone"


def test_a_worker_that_is_done_or_was_born_under_a_used_number_is_left_alone(tmp_path):
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        mark = {
            "rank": 0,
            "pid": bystander.pid,
            "born": "1",
            "host": os.uname().nodename,
            "phase": "gradient",
            "step": 0,
        }
        watchdog.end_stuck(tmp_path, mark)
        time.sleep(0.2)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    dog = Watchdog(tmp_path, Worker(), 0.2, poll_s=0.05)
    dog.close()
    assert [m["phase"] for m in watchdog.marks(tmp_path)] == [watchdog.DONE]
    assert watchdog.report(tmp_path) is None


def test_the_verdict_names_who_waited_for_nobody():
    def mark(rank, phase, step):
        return {
            "rank": rank,
            "pid": 10 + rank,
            "host": "h",
            "phase": phase,
            "step": step,
            "limit": 30.0,
        }

    assert "rank 2" in watchdog.verdict(
        [mark(0, "exchange", 5), mark(1, "exchange", 5), mark(2, "gradient", 5)]
    )
    both = watchdog.verdict([mark(0, "update", 6), mark(1, "gradient", 5)])
    assert "rank 1" in both
    assert "rank 0" not in both
    assert "network" in watchdog.verdict([mark(0, "exchange", 5), mark(1, "agreement", 5)])
    seen = watchdog.verdict([mark(0, "evaluation", 5), mark(1, "evaluation (stopped)", 5)])
    assert seen == "rank 1 (process 11 on h) hung in evaluation (stopped) of step 6"


def test_who_waits_for_a_batch_of_an_evaluation_has_the_time_that_a_batch_took_here(tmp_path):
    dog = Watchdog(tmp_path, Worker(), 30.0)
    for seconds in (200.0, 5.0, 200.0):
        dog.beat("agreement", 5)
        dog.beat("evaluation", 5)
        dog.last -= seconds  # as if it had taken so long
    dog.beat("agreement", 5)
    assert dog.limit == pytest.approx(2000, rel=0.01)
    dog.close()


def test_a_mark_is_always_whole(tmp_path):
    dog = Watchdog(tmp_path, Worker(), 30.0)
    for step in (9, 10**9, 3):
        dog.beat("gradient", step)
        assert json.loads((tmp_path / ".ranks" / "rank-0").read_text())["step"] == step
    dog.close()


WAITS = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from orchestrator.workers import watchdog
from orchestrator.train.numerics import Worker
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/group", rank=rank, world_size=2)
if rank == 1:
    sys.stdin.read()
watchdog.BACKSTOP_S = 3.5
dog = watchdog.Watchdog(Path(sys.argv[1]), Worker(rank=rank, world_size=2), 0.5)
dog.closed.set()  # its thread is gone, as of somebody who holds the interpreter
for step in range(3):
    dog.beat("exchange", step)
    dog.beat("update", step)
time.sleep(1.1)  # it is set again once a second
dog.beat("exchange", 3)
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(error)
"""


def test_a_collective_times_out_after_what_the_phase_may_take(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS, tmp_path, str(rank)],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    try:
        said = ranks[1].communicate(timeout=60)[0]
        assert 2250 <= int(re.search(r"Timed out waiting (\d+)ms", said)[1]) < 60_000
    finally:
        ranks[0].kill()
