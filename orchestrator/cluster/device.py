"""The device that workers compute on: its model, and the type that it computes fast."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from orchestrator import machine
from orchestrator.cluster import dtypes
from orchestrator.cluster.calls import interruptibly
from orchestrator.cluster.layout import Layout, has_several_nodes

SILENT_S = 3.0  # until a line says that a worker is waited for
T = TypeVar("T")


def of_workers(layout: Layout) -> Layout:
    """Return the layout with the device of its workers."""
    if not has_several_nodes():
        return here(layout)
    return interruptibly(lambda: common(_on_each_node(layout)))


def _on_each_node(layout: Layout) -> list[Layout]:
    """Return `here` of each node that can have a worker. On a GPU, waits for a free one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = int(layout.use_gpu)
    task = ray.remote(here)
    answers = []
    for node in ray.nodes():
        has = node["Resources"]
        if (
            node["Alive"]
            and has.get("CPU", 0) >= layout.cpus_per_worker
            and has.get("GPU", 0) >= gpus
        ):
            place: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
            options = task.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=place)
            answers.append(options.remote(layout))
    if not answers:  # the cluster grows
        answers = [task.options(num_cpus=layout.cpus_per_worker, num_gpus=gpus).remote(layout)]
    if ray.wait(answers, num_returns=len(answers), timeout=SILENT_S)[1]:
        print("waiting for a worker of the cluster to be free", flush=True)
    return ray.get(answers)


def common(found: list[Layout]) -> Layout:
    """Return the layout with all devices of some nodes, and a type that none of them emulates."""
    names = ", ".join(sorted({layout.device_name for layout in found}))
    slowest = max(found, key=lambda layout: layout.fast_dtype != "bfloat16")
    return replace(slowest, device_name=names)


def on_worker(layout: Layout, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on a machine of the workers. Waits for the resources of a worker."""
    if not has_several_nodes():
        return function(*arguments)
    import ray

    # The machine of the driver may be of another kind.
    options = {"num_cpus": layout.cpus_per_worker, "num_gpus": int(layout.use_gpu)}
    answer = ray.remote(function).options(**options).remote(*arguments)
    return interruptibly(lambda: ray.get(answer))


def here(layout: Layout) -> Layout:
    """Return the layout with the device of this machine."""
    name = _gpu_name() if layout.use_gpu else machine.processor()
    return replace(layout, device_name=name, fast_dtype=dtypes.fast_dtype(layout.use_gpu))


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
