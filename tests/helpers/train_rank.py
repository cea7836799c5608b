"""Trains as one rank of a run, without Ray, as torchrun does: `train_rank.py JSON`."""

import json
import os
import sys
import uuid
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from orchestrator.config.experiment import load_experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.train import state
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from tests.helpers import forked


def start(
    folder: RunFolder, data_dir: Path, overrides: list[str], world: int, nodes: str = ""
) -> list[BaseProcess]:
    """Start the ranks of a run, forked from a server. `nodes`: a letter for the node of each."""
    job = {
        "world_size": world,
        "store": f"{folder.path}-store-{uuid.uuid4().hex}",
        "run_dir": str(folder.path),
        "data_dir": str(data_dir),
        "overrides": overrides,
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
    train(
        load_experiment(job.get("file"), job["overrides"]),
        RunFolder(job["run_dir"]),
        Path(job["data_dir"]),
        Worker(job["rank"], job["world_size"], "cpu", cpus=1),
    )
    sys.stdout.flush()
    os._exit(0)  # torch's shutdown of gloo can deadlock or abort if the other rank has ended


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
