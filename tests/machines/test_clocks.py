"""Runs and sweeps on machines of which one has a clock that is an hour ahead."""

import signal

import pytest

from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.workers import marks
from tests.helpers.curves import final_outcome
from tests.helpers.machines import REPO
from tests.machines.conftest import objects, outcome_of, sweep_words
from tests.machines.test_nodes import alone, attempts, messages, newest, train_command, until

HOUR_S = 3600
AHEAD = 1  # the machine with the other clock
# All Python processes of a machine import it. A namespace has no clock of its own for the time.
SHIFT = f"""
import time
now, now_ns = time.time, time.time_ns
time.time = lambda: now() + {HOUR_S}
time.time_ns = lambda: now_ns() + {HOUR_S} * 1_000_000_000
"""


@pytest.fixture
def clocks(nodes):
    """The cluster, with one machine whose clock is an hour ahead."""
    shift = nodes.shared / "shift"
    shift.mkdir(exist_ok=True)
    (shift / "sitecustomize.py").write_text(SHIFT)
    nodes.own_env[AHEAD] = {"PYTHONPATH": f"{shift}:{REPO}"}
    nodes.changed.add(AHEAD)
    nodes.start_again(AHEAD)
    nodes.changed.add(AHEAD)  # restored at the end
    return nodes


def minutes(folder: RunFolder) -> list[int]:
    """Return how many minutes after the first line each line of the journal was written."""
    times = [line["timestamp"] for line in journal.read(folder)]
    return [round((then - times[0]) / 60_000) for then in times]


@pytest.mark.slow
def test_run_is_locked_taken_over_and_continued_by_a_machine_with_another_clock(
    clocks, small, tmp_path, tiny_dataset
):
    words = ["name=hour", "train.max_steps=200", *small]
    command = train_command(clocks, [*words, "compute.num_workers=2"])
    folder = RunFolder(clocks.shared / "hour")
    first = clocks.drive(command, tmp_path / "first", node=AHEAD)
    until(lambda: newest(folder) >= 10, first, tmp_path / "first")
    assert {mark.host for mark in marks.read(folder)} == {"node1", "node2"}
    second = clocks.drive(command, tmp_path / "second", node=2)
    assert second.wait(60) == 75, (tmp_path / "second").read_text()
    assert "held by" in (tmp_path / "second").read_text()
    clocks.signal_driver(first, signal.SIGKILL)
    first.wait()
    third = clocks.drive(command, tmp_path / "third", node=2)
    assert third.wait(200) == 0, (tmp_path / "third").read_text()
    assert len(messages(folder, "taken_over")) == 1
    assert len(attempts(folder)) == 2
    kinds = {event["kind"] for event in events.read(folder)}
    assert not kinds & {"hang", "node_silent", "node_lost", "restart"}
    assert min(minutes(folder)) < -50, "the clocks are alike"
    assert final_outcome(folder) == alone(words, tmp_path / "alone", tiny_dataset)


@pytest.mark.slow
def test_sweep_uses_machines_with_different_clocks(clocks, small, on_one, tmp_path):
    words = sweep_words("hours", *small[-2:])
    folder = SweepFolder(clocks.shared / "hours")
    log = tmp_path / "log"
    driver = clocks.drive(["pipelines/sweep.py", "/dev/null", *words], log)
    assert driver.wait(300) == 0, log.read_text()
    first_lines = [journal.read(stage)[0]["timestamp"] for stage in folder.stages()]
    assert max(first_lines) - min(first_lines) > HOUR_S * 900, "both machines trained stages"
    kinds = {event["kind"] for event in events.read(folder)}
    assert not kinds & {"hang", "node_silent", "node_lost", "restart"}
    assert outcome_of(folder) == on_one[1]


@pytest.mark.slow
def test_lock_of_a_mirror_is_kept_and_taken_over_by_machines_with_different_clocks(
    clocks, store, small, tmp_path
):
    """The machines share no folder. Both see the age of a lock by their own monotonic clock."""
    words = ["name=locked", "train.max_steps=300", *small, "compute.num_workers=1"]
    command = train_command(clocks, [*words, "storage=s3://bucket/clocks"])
    first = clocks.drive(command, tmp_path / "first", node=AHEAD)
    until(lambda: "locked/checkpoints/" in objects(clocks), first, tmp_path / "first")
    second = clocks.drive(command, tmp_path / "second", node=2)
    assert second.wait(60) == 75, (tmp_path / "second").read_text()
    assert "held by" in (tmp_path / "second").read_text()
    clocks.signal_driver(first, signal.SIGKILL)
    first.wait()
    third = clocks.drive(command, tmp_path / "third", node=2)
    assert third.wait(300) == 0, (tmp_path / "third").read_text()
    assert "waiting for its next sign of life" in (tmp_path / "third").read_text()
    assert "resuming locked from step" in (tmp_path / "third").read_text()
