"""Choose the workers of a run on the connected Ray cluster."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.config.checks import change_for_slots
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError

COLLECTIVE_TIMEOUT_S = 1800
# A thread that spins while it waits for another thread may take the CPU from it. With libgomp's
# default of 300,000 rounds and one other busy process, a step of two threads is 20 times slower.
# On an idle machine, 1,000 rounds cost a few percent, and no rounds 70 %.
WORKER_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "1000",
    # With Ray's 20 s, a cut of the network of 15 s would end the workers: TCP sends again at 26 s.
    "RAY_grpc_keepalive_timeout_ms": "60000",
}
# Variables of the driver that are passed on to workers on other nodes.
PASSED_ON = (*WORKER_ENVIRONMENT, "TIKTOKEN_CACHE_DIR", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Layout:
    """The worker processes of a run.

    Attributes:
        num_workers: Number of processes.
        cpus_per_worker: CPUs of each, and threads.
        use_gpu: Whether each has one GPU.
        device_name: Model of the GPU, or of the processor of a worker without one; empty if it is
            not known. Sweeps need it.
        fast_dtype: Type with the fastest matrix products on their devices; see `dtypes`.
        micro_batch_size: What `train.micro_batch_size=auto` stands for; None: it was not measured.
    """

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool
    device_name: str = ""
    fast_dtype: str = "float32"
    micro_batch_size: int | None = None

    @property
    def device(self) -> str:
        """Torch device of a worker. Ray shows each worker only its own GPU."""
        return "cuda:0" if self.use_gpu else "cpu"


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine."""

    cpus: int
    gpus: int = 0


# ---- the cluster ----


def has_several_nodes() -> bool:
    """Return whether the connected cluster has, or may get, more than one machine."""
    return len(alive_nodes()) > 1 or cluster_grows()


def capacity(layout: Layout, apart: object = None) -> int:
    """Return how many groups of workers fit on the connected cluster at the same time.

    Args:
        layout: The workers of a group.
        apart: Storage of nodes that share nothing else: each group is on one node.

    Raises:
        UserError: A group has room on all nodes together, but not on one.
    """
    nodes = alive_nodes()
    room = groups(nodes, layout, together=apart is not None)
    if not room and groups(nodes, layout) and not cluster_grows():
        each = f"{layout.cpus_per_worker} CPU(s){' and a GPU' if layout.use_gpu else ''}"
        raise UserError(
            f"compute.num_workers: no node has room for {layout.num_workers} workers with {each} "
            f"each, and with storage={apart} on several nodes, all workers of a stage are on one; "
            "set compute.num_workers to fewer, or storage=… to a folder that all nodes share, and "
            f"mirror={apart}"
        )
    return room


def worker_environment() -> dict[str, str]:
    """Return the environment variables that a worker process needs on any node."""
    passed_on = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    return WORKER_ENVIRONMENT | passed_on


