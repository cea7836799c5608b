"""Join or start the Ray cluster, and choose the workers of a run."""

import atexit
import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.cluster import local
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError

COLLECTIVE_TIMEOUT_S = 1800
PROBE_S = 10
# The driver sets these variables before Ray starts.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no network traffic that the user did not ask for
    # Ray's default of 2 s would delay every report and the end of the run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The watcher needs one process for each group of workers. `RunWatch` finds drained nodes.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# A thread that spins while it waits for another thread may take the CPU from it. With libgomp's
# default of 300,000 rounds and one other busy process, a step of two threads is 20 times slower.
# On an idle machine, 1,000 rounds cost a few percent, and no rounds 70 %.
WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
# Variables of the driver that are passed on to workers on other nodes.
PASSED_ON = ("GOMP_SPINCOUNT", "TIKTOKEN_CACHE_DIR", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Layout:
    """The worker processes of a run.

    Attributes:
        num_workers: Number of processes.
        cpus_per_worker: CPUs of each, and threads.
        use_gpu: Whether each has one GPU.
    """

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool

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


def connect(environment: dict[str, str] | None = None) -> None:
    """Join the cluster of $RAY_ADDRESS, or start one on this machine for this process.

    `ray job submit` sets $RAY_ADDRESS.

    Args:
        environment: Variables of all Ray processes of this driver. None: no additional ones.

    Raises:
        UserError: No cluster answers at $RAY_ADDRESS.
    """
    import ray

    if ray.is_initialized():
        return
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # At every start, Ray would print that a token protects the cluster.
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if environment:
        settings["runtime_env"] = {"env_vars": environment}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _probe(address)
        ray.init(**settings)
    else:
        local.start(**settings)
    # Functions that are registered last run first. Ray's own function would wait half a second for
    # output of the workers.
    atexit.register(ray.shutdown)
    logging.getLogger("ray.train").setLevel(logging.WARNING)


def _probe(address: str) -> None:
    """Refuse an address that does not answer; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "//" in address or not port.isdigit():
        return  # such as auto, local, ray://…
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS: no cluster answers at {address} ({error}); start one, or unset "
            "RAY_ADDRESS to use this machine alone"
        ) from None


def job_id() -> str | None:
    """Return Ray's id of the submitted job, or of this driver; None if neither exists."""
    import ray

    submitted = os.environ.get("RAY_JOB_ID")
    if submitted:
        return submitted
    if not ray.is_initialized():
        return None
    return ray.get_runtime_context().get_job_id()


def has_several_nodes() -> bool:
    """Return whether the connected cluster has, or may get, more than one machine."""
    return len(_nodes()) > 1 or _grows()


def check_storage(storage: str) -> None:
    """Refuse a relative storage on several nodes: each node would use another folder.

    Raises:
        UserError: The path is relative and the cluster has or may get several nodes.
    """
    if has_several_nodes() and not Path(storage).expanduser().is_absolute():
        raise UserError(
            f"storage: '{storage}' is relative and the cluster has or may get several nodes; set "
            "storage=… or ESPALIER_STORAGE to an absolute path that all of them share"
        )


def capacity(layout: Layout) -> int:
    """Return how many groups of workers fit on the connected cluster at the same time."""
    return places(_nodes(), layout) // layout.num_workers


def worker_environment() -> dict[str, str]:
    """Return the environment variables that a worker process needs on any node."""
    passed_on = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    return WORKER_ENVIRONMENT | passed_on


def _nodes() -> list[Node]:
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in alive]


def _grows() -> bool:
    return bool(os.environ.get("ESPALIER_AUTOSCALING"))


# ---- the workers of a run ----


def find_layout(experiment: Experiment, recorded: Layout | None = None) -> Layout:
    """Return `resolve_layout` for the nodes of the connected cluster."""
    return resolve_layout(experiment, _nodes(), recorded, grows=_grows())


def resolve_layout(
    experiment: Experiment,
    nodes: list[Node],
    recorded: Layout | None = None,
    grows: bool = False,
) -> Layout:
    """Choose workers and devices as the section `compute` requires.

    Args:
        experiment: The configuration.
        nodes: The machines of the cluster.
        recorded: Layout of the last attempt. Its CPUs per worker are kept if they fit, because
            the number of threads affects the last bits of the result.
        grows: Whether the cluster adds machines on demand.

    Raises:
        UserError: The workers do not fit, and the cluster does not grow.
    """
    use_gpu = _resolve_use_gpu(experiment, nodes, grows)
    workers = _resolve_workers(experiment, nodes, use_gpu)
    cpus = experiment.compute.cpus_per_worker
    if cpus == "auto":
        cpus = _resolve_cpus(nodes, workers, use_gpu, recorded, grows)
    layout = Layout(workers, cpus, use_gpu)
    if places(nodes, layout) < workers and not grows:
        raise _too_much(nodes, layout)
    return layout


def places(nodes: Iterable[Node], layout: Layout) -> int:
    """Return how many workers fit on the nodes. A worker needs all its CPUs on one node."""
    total = 0
    for node in nodes:
        fitting = node.cpus // layout.cpus_per_worker
        total += min(fitting, node.gpus) if layout.use_gpu else fitting
    return total


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


def _resolve_workers(experiment: Experiment, nodes: list[Node], use_gpu: bool) -> int:
    """Return `num_workers`; for auto, the largest divisor of the slots for which there are GPUs."""
    if experiment.compute.num_workers != "auto":
        return experiment.compute.num_workers
    slots = experiment.slots
    devices = max(1, sum(node.gpus for node in nodes)) if use_gpu else 1
    workers = max(number for number in range(1, devices + 1) if slots % number == 0)
    if workers < devices:
        print(
            f"{devices - workers} of {devices} GPUs stay idle: the {slots} reduction slots of "
            f"{experiment.micro_batches} micro-batches have no divisor nearer to {devices}; a "
            f"smaller train.micro_batch_size (now {experiment.train.micro_batch_size}) or another "
            "train.reduction_slots would use them",
            flush=True,
        )
    return workers


def _resolve_cpus(
    nodes: list[Node], workers: int, use_gpu: bool, recorded: Layout | None, grows: bool
) -> int:
    """Return the CPUs per worker: as recorded, else all for one worker without a GPU, else 1."""
    cpus = 1
    if workers == 1 and not use_gpu:
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


def _too_much(nodes: list[Node], layout: Layout) -> UserError:
    cpus = sum(node.cpus for node in nodes)
    gpus = sum(node.gpus for node in nodes)
    message = (
        f"compute: asked for {layout.num_workers} worker(s) with {layout.cpus_per_worker} CPU(s)"
        f"{' and 1 GPU' if layout.use_gpu else ''} each, found {cpus} CPU(s) and {gpus} GPU(s) on "
        f"{len(nodes)} node(s); lower compute.num_workers or compute.cpus_per_worker"
    )
    if layout.use_gpu and gpus == 0:
        message += ", or set compute.use_gpu=false"
    return UserError(message)
