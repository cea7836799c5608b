"""One worker of a run without Ray, in a process of its own: what `workers._work` does under Ray, plus the fault it is to meet.

Processes are forked from a server that has imported everything and done nothing: a start costs a tenth of a second, and no
thread of torch was alive when it was copied.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401 - imported once, before any rank is
import torch
import torch._dynamo  # noqa: F401 - the first optimizer would import it
import torch.distributed as dist

from orchestrator.config.experiment import load_experiment
from orchestrator.runs import lock
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker, agree
from orchestrator.workers import ray_train
from tests.faults import hooks

TIMEOUT_S = 60


def work(job: dict[str, Any]) -> None:
    """The life of one rank; its end is the process's, with Python's statuses."""
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
    os._exit(0)  # gloo's own end can deadlock


def _work(job: dict[str, Any], run_dir: Path) -> None:
    rank, world, fault = job["rank"], job["world"], job["fault"]
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job['store']}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
    if rank == 0:
        hooks.tell_first_step(lambda: _note(job["first_step"], ""))
    if fault and fault["rank"] == rank and fault["moment"]:
        end = signal.SIGSTOP if fault["kind"] == "hang" else signal.SIGKILL
        hooks.install(fault["moment"], fault["nth"], lambda moment: _note(job["met"], moment), end)
    if fault and fault["kind"] == "full" and rank == 0:
        hooks.fill_disk(1 + int(fault["place"] * 3), lambda moment: _note(job["met"], moment))
    experiment, place = load_experiment(None, job["overrides"]), Worker(rank, world, cpus=1)
    with lock.held(RunFolder(run_dir).writer_lock, 60) if rank == 0 else contextlib.nullcontext():
        number = 0
        if rank == 0:
            number = ray_train.start_workers_attempt(RunFolder(run_dir), job["launch"], world)
        worker = Worker(rank, world, cpus=1, attempt=agree(number, place))
        ray_train.train_watched(experiment, RunFolder(run_dir), Path(job["data_dir"]), worker)


def _note(path: str, moment: str) -> None:
    """Leave word of what happens now, and when; the clock is the machine's, the same for all processes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    hooks.write(fd, json.dumps({"moment": moment, "at": time.monotonic()}).encode() + b"\n")
    os.close(fd)
