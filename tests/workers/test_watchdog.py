"""Ranks that hang are named and ended, and their stacks are kept.

The ranks are real processes, which hang in Python, in C, or are stopped from outside.
"""

import json
import os
import re
import signal
import socket
import subprocess
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess

import pytest

from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import hangs, marks, watch
from orchestrator.workers.marks import DONE, FAILED, Mark
from orchestrator.workers.watchdog import EXIT_HUNG, START_S, Pace, Watchdog
from tests.helpers import forked, stuck
from tests.helpers.wait import wait_until


def start(
    folder: RunFolder, how: str, rank: int = 0, phase: str = "gradient", quick: bool = True
) -> BaseProcess:
    """Start a rank that hangs in `phase` of step 8; `quick`: after half a second."""
    job = {"folder": str(folder.path), "how": how, "rank": rank, "phase": phase, "quick": quick}
    [process] = forked.start(stuck.hang, [job])
    wait_until(lambda: (rank, phase) in [(mark.rank, mark.phase) for mark in marks.read(folder)])
    return process


def status_of(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def stop(process: BaseProcess | subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGSTOP)


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


def test_watchdog_does_not_end_healthy_ranks_with_long_phases(folder):
    [process] = forked.start(stuck.be_healthy, [{"folder": str(folder.path)}])
    assert status_of(process) == 0
    assert hangs.report(folder) is None


# ---- a rank that hangs ----


@pytest.mark.parametrize(("how", "status"), [("python", EXIT_HUNG), ("c", 1)])
def test_hung_rank_stores_its_stacks_and_ends(folder, how, status):
    process = start(folder, how)
    assert status_of(process) == status
    assert "wait_here" in folder.hang_file(0).read_text()
    message = hangs.report(folder)
    assert message.startswith(f"rank 0 (process {process.pid} on ")
    assert "hung in gradient of step 8" in message
    assert [event["kind"] for event in events.read(folder)] == ["hang"]
    assert "wait_here" in (folder.hangs / "0001" / "hang-rank0.txt").read_text()
    assert hangs.report(folder) is None, "one hang was reported twice"


@pytest.mark.parametrize("phase", ["gradient", "exchange", "agreement"])
def test_waiting_rank_ends_a_stopped_one_and_names_it(folder, phase):
    stopped = start(folder, "python", 1, phase, quick=False)
    stop(stopped)
    waiting = start(folder, "python", 0, "agreement" if phase == "agreement" else "exchange")
    assert status_of(waiting) == EXIT_HUNG
    assert status_of(stopped) == -signal.SIGKILL
    message = hangs.report(folder)
    assert message.startswith(f"rank 1 (process {stopped.pid} on ")
    assert "rank 0" not in message
    stacks = folder.hangs / "0001"
    assert f"is stopped in {phase} of step 8" in (stacks / "hang-rank1.txt").read_text()
    assert " takes longer" in (stacks / "hang-rank0.txt").read_text()


def test_stopped_rank_is_found_before_its_phase_was_timed(folder):
    stopped = start(folder, "python", 1, quick=False)
    stop(stopped)
    waiting = start(folder, "python", 0, "exchange", quick=False)
    assert status_of(waiting) == EXIT_HUNG
    assert status_of(stopped) == -signal.SIGKILL
    assert "hung in gradient (stopped) of step 8;" in hangs.report(folder)


def test_driver_ends_all_stuck_ranks_at_the_same_time(folder, monkeypatch):
    monkeypatch.setattr(watch, "GRACE_S", 0.0)
    ranks = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    folder.rank_marks.mkdir()
    for rank, process in enumerate(ranks):
        stop(process)
        born = marks._born(process.pid)
        here = replace(mark(rank, "gradient", 7), pid=process.pid, born=born, limit=0.0)
        text = json.dumps(asdict(replace(here, host=socket.gethostname())))
        folder.mark_file(rank).write_text(text)
    driver = watch.Watch(folder, lambda: [folder])
    try:
        driver._look()
        driver._look()
        assert [process.wait(60) for process in ranks] == [-signal.SIGKILL] * 2
    finally:
        for process in ranks:
            process.kill()


def test_one_rank_of_a_machine_looks_at_other_machines_now_and_then(folder):
    first, second = (Watchdog(folder, Worker(rank=rank, world_size=2), 30.0) for rank in range(2))
    assert [first._looks_far(waited) for waited in (31.0, 40.0, 61.5)] == [True, False, True]
    first.report_phase("exchange", 1)
    assert first._looks_far(31.0)
    assert not second._looks_far(31.0)
    first.close()
    second.close()


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
        hangs.end_stuck(folder, [old])
    finally:
        bystander.terminate()
    assert bystander.wait() == -signal.SIGTERM, "SIGKILL came before"


def test_stopped_process_of_another_machine_is_found_and_ended_there(folder, monkeypatch):
    """The other machine is only a name here: its calls are made in this process."""

    def on_nodes(nodes, _limit_s, function, *arguments):
        with monkeypatch.context() as there:
            there.setattr(socket, "gethostname", lambda: "other")
            return {node: function(*arguments) for node in nodes}

    monkeypatch.setattr(hangs.calls, "on_nodes", on_nodes)
    process = subprocess.Popen(["sleep", "60"])
    stop(process)
    born = marks._born(process.pid)
    far = replace(mark(1, "gradient", 0), pid=process.pid, born=born, host="other", node="id")
    wait_until(lambda: far.process_status() == "stopped")
    assert hangs.stopped([far]) == set()
    assert hangs.stopped_far([far]) == {1}
    hangs.end_stuck(folder, [far])
    assert process.wait(60) == -signal.SIGKILL


# ---- collectives ----


def test_collective_times_out_at_the_limit_of_its_phase(folder):
    jobs = [{"folder": str(folder.path), "rank": rank} for rank in (1, 0)]
    other, waiting = forked.start(stuck.wait_in_a_collective, jobs)
    try:
        assert status_of(waiting) == 0
        limit_ms = int(
            re.search(r"Timed out waiting (\d+)ms", (folder.path / "error").read_text())[1]
        )
        assert 2250 <= limit_ms < 60_000
    finally:
        other.kill()
        other.join()
