"""Calls on a machine of the workers while others use the cluster, with a real Ray."""

import os
import signal
import threading

import pytest
import ray

from orchestrator.cluster import device
from orchestrator.cluster.layout import Layout
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

    with pytest.raises(UnreadableError, match="the machine of a worker was lost"):
        device.on_worker(WORKER, 60, die)
    with pytest.raises(ValueError, match="of the function"):
        device.on_worker(WORKER, 60, fail)
