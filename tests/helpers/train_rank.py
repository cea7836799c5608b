"""Trains as one rank of a run, without Ray, as torchrun does: `train_rank.py JSON`."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from orchestrator.config.experiment import load_experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker

job = json.loads(sys.argv[1])
if job["world_size"] > 1:
    dist.init_process_group(
        "gloo", init_method=f"file://{job['store']}", rank=job["rank"], world_size=job["world_size"]
    )
train(
    load_experiment(job.get("file"), job["overrides"]),
    RunFolder(job["run_dir"]),
    Path(job["data_dir"]),
    Worker(job["rank"], job["world_size"], "cpu", cpus=1),
)
sys.stdout.flush()
os._exit(0)  # torch's shutdown of gloo can deadlock or abort if the other rank has ended
