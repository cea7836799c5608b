"""The cluster: finds it or starts one, and decides which workers a run has on it.

Eats an experiment; yields a `Layout`, or an error that shows what was asked and what there is.
"""

import atexit
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cluster import local as local_ray
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError

COLLECTIVE_TIMEOUT_S = 1800
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no call to the network that nobody asked for
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray's 2 s are the latency of every report and of the end
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each group of workers; `watch` looks itself, and sooner
}
# A thread that waits for another by spinning takes the CPU from it: beside one other busy process, two threads that spin
# for libgomp's 300,000 rounds make a step 20 times slower. 1,000 rounds cost a few percent on an idle machine, none 70 %.
WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
PASSED_ON = (
    "GOMP_SPINCOUNT",
    "TIKTOKEN_CACHE_DIR",
    "XDG_CACHE_HOME",
)  # a node's own environment may lack them


@dataclass(frozen=True)
class Layout:
    """What a run takes of the cluster: `num_workers` processes with `cpus_per_worker` CPUs, and one GPU each or none."""

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool


def connect(environment: dict[str, str] | None = None) -> None:
    """Join the cluster of $RAY_ADDRESS (`ray job submit` sets it), or start one on this machine for this process.

    Args:
        environment: variables of every worker process, where whoever starts them has no other way to set them.
    """
    import ray

    if ray.is_initialized():
        return
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # Ray tells at every start that a token protects the cluster, as it should.
    quiet = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        **({"runtime_env": {"env_vars": environment}} if environment else {}),
    }
    if address := os.environ.get("RAY_ADDRESS"):
        _probe(address)
        ray.init(**quiet)
    else:
        local_ray.start(**quiet)
    atexit.register(
        ray.shutdown
    )  # before Ray's own, which first waits half a second for what workers might still print
    logging.getLogger("ray.train").setLevel(logging.WARNING)


def _probe(address: str) -> None:
    """Refuse an address at which nobody answers: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "//" in address or not port.isdigit():
        return  # auto, local, ray://…
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS: no cluster answers at {address} ({error}); start one, or unset RAY_ADDRESS to use "
            f"this machine alone"
        ) from None


def job_id() -> str | None:
    """Ray's id of the submission, or of this driver where there is none; None without Ray."""
    import ray

    return os.environ.get("RAY_JOB_ID") or (
        ray.get_runtime_context().get_job_id() if ray.is_initialized() else None
    )


def has_several_nodes() -> bool:
    """Whether the connected cluster has, or may get, other machines than this one."""
    import ray

    return sum(n["Alive"] for n in ray.nodes()) > 1 or bool(os.environ.get("ESPALIER_AUTOSCALING"))


def check_storage(storage: str) -> None:
    """Several nodes must see one folder, and a relative path is another one on each."""
    if has_several_nodes() and not Path(storage).expanduser().is_absolute():
        raise UserError(
            f"storage: '{storage}' is relative and the cluster has or may get several nodes; set storage=… or "
            f"ESPALIER_STORAGE to an absolute path that all of them share"
        )


def capacity(asked: Layout) -> int:
    """How many groups of workers the connected cluster holds at a time."""
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return (
        places([(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes], asked)
        // asked.num_workers
    )


def layout(experiment: Experiment, recorded: Layout | None = None) -> Layout:
    """Resolve `compute` against the connected cluster.

    Args:
        recorded: an earlier attempt's layout; its CPUs per worker belong to the numerics, so they are kept.

    Raises:
        UserError: asked for more than there is, and the cluster does not grow.
    """
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return resolve_layout(
        experiment,
        [(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes],
        recorded,
        grows=bool(os.environ.get("ESPALIER_AUTOSCALING")),
    )


def resolve_layout(
    experiment: Experiment,
    nodes: list[tuple[int, int]],
    recorded: Layout | None = None,
    grows: bool = False,
) -> Layout:
    """`layout` as a pure function of `nodes`, a list of (CPUs, GPUs)."""
    c = experiment.compute
    cpus, gpus = sum(n[0] for n in nodes), sum(n[1] for n in nodes)
    if grows and not gpus and (c.use_gpu == "auto" or c.use_gpu and c.num_workers == "auto"):
        raise UserError(
            "compute.use_gpu: the cluster grows on demand and has no GPU yet; set compute.use_gpu to true or "
            "false, and compute.num_workers"
        )
    use_gpu = gpus > 0 if c.use_gpu == "auto" else c.use_gpu
    workers = c.num_workers
    if workers == "auto":
        devices = gpus if use_gpu else 1
        workers = max(w for w in range(1, max(devices, 1) + 1) if experiment.slots % w == 0)
        if workers < devices:
            print(
                f"{devices - workers} of {devices} GPUs stay idle: the {experiment.slots} reduction slots of "
                f"{experiment.micro_batches} micro-batches have no divisor nearer to {devices}; a smaller "
                f"train.micro_batch_size (now {experiment.train.micro_batch_size}) or another train.reduction_slots "
                f"would use them",
                flush=True,
            )
    per_worker = c.cpus_per_worker
    if per_worker == "auto":
        whole_node = max((n[0] for n in nodes), default=0) or 1
        per_worker = (
            recorded.cpus_per_worker
            if recorded
            else whole_node
            if workers == 1 and not use_gpu
            else 1
        )
        if recorded and places(nodes, Layout(workers, per_worker, use_gpu)) < workers and not grows:
            per_worker = whole_node if workers == 1 and not use_gpu else 1
            print(
                f"{recorded.cpus_per_worker} CPU(s) per worker, as before, do not fit {workers} worker(s) on this "
                f"cluster: with {per_worker} the last bits will differ from an uninterrupted run",
                flush=True,
            )
    asked = Layout(workers, per_worker, use_gpu)
    if places(nodes, asked) < workers and not grows:
        gpu = " and 1 GPU" if use_gpu else ""
        raise UserError(
            f"compute: asked for {workers} worker(s) with {per_worker} CPU(s){gpu} each, found {cpus} CPU(s) "
            f"and {gpus} GPU(s) on {len(nodes)} node(s); lower compute.num_workers or "
            f"compute.cpus_per_worker"
            + (", or set compute.use_gpu=false" if use_gpu and not gpus else "")
        )
    return asked


def places(nodes: list[tuple[int, int]], asked: Layout) -> int:
    """How many workers fit on `nodes`, (CPUs, GPUs) each; a worker lies on one node."""
    return sum(
        min(n[0] // asked.cpus_per_worker, n[1]) if asked.use_gpu else n[0] // asked.cpus_per_worker
        for n in nodes
    )


def worker_environment() -> dict[str, str]:
    """What the driver's environment says that workers on any node must know."""
    return WORKER_ENVIRONMENT | {key: os.environ[key] for key in PASSED_ON if key in os.environ}
