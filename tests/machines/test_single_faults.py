"""Faults of one node of a run: packets that are lost, too little memory, a process that is stopped.

Its driver is on another node.
"""

import os
import time
from pathlib import Path

import pytest

from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import marks
from tests.helpers.curves import final_outcome
from tests.machines import slow
from tests.machines.test_nodes import alone, attempts, messages, newest, train_command, until

GROUPS = Path("/sys/fs/cgroup/memory")  # of version 1
# A part of `slow.Slow` that takes 2 GB on a node which has a file.
HUNGRY = """
            import socket
            if os.path.exists(os.path.dirname(LONGER_FILE) + "/hungry-" + socket.gethostname()):
                self.taken = [os.urandom(2**20) for _ in range(2000)]
"""


@pytest.mark.slow
def test_lost_packets_cost_time_and_the_node_is_named(nodes, small, tmp_path, tiny_dataset):
    words = ["name=lossy", "train.max_steps=150", *small]
    folder = RunFolder(nodes.shared / "lossy")
    log = tmp_path / "log"
    driver = nodes.drive(train_command(nodes, [*words, "compute.num_workers=2"]), log)
    nodes.changed.add(2)
    until(lambda: newest(folder) >= 10, driver, log)
    nodes.lose(2, 0.05)
    step = newest(folder)
    until(lambda: newest(folder) > step, driver, log)
    nodes.switch.lose_nothing(nodes.nodes[2])
    # Its own packets are lost, but not those to it.
    nodes.lose(2, 1.0, ["ingress"])
    until(lambda: "node2 does not answer" in str(messages(folder, "node_silent")), driver, log)
    time.sleep(9)  # Ray would give its worker up after 20 s without an answer
    nodes.switch.lose_nothing(nodes.nodes[2])
    until(lambda: messages(folder, "node_back"), driver, log)
    assert driver.wait(200) == 0, log.read_text()
    assert len(attempts(folder)) == 1, "the workers were started again"
    assert final_outcome(folder) == alone(words, tmp_path / "alone", tiny_dataset)


@pytest.fixture
def memory_group(nodes):
    """A control group for the processes of the second node."""
    group = GROUPS / f"espalier-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs root and control groups of version 1: {error}")
    nodes.changed.add(2)
    for pid in nodes.nodes[2].processes():
        (group / "cgroup.procs").write_text(str(pid))
    yield group
    nodes.restore()  # ends the processes
    group.rmdir()


@pytest.mark.slow
def test_far_worker_that_the_kernel_ended_for_lack_of_memory_is_named(
    nodes, small, tmp_path, memory_group
):
    before, begin, rest = Path(slow.__file__).read_text().partition("        if self.training:")
    (nodes.shared / "hungry.py").write_text(before + begin + HUNGRY + rest.removeprefix("\n"))
    folder = RunFolder(nodes.shared / "hungry")
    log = tmp_path / "log"
    words = ["name=hungry", "train.max_steps=400", "compute.num_workers=2", *small]
    words.append(f"model.kind={nodes.shared}/hungry.py:Slow")
    driver = nodes.drive(train_command(nodes, words), log)
    until(lambda: newest(folder) >= 5, driver, log)
    used = int((memory_group / "memory.usage_in_bytes").read_text())
    (memory_group / "memory.limit_in_bytes").write_text(str(used + 2**28))
    (nodes.shared / "hungry-node2").touch()
    assert driver.wait(200) == 2, log.read_text()
    [line] = messages(folder, "out_of_memory")
    assert line.startswith("out of memory on node2 with train.micro_batch_size=2: the kernel")
    assert "Traceback" not in log.read_text()
    assert len(attempts(folder)) == 1, "it was tried again"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_far_process_that_is_stopped_is_named_and_ended(
    nodes, small, tmp_path, tiny_dataset, workers
):
    folder = RunFolder(nodes.shared / f"stopped-{workers}")
    words = [*small, f"name={folder.name}", "train.max_steps=60", "train.checkpoint_interval=20"]
    words += ["compute.hang_after_s=4"]
    log = tmp_path / "log"
    driver = nodes.drive(train_command(nodes, [*words, f"compute.num_workers={workers}"]), log)
    # The step after a checkpoint may take longer.
    until(lambda: newest(folder) and journal.last(folder)["step"] > 22, driver, log)
    victim = marks.read(folder)[-1]
    node = int(victim.host.removeprefix("node"))
    nodes.run(node, ["kill", "-STOP", str(victim.pid)])
    assert driver.wait(200) == 0, log.read_text()
    assert victim.pid not in map(int, nodes.run(node, ["ps", "-A", "-o", "pid="]).split())
    [hang] = messages(folder, "hang")
    assert f"rank {victim.rank} (process {victim.pid} on node{node}) hung" in hang
    stacks = (folder.hangs / "0001" / f"hang-rank{victim.rank}.txt").read_text()
    assert f"process {victim.pid} is stopped in" in stacks
    assert final_outcome(folder) == alone(words, tmp_path / "alone", tiny_dataset)
