"""Calls on a machine of the workers while others use the cluster, with a real Ray."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import ray

from orchestrator.cluster import calls, device
from orchestrator.cluster.layout import Layout, Node
from orchestrator.errors import UnreadableError

WORKER = Layout(num_workers=1, cpus_per_worker=1, use_gpu=False)


def own_pid() -> int:
    return os.getpid()


@pytest.fixture
def other_job(ray_cluster, monkeypatch):
    """The resources of another job, which has all CPUs."""
    monkeypatch.setattr(device, "has_several_nodes", lambda: True)
    monkeypatch.setattr(device, "SILENT_S", 0.1)
    group = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert group.wait(60)
    yield group
    ray.util.remove_placement_group(group)


def test_wait_for_a_free_worker_is_announced_and_ends(other_job, capsys):
    with pytest.raises(UnreadableError, match=r"no worker .* free for 1s \(compute.wait_for"):
        device.on_worker(WORKER, 1, own_pid)
    threading.Timer(0.5, ray.util.remove_placement_group, [other_job]).start()
    assert device.on_worker(WORKER, 60, own_pid) != os.getpid()
    assert capsys.readouterr().out.count("waiting for a worker of the cluster to be free") == 2


def test_lost_machine_of_a_worker_is_one_line_and_errors_are_raised(other_job):
    ray.util.remove_placement_group(other_job)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail() -> None:
        raise ValueError("of the function")

    with pytest.raises(UnreadableError, match="a worker or its machine was lost"):
        device.on_worker(WORKER, 60, die)
    with pytest.raises(ValueError, match="of the function"):
        device.on_worker(WORKER, 60, fail)


def test_ctrl_c_ends_the_wait_for_a_free_worker(other_job):
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        device.on_worker(WORKER, 600, own_pid)
    assert not [thread for thread in threading.enumerate() if thread.name == "ray"]


@pytest.mark.parametrize(
    ("free_gpus", "asked", "answers"),
    [([1, 1], ["a", "b"], 2), ([0, 1], ["b"], 1), ([0, 0], ["a", "b"], 1)],
)
def test_node_whose_gpus_are_in_use_is_asked_only_if_no_other_is_free(free_gpus, asked, answers):
    nodes = [{"NodeID": id_, "Alive": True, "Resources": {"CPU": 4, "GPU": 1}} for id_ in "ab"]
    free = {id_: Node(4, gpus) for id_, gpus in zip("ab", free_gpus, strict=True)}
    on_gpu = replace(WORKER, use_gpu=True)
    assert device._to_ask(nodes, free, on_gpu) == (asked, answers)
    assert device._to_ask(nodes, {}, WORKER) == (["a", "b"], 2)


def test_answers_of_nodes_are_those_that_come_in_time(ray_cluster):
    [node] = (node["NodeID"] for node in ray.nodes())
    unknown = "f" * len(node)
    found = calls.on_nodes({node, unknown}, 60, own_pid)
    assert list(found) == [node] and found[node] != os.getpid()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    assert calls.on_nodes({node}, 60, die) == {}
    assert calls.on_nodes({node}, 60, sleep, 0) == {node: 0}
    assert calls.on_nodes({node}, 2, sleep, 600) == {}
