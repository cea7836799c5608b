"""One rank of a run, in a process of its own without Ray.

Does what `workers.ray_train._work` does under Ray, and installs the fault that this rank will have.

The processes are forked from a server that has only imported the modules. So a start takes a tenth
of a second, and the server has no threads of torch when it forks.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401 - imported once in the server, not in each rank
import torch
import torch._dynamo  # noqa: F401 - else the first optimizer of each rank imports it
import torch.distributed as dist

from orchestrator.config.experiment import load_experiment
from orchestrator.runs import lock
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker, agree
from orchestrator.workers import ray_train
from tests.faults import hooks

TIMEOUT_S = 60


class RankStarter:
    """Forks ranks from a server process that has imported torch once."""

    def __init__(self) -> None:
        os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])

    def start(self, jobs: list[dict[str, Any]]) -> list[Any]:
        processes = [self.context.Process(target=work, args=(job,)) for job in jobs]
        for process in processes:
            process.start()
        return processes


def work(job: dict[str, Any]) -> None:
    """Run one rank and end the process: with status 0, or 1 after an exception."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    try:
        _work(job, Path(job["run_dir"]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # the shutdown of gloo can deadlock


def _work(job: dict[str, Any], run_dir: Path) -> None:
    rank = job["rank"]
    world = job["world"]
    fault = job["fault"]
    folder = RunFolder(run_dir)

    def note(moment: str) -> None:
        _note(job["met"], moment)

    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job['store']}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
    if rank == 0:
        hooks.on_first_step(lambda: _note(job["first_step"], ""))
    if fault and fault["rank"] == rank and fault["moment"]:
        end = signal.SIGSTOP if fault["kind"] == "hang" else signal.SIGKILL
        hooks.install(fault["moment"], fault["nth"], note, end)
    if fault and fault["kind"] == "full" and rank == 0:
        hooks.fill_disk(1 + int(fault["place"] * 3), note)
    experiment = load_experiment(None, job["overrides"])
    place = Worker(rank, world, cpus=1)
    with lock.held(folder.writer_lock, 60) if rank == 0 else contextlib.nullcontext():
        number = 0
        if rank == 0:
            number = ray_train.start_workers_attempt(folder, job["launch"], world)
        worker = Worker(rank, world, cpus=1, attempt=agree(number, place))
        ray_train.train_watched(experiment, folder, Path(job["data_dir"]), worker)


def _note(path: str, moment: str) -> None:
    """Append a moment and the time to a file. All processes of a machine have the same clock."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    hooks.write(fd, json.dumps({"moment": moment, "at": time.monotonic()}).encode() + b"\n")
    os.close(fd)
