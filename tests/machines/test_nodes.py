"""Runs on a cluster of three machines whose nodes are lost, cut off, or not as they should be."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config.experiment import load_experiment
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.train.loop import train
from orchestrator.workers import marks
from tests.helpers.curves import final_outcome
from tests.helpers.machines import REPO, Machines
from tests.helpers.wait import wait_until


def train_command(cluster: Machines, words: list[str]) -> list[str]:
    return ["pipelines/train.py", str(cluster.shared / "small.yaml"), *words]


def alone(words: list[str], path: Path, dataset: Path) -> dict:
    """Train a run in this process. Return its outcome."""
    path.mkdir()
    train(load_experiment(None, [*words, "compute.num_workers=1"]), RunFolder(path), dataset)
    return final_outcome(RunFolder(path))


def attempts(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.attempts_file.read_text().splitlines()]


def messages(folder: RunFolder, *kinds: str) -> list[str]:
    return [event["message"] for event in events.read(folder) if event["kind"] in kinds]


def newest(folder: RunFolder) -> int:
    return max(folder.checkpoint_steps(), default=0)


def until(condition: Callable[[], object], driver: subprocess.Popen, log: Path) -> None:
    try:
        wait_until(condition, driver)
    except AssertionError as error:
        pytest.fail(f"{error}\n{log.read_text()}")


# Prepares a small corpus on Ray, as a large one.
PREPARE = """
import functools, runpy
from orchestrator.data import prepare
prepare.prepare = functools.partial(prepare.prepare, chunk_bytes=4096)
runpy.run_path("pipelines/prepare.py", run_name="__main__")
"""
COMMANDS = {
    "run": ["pipelines/train.py"],
    "sweep": ["pipelines/sweep.py"],
    "prepare": ["-c", PREPARE],
    "run with tokens elsewhere": ["pipelines/train.py"],
}


@pytest.mark.parametrize(
    "name",
    ["run", pytest.param("sweep", marks=pytest.mark.slow), "prepare", "run with tokens elsewhere"],
)
def test_folder_that_a_node_does_not_share_is_one_line(cluster, small, tmp_path, name):
    storage = cluster.private / name.replace(" ", "-")
    (cluster.nodes[1].folder / storage.name).mkdir()
    file = cluster.shared / "refused.yaml"
    file.write_text("sweep: {grid: {schedule.max_lr: [1e-2, 5e-3]}}\n" if name == "sweep" else "")
    words = [*small, "name=private", f"storage={storage}", "compute.num_workers=1"]
    words += ["train.eval_interval=20"]
    if name == "prepare":
        words += ["data.dir=null"]
    if name == "run with tokens elsewhere":
        shutil.copytree(cluster.shared / "tokens", cluster.nodes[0].folder / storage.name)
        words += [f"storage={cluster.shared}", f"data.dir={storage}"]
    log = tmp_path / "log"
    driver = cluster.drive([*COMMANDS[name], str(file), *words], log)
    assert driver.wait(200) == 2, log.read_text()
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert f"storage: node1 has another folder at {storage}; mount" in line or name == "prepare"
    assert f"storage: node2 does not have {storage}" in line
    assert "Traceback" not in log.read_text()
    left = cluster.nodes[0].folder / storage.name
    assert name != "run" or not left.exists(), "a refused run left its folder"


# Nodes that join later are not checked by the driver.
UNCHECKED = """
import runpy
from orchestrator.cluster import nodes
nodes.check_nodes = lambda *_: None
runpy.run_path("pipelines/train.py", run_name="__main__")
"""
OTHER_TORCH = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: "1.0" if name == "torch" else version(name)
"""


@pytest.mark.slow
def test_node_that_joined_with_another_torch_is_one_line(nodes, small, tmp_path):
    other = nodes.shared / "other-torch"
    other.mkdir()
    (other / "sitecustomize.py").write_text(OTHER_TORCH)
    nodes.own_env[2] = {"PYTHONPATH": f"{other}:{REPO}"}
    nodes.start_again(2)
    nodes.changed.add(2)
    log = tmp_path / "log"
    words = ["name=joined", "train.max_steps=60", "compute.num_workers=2", *small]
    _, *arguments = train_command(nodes, words)
    driver = nodes.drive(["-c", UNCHECKED, *arguments], log)
    assert driver.wait(120) == 2, log.read_text()
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert re.match(r"error: node. has torch (1\.0 and node1|.* and node2 1\.0); install", line)
    assert "Traceback" not in log.read_text()


