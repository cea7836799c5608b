"""The device that workers compute on: its model, and the type that it computes fast."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from orchestrator import machine
from orchestrator.cluster import dtypes, private
from orchestrator.cluster.calls import interruptibly
from orchestrator.cluster.layout import Layout, Node, has_several_nodes
from orchestrator.errors import UnreadableError
from orchestrator.text import duration

POLL_S = 1.0  # Ray takes whole seconds only
SILENT_S = 3.0  # until a line says that a worker is waited for
T = TypeVar("T")


def of_workers(layout: Layout, wait_s: float) -> Layout:
    """Return the layout with the device of its workers.

    Raises:
        UnreadableError: No worker was free for `wait_s`.
    """
    if not has_several_nodes():
        return here(layout)
    return interruptibly(lambda: common(_on_each_node(layout, wait_s)))


def _on_each_node(layout: Layout, wait_s: float) -> list[Layout]:
    """Return `here` of each node that can have a worker.

    On GPUs, of each node with a free one. If there is none, waits for one.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = int(layout.use_gpu)
    task = ray.remote(here)
    ids, number = _to_ask(ray.nodes(), private.free_nodes() if gpus else {}, layout)
    answers = []
    for id_ in ids:
        place: Any = NodeAffinitySchedulingStrategy(id_, soft=True)
        options = task.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=place)
        answers.append(options.remote(layout))
    if not answers:  # the cluster grows
        answers = [task.options(num_cpus=layout.cpus_per_worker, num_gpus=gpus).remote(layout)]
    _wait_for_free(
        lambda s: len(ray.wait(answers, num_returns=number, timeout=s)[0]) == number, wait_s
    )
    found, others = ray.wait(answers, num_returns=len(answers), timeout=0)
    for answer in others:
        ray.cancel(answer)  # else it would take a GPU later
    with _losses():
        return ray.get(found)


def _to_ask(
    nodes: list[dict[str, Any]], free: Mapping[str, Node], layout: Layout
) -> tuple[list[str], int]:
    """Return the ids of the nodes to ask, and how many answers to wait for.

    Another job may have all GPUs of a node for days.

    Args:
        nodes: What Ray knows of each node.
        free: GPUs of each node that nothing uses now.
        layout: Resources of a worker.
    """
    gpus = int(layout.use_gpu)
    able = [
        node["NodeID"]
        for node in nodes
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= layout.cpus_per_worker
        and node["Resources"].get("GPU", 0) >= gpus
    ]
    ready = [id_ for id_ in able if not gpus or (id_ in free and free[id_].gpus >= gpus)]
    return ready or able, len(ready) or 1


def common(found: list[Layout]) -> Layout:
    """Return the layout with all devices of some nodes, and a type that none of them emulates."""
    names = ", ".join(sorted({layout.device_name for layout in found}))
    slowest = max(found, key=lambda layout: layout.fast_dtype != "bfloat16")
    return replace(slowest, device_name=names)


def on_worker(layout: Layout, wait_s: float, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on a machine of the workers, with the resources of a worker.

    Raises:
        UnreadableError: No worker was free for `wait_s`, or it was lost.
    """
    if not has_several_nodes():
        return function(*arguments)
    # The machine of the driver may be of another kind.
    return interruptibly(lambda: _on_free_worker(layout, wait_s, function, *arguments))


def _on_free_worker(
    layout: Layout, wait_s: float, function: Callable[..., T], *arguments: Any
) -> T:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    needs = {"CPU": layout.cpus_per_worker, **({"GPU": 1} if layout.use_gpu else {})}
    # Ray tells when a group has its resources, but not when a task begins.
    group = ray.util.placement_group([needs])
    try:
        _wait_for_free(group.wait, wait_s)
        task = ray.remote(function).options(
            num_cpus=layout.cpus_per_worker,
            num_gpus=int(layout.use_gpu),
            max_retries=0,  # another node might never be free
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )
        with _losses():
            return ray.get(task.remote(*arguments))
    finally:
        ray.util.remove_placement_group(group)


@contextlib.contextmanager
def _losses() -> Iterator[None]:
    """Convert errors of Ray, other than those of a function that it called, to UnreadableError."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise UnreadableError(
            f"a worker or its machine was lost ({type(error).__name__}); run the same command again"
        ) from None


def _wait_for_free(is_free: Callable[[float], bool], wait_s: float) -> None:
    """Wait until a worker is free. `is_free` waits as many seconds as it is given."""
    if is_free(min(SILENT_S, wait_s)):
        return
    wait = f"{duration(wait_s)} (compute.wait_for_nodes_s)"
    print(f"waiting for a worker of the cluster to be free, for {wait} at most", flush=True)
    deadline = time.monotonic() + wait_s
    while not is_free(POLL_S):  # short calls, because a signal does not interrupt one
        if time.monotonic() > deadline:
            raise UnreadableError(
                f"no worker of the cluster was free for {wait}; run the same command again later"
            )


def here(layout: Layout) -> Layout:
    """Return the layout with the device of this machine."""
    name = _gpu_name() if layout.use_gpu else machine.processor()
    return replace(layout, device_name=name, fast_dtype=dtypes.fast_dtype(layout.use_gpu))


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
