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
from orchestrator.config.experiment import Experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.workers.attempts import PATIENCE

MAX_FAILURES = 1000  # Ray's limit, in case our own count cannot be stored


def import_modules() -> None:
    """Import what `fit` needs, which takes some seconds."""
    import ray.train
    import ray.train.v2.api.data_parallel_trainer  # noqa: F401


def fit(experiment: Experiment, folder: RunFolder, data_dir: Path, layout: Layout) -> None:
    """Train to the end. Start dead workers again for as long as that makes progress.

    Returns when the workers are done, also if the run stopped early: see `folder.read_ending`.

    Args:
        experiment: The configuration.
        folder: Folder of the run.
        data_dir: Folder of the token shards.
        layout: Workers and devices.

    Raises:
        Exception: Ray's error if the workers failed; see `diagnose`.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from orchestrator.workers.same_error import SameErrorLimit

    launch = uuid.uuid4().hex[:8]
    resources = {"CPU": layout.cpus_per_worker}
    if layout.use_gpu:
        resources["GPU"] = 1
    trainer = DataParallelTrainer(
        _work,
        train_loop_config={
            "experiment": experiment.model_dump(),
            "folder": str(folder.path),
            "data_dir": str(data_dir),
            "layout": asdict(layout),
            "launch": launch,
            "key": (folder.read_record() or {}).get("key"),
        },
        scaling_config=ScalingConfig(
            num_workers=layout.num_workers,
            use_gpu=layout.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=launch,
            storage_path=str(folder.ray_scratch),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[SameErrorLimit(folder, PATIENCE)],
        ),
    )
    try:
        calls.interruptibly(lambda: train_here.fit_here(trainer))
    finally:
        shutil.rmtree(folder.ray_scratch, ignore_errors=True)


def _work(config: dict[str, Any]) -> None:
    from orchestrator.workers.worker import work

    work(config)