@pytest.mark.slow  # 100 s; tests/cluster/test_room.py has its decisions
def test_run_goes_on_with_fewer_workers_and_with_all_when_the_node_is_back(
    nodes, small, tmp_path, tiny_dataset
):
    words = ["name=elastic", "train.max_steps=120", *small]
    folder = RunFolder(nodes.shared / "elastic")
    log = tmp_path / "log"
    driver = nodes.drive(train_command(nodes, [*words, "compute.num_workers=[1, 2]"]), log)
    until(lambda: newest(folder) >= 10, driver, log)
    nodes.kill(2)
    until(lambda: len(attempts(folder)) == 2, driver, log)
    nodes.start(2)
    assert driver.wait(200) == 0, log.read_text()
    assert [attempt["workers"] for attempt in attempts(folder)] == [2, 1, 2]
    assert all("node2" in message for message in messages(folder, "node_silent", "node_lost"))
    restart, resize = messages(folder, "restart")
    assert "on 1 worker(s), because" in restart and "node2" in restart
    assert "on 2 worker(s), because there is room for 2 workers" in resize
    assert final_outcome(folder) == alone(words, tmp_path / "alone", tiny_dataset)


@pytest.mark.slow
def test_cut_of_the_network_costs_nothing_and_stop_does_not_wait_for_its_end(
    nodes, small, tmp_path
):
    folder = RunFolder(nodes.shared / "cut")
    log = tmp_path / "log"
    words = ["name=cut", "train.max_steps=100000", "compute.num_workers=2", *small]
    job = nodes.submit(train_command(nodes, words), log, "cut")
    until(lambda: newest(folder) >= 10, job, log)
    nodes.cut(2)
    until(lambda: messages(folder, "node_silent"), job, log)  # after 5 s or a bit more
    time.sleep(8)  # Ray gives up a node that is away for 20 s or more
    nodes.mend(2)
    step = newest(folder)
    until(lambda: newest(folder) >= step + 10, job, log)
    assert len(attempts(folder)) == 1, "the workers were started again"
    [back] = messages(folder, "node_back")
    assert "node2 answers again" in back and "its network was cut" in back

    nodes.cut(2)
    until(lambda: len(messages(folder, "node_silent")) == 2, job, log)
    nodes.stop("cut")
    # `ray job submit` itself may wait for the node.
    until(lambda: folder.read_summary(), job, log)
    # Either their step or a start of the workers waits for the node.
    reason = folder.read_ending().reason
    assert reason.startswith("SIGTERM: stopped ") and "node2" in reason
    assert folder.read_summary()["exit_status"] == 75
    printed = nodes.run(0, ["sh", "-c", "cat /tmp/ray/session_latest/logs/job-driver-cut.log"])
    assert "state-dump" not in printed and "Traceback" not in printed, printed


@pytest.mark.slow
def test_run_without_room_says_so_and_ends_and_the_same_command_goes_on(nodes, small, tmp_path):
    folder = RunFolder(nodes.shared / "waits")
    log = tmp_path / "log"
    words = ["name=waits", "train.max_steps=60", "compute.num_workers=2", *small]
    command = train_command(nodes, [*words, "compute.wait_for_nodes_s=5"])
    driver = nodes.drive(command, log)
    until(lambda: newest(folder) >= 10, driver, log)
    nodes.kill(2)
    assert driver.wait(120) == 75, log.read_text()
    [waiting] = messages(folder, "waiting")
    assert "no room for 2 worker(s)" in waiting and "without node2" in waiting
    assert "run the same command again" in log.read_text().splitlines()[-1]
    nodes.start(2)
    assert nodes.drive(command, log).wait(120) == 0, log.read_text()


@pytest.mark.slow
def test_sweep_names_a_lost_node_and_stops_for_a_drained_one(nodes, small, tmp_path):
    folder = SweepFolder(nodes.shared / "tree")
    log = tmp_path / "log"
    file = nodes.shared / "tree.yaml"
    file.write_text("sweep: {grid: {schedule.max_lr: [1e-2, 5e-3]}}\n")
    words = ["name=tree", "train.max_steps=150", "compute.num_workers=1", *small]
    words += ["train.eval_interval=20", "train.eval_tokens=200"]
    command = ["pipelines/sweep.py", str(file), *words]

    def saved() -> list[int]:
        return [newest(stage) for stage in folder.stages()]

    driver = nodes.drive(command, log)
    until(lambda: len(saved()) == 2 and min(saved()) >= 5, driver, log)
    nodes.kill(2)
    until(lambda: messages(folder, "restart"), driver, log)
    assert "a worker on node2 died" in messages(folder, "restart")[0]
    nodes.start(2)
    host = next(mark.host for stage in folder.stages() for mark in marks.read(stage))
    drained = int(host.removeprefix("node"))
    nodes.drain(drained)
    assert driver.wait(120) == 75, log.read_text()
    assert f"the node {host} is drained" in log.read_text()
    nodes.start_again(drained)
    assert nodes.drive(command, log).wait(200) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
