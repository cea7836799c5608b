"""Trains as one rank of a run, without Ray, as torchrun does: `train_rank.py JSON`."""

import json
import os
import signal
import sys
import uuid
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from orchestrator.config.experiment import load_experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.train import state
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker
from orchestrator.train.ranks import regions
from tests.helpers import forked


def start(
    folder: RunFolder,
    data_dir: Path,
    overrides: list[str],
    world: int,
    nodes: str = "",
    killed_after: int | None = None,
    bucket: int | None = None,
) -> list[BaseProcess]:
    """Start the ranks of a run, forked from a server.

    Args:
        folder: Folder of the run.
        data_dir: Folder of the tokens.
        overrides: The experiment.
        world: Number of ranks.
        nodes: A letter for the node of each.
        bucket: Numbers in the smallest bucket of gradients.
        killed_after: Once there is a checkpoint of this step, rank 0 waits in a step to be killed.
    """
    job = {
        "world_size": world,
        "store": f"{folder.path}-store-{uuid.uuid4().hex}",
        "run_dir": str(folder.path),
        "data_dir": str(data_dir),
        "overrides": overrides,
        "killed_after": killed_after,
        "bucket": bucket,
    }
    jobs = [job | {"rank": rank, "node": nodes[rank : rank + 1]} for rank in range(world)]
    return forked.start(work, jobs)


def work(job: dict) -> None:
    """Train as the rank that the job describes, and end the process."""
    if job["world_size"] > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job['store']}",
            rank=job["rank"],
            world_size=job["world_size"],
        )
    if job.get("node"):
        state.node_digest = lambda: job["node"].encode().hex()
    if job.get("bucket"):
        regions.LEAST_BUCKET = regions.LEAST_OVERLAPPING_BUCKET = job["bucket"]
    folder = RunFolder(job["run_dir"])
    killed_after = job.get("killed_after")

    def wait_to_be_killed() -> bool:
        if job["rank"] == 0 and max(folder.checkpoint_steps(), default=0) >= killed_after:
            signal.pause()
        return False

    trainer = Trainer(
        load_experiment(job.get("file"), job["overrides"]),
        folder,
        Path(job["data_dir"]),
        Worker(job["rank"], job["world_size"], "cpu", cpus=1),
        stop_requested=None if killed_after is None else wait_to_be_killed,
    )
    for _ in trainer.run():
        pass
    sys.stdout.flush()
    os._exit(0)  # torch's shutdown of gloo can deadlock or abort if the other rank has ended


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
