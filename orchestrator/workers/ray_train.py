"""Trains one run on Ray Train; Ray starts dead workers again.

Read `fit` first, then `worker.work`, which every worker process runs. Workers always continue from
our own newest valid checkpoint. Checkpoints are not reported to Ray, because Ray would copy them.

What Ray calls `world_rank` is our rank.
"""

import shutil
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.cluster import calls, train_here
from orchestrator.cluster.layout import Layout
from orchestrator.cluster.room import Room, WaitedTooLongError
from orchestrator.config.experiment import Experiment
from orchestrator.objects.address import Address
from orchestrator.own_code import sources
from orchestrator.runs import events, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import places
from orchestrator.workers.attempts import PATIENCE

MAX_FAILURES = 1000  # Ray's limit, in case our own count cannot be stored


def import_modules() -> None:
    """Import what `fit` needs, which takes some seconds."""
    import ray.train
    import ray.train.v2.api.data_parallel_trainer  # noqa: F401


def fit(
    experiment: Experiment,
    folder: RunFolder,
    data_dir: Path,
    layout: Layout,
    profile: int = 0,
    mirror: Address | None = None,
) -> None:
    """Train to the end. Start dead workers again for as long as that makes progress.

    Returns when the workers are done, also if the run stopped early: see `folder.read_ending`.

    Args:
        experiment: The configuration.
        folder: Folder of the run.
        data_dir: Folder of the token shards.
        layout: Workers and devices.
        profile: Steps of each attempt to profile; see `Profiler`.
        mirror: See `places.of_driver`.

    Raises:
        Exception: Ray's error if the workers failed; see `diagnose`.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from orchestrator.workers.same_error import SameErrorLimit

    launch = uuid.uuid4().hex[:8]
    trainer = DataParallelTrainer(
        _work,
        train_loop_config={
            **places.of_driver(folder, data_dir, mirror),
            "experiment": experiment.model_dump(),
            "layout": asdict(layout),
            "launch": launch,
            "profile": profile,
            "code": sources(),
        },
        scaling_config=ScalingConfig(
            **_workers(layout), label_selector=one_here(layout) if mirror else None
        ),
        run_config=RunConfig(
            name=launch,
            storage_path=str(folder.ray_scratch),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[SameErrorLimit(folder, PATIENCE)],
        ),
    )
    try:
        calls.interruptibly(lambda: train_here.fit_here(trainer, _room(experiment, folder, layout)))
    except TrainingFailedError as error:
        waited = getattr(error, "controller_failure", None)
        if not isinstance(waited, WaitedTooLongError):
            raise
        folder.write_ending(Ending("again", str(waited)))
    finally:
        shutil.rmtree(folder.ray_scratch, ignore_errors=True)


def _workers(layout: Layout) -> dict[str, Any]:
    """Return number and resources of the workers, as Ray Train takes them."""
    return {
        "num_workers": layout.num_workers,
        "use_gpu": layout.use_gpu,
        "resources_per_worker": _resources(layout),
    }


def one_here(layout: Layout) -> list[dict[str, str]] | None:
    """Return which nodes each worker may have: one of them needs this machine.

    None: this machine is too small for a worker, even if it is idle; `places.find` says so.
    """
    import ray

    own = ray.get_runtime_context().get_node_id()
    [here] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == own]
    if any(here.get(name, 0) < number for name, number in _resources(layout).items()):
        return None
    return [{"ray.io/node-id": own}, *({} for _ in range(layout.num_workers - 1))]


def _resources(layout: Layout) -> dict[str, float]:
    """Return the resources of a worker."""
    return {"CPU": layout.cpus_per_worker, **({"GPU": 1} if layout.use_gpu else {})}


def _room(experiment: Experiment, folder: RunFolder, layout: Layout) -> Room:
    """Return what decides how many workers start."""

    def newest_step() -> int:
        return max(folder.checkpoint_steps(), default=0)

    return Room(
        layout,
        experiment.compute.worker_counts or [layout.num_workers],
        experiment.compute.wait_for_nodes_s,
        newest_step=newest_step,
        stop_requested=lambda: stop.requested(folder),
        note=lambda kind, message: events.note(folder, kind, message, step=newest_step()),
    )


def _work(config: dict[str, Any]) -> None:
    from orchestrator.workers.worker import work

    work(config)