def alive_nodes() -> list[Node]:
    """Return the machines of the connected cluster."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node_of(resources) for resources in alive]


def node_of(resources: Mapping[str, float]) -> Node:
    """Return the machine that has these resources of Ray."""
    return Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def cluster_grows() -> bool:
    """Return whether the cluster adds machines on demand."""
    return bool(os.environ.get("ESPALIER_AUTOSCALING"))


# ---- the workers of a run ----


def find_layout(experiment: Experiment, recorded: Layout | None = None) -> Layout:
    """Return `resolve_layout` for the nodes of the connected cluster."""
    # A node of a cluster that others started may be back later: `room.Room` waits for it.
    is_shared = os.environ.get("RAY_ADDRESS", "") not in ("", "local")
    waits = is_shared and recorded is not None
    return resolve_layout(experiment, alive_nodes(), recorded, cluster_grows(), waits)


def resolve_layout(
    experiment: Experiment,
    nodes: list[Node],
    recorded: Layout | None = None,
    grows: bool = False,
    waits: bool = False,
) -> Layout:
    """Choose workers and devices as the section `compute` requires.

    Args:
        experiment: The configuration.
        nodes: The machines of the cluster.
        recorded: Layout of the last attempt. Its CPUs per worker are kept if they fit, because
            the number of threads affects the last bits of the result.
        grows: Whether the cluster adds machines on demand.
        waits: Return a layout that does not fit now, for a run that has begun.

    Raises:
        UserError: The workers do not fit, and the cluster neither grows nor waits.
    """
    use_gpu = _resolve_use_gpu(experiment, nodes, grows)
    numbers = experiment.compute.worker_counts or [_automatic_workers(experiment, nodes, use_gpu)]
    cpus = experiment.compute.cpus_per_worker
    if cpus == "auto":
        cpus = _resolve_cpus(nodes, numbers, use_gpu, recorded, grows)
    layout = Layout(max(numbers), cpus, use_gpu)
    if grows:
        return layout
    room = places(nodes, layout)
    if room < min(numbers) and waits:
        return replace(layout, num_workers=min(numbers))
    if room < min(numbers):
        raise _too_much(experiment, nodes, replace(layout, num_workers=min(numbers)))
    return replace(layout, num_workers=max(number for number in numbers if number <= room))


def places(nodes: Iterable[Node], layout: Layout) -> int:
    """Return how many workers fit on the nodes. A worker needs all its CPUs on one node."""
    total = 0
    for node in nodes:
        fitting = node.cpus // layout.cpus_per_worker
        total += min(fitting, node.gpus) if layout.use_gpu else fitting
    return total


def groups(nodes: Iterable[Node], layout: Layout, together: bool = False) -> int:
    """Return how many groups of workers fit on the nodes at the same time.

    Args:
        nodes: The machines.
        layout: The workers of a group.
        together: Each group must be on one node.
    """
    if together:
        return sum(groups([node], layout) for node in nodes)
    return places(nodes, layout) // layout.num_workers


def _resolve_use_gpu(experiment: Experiment, nodes: list[Node], grows: bool) -> bool:
    compute = experiment.compute
    has_gpu = any(node.gpus > 0 for node in nodes)
    if compute.use_gpu is False:
        return False
    if grows and not has_gpu and "auto" in (compute.use_gpu, compute.num_workers):
        raise UserError(
            "compute.use_gpu: the cluster grows on demand and has no GPU yet; set compute.use_gpu "
            "to true or false, and compute.num_workers"
        )
    return has_gpu or compute.use_gpu is True


def _automatic_workers(experiment: Experiment, nodes: list[Node], use_gpu: bool) -> int:
    """Return as few workers as make the shortest steps on the GPUs."""
    slots = experiment.slots
    devices = max(1, sum(node.gpus for node in nodes)) if use_gpu else 1
    workers = _useful_workers(slots, devices)
    if workers < devices:
        message = (
            f"{devices - workers} of {devices} GPUs stay idle: with the {slots} reduction slots of "
            f"{experiment.micro_batches} micro-batches, more than {workers} would not be faster"
        )
        most = workers
        for more in (slots << i for i in range(1, devices.bit_length() + 3)):
            changes = change_for_slots(experiment, more)
            if changes and _useful_workers(more, devices) > most:
                most = _useful_workers(more, devices)
                ways = " and ".join(changes)
        if most > workers:
            message += f"; {ways} would use {most}"
        print(message, flush=True)
    return workers


def _useful_workers(slots: int, devices: int) -> int:
    """Return the fewest workers with which no worker has more slots than with all devices."""
    most_slots = -(-slots // min(slots, devices))
    return -(-slots // most_slots)


def _resolve_cpus(
    nodes: list[Node],
    numbers: Sequence[int],
    use_gpu: bool,
    recorded: Layout | None,
    grows: bool,
) -> int:
    """Return the CPUs per worker: as recorded, else all for one worker without a GPU, else 1."""
    cpus = 1
    workers = min(numbers)
    if max(numbers) == 1 and not use_gpu:
        cpus = max((node.cpus for node in nodes), default=0) or 1
    if recorded is None:
        return cpus
    before = recorded.cpus_per_worker
    if grows or places(nodes, Layout(workers, before, use_gpu)) >= workers:
        return before
    print(
        f"{before} CPU(s) per worker, as in the last attempt, are too many for {workers} worker(s) "
        f"on this cluster: with {cpus} the last bits will differ from an uninterrupted run",
        flush=True,
    )
    return cpus


def _too_much(experiment: Experiment, nodes: list[Node], layout: Layout) -> UserError:
    cpus = sum(node.cpus for node in nodes)
    gpus = sum(node.gpus for node in nodes)
    message = (
        f"compute: asked for {layout.num_workers} worker(s) with {layout.cpus_per_worker} CPU(s)"
        f"{' and 1 GPU' if layout.use_gpu else ''} each, found {cpus} CPU(s) and {gpus} GPU(s) on "
        f"{len(nodes)} node(s)"
    )
    smaller = _largest_that_fits(experiment.slots, nodes, layout)
    if smaller is not None:
        message += (
            f"; set compute.num_workers={smaller.num_workers} and "
            f"compute.cpus_per_worker={smaller.cpus_per_worker}"
        )
    elif layout.use_gpu and cpus:
        message += "; set compute.use_gpu=false"
    return UserError(message)


def _largest_that_fits(slots: int, nodes: list[Node], layout: Layout) -> Layout | None:
    """Return the layout with the most workers that fits; with fewer CPUs each if none fits."""
    cpus = min(layout.cpus_per_worker, max((node.cpus for node in nodes), default=0))
    for cpus_per_worker in range(cpus, 0, -1):
        room = places(nodes, Layout(1, cpus_per_worker, layout.use_gpu))
        workers = min(room, layout.num_workers, slots)
        if workers:
            return Layout(workers, cpus_per_worker, layout.use_gpu)
    return None
