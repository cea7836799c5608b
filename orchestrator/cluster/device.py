"""The model of the device that workers compute on, which is part of the keys of stages."""

import socket
from dataclasses import replace

from orchestrator import machine
from orchestrator.cluster.layout import Layout


def with_device_name(layout: Layout) -> Layout:
    """Return a layout with the name of its device. On a cluster, a worker looks it up."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if [node["NodeManagerHostname"] for node in nodes] == [socket.gethostname()]:
        return here(layout)
    task = ray.remote(num_cpus=layout.cpus_per_worker, num_gpus=int(layout.use_gpu))(here)
    return ray.get(task.remote(layout))


def here(layout: Layout) -> Layout:
    """Return a layout with the name of this machine's device."""
    name = machine.gpu_name() if layout.use_gpu else machine.processor()
    return replace(layout, device_name=name)
