"""One rank of a run, in a process of its own without Ray.

Calls what `workers.worker.work` calls under Ray, and installs the fault that this rank will have.

The processes are forked from a server that has only imported the modules; see `helpers.forked`.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401 - imported once in the server, not in each rank
import torch
import torch.distributed as dist

from orchestrator.code_hashes import module_hashes
from orchestrator.errors import UserError
from orchestrator.runs import stop
from orchestrator.runs.facts import own_sources
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.stage import run_stage
from orchestrator.train.numerics import Worker
from orchestrator.workers import attempts, places
from orchestrator.workers import worker as worker_process
from tests.faults import hooks
from tests.helpers import forked

TIMEOUT_S = 60

# Both are kept: computed once in the server, not in each rank and command.
module_hashes("gpt2", "adamw")
own_sources()


class RankStarter:
    """Forks ranks and commands from a server process that has imported their modules once.

    Args:
        modules: More modules to import there.
        with_mlflow: Also import mlflow there.
    """

    def __init__(self, *modules: str, with_mlflow: bool = False) -> None:
        self.modules = [*modules, *(["mlflow.tracking"] if with_mlflow else [])]

    def start(self, jobs: list[dict[str, Any]], target: Callable[..., None] | None = None) -> Any:
        """Start a process for each job: a rank, or `target(job)`."""
        return forked.start(target or work, jobs, *self.modules)


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
    folder = RunFolder(run_dir)
    if "sweep_dir" not in job:
        os.environ.update(job.get("environments", {}).get(str(rank), {}))
        try:
            found = places.find(job, rank)
        except UserError:
            return  # Ray's driver would end all ranks
        if folder.ending_file.exists():
            return
    if "pids" in job:
        (Path(job["pids"]) / f"pid-{os.getpid()}").touch()
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job['store']}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
    if job.get("breaks"):
        from tests.faults.breaks import BREAKS

        BREAKS[job["breaks"]].install()
    if rank == 0:
        hooks.on_first_step(lambda: _note(job["first_step"], ""))
    for fault in job["faults"]:
        if fault["rank"] == rank or fault.get("everywhere"):
            _install(fault, job["met"])
    place = Worker(rank, world, cpus=1)
    if "sweep_dir" in job:
        _run_stage(folder, place, SweepFolder(job["sweep_dir"]))
        return
    worker_process.train(found, replace(place, has_folder=found.is_shared), job)


def _run_stage(folder: RunFolder, worker: Worker, sweep: SweepFolder) -> None:
    """Do what `StageTrainable` does for a stage."""
    listener = stop.Listener(sweep) if worker.is_main else None
    try:
        for _ in run_stage(folder, worker, listener or _not_asked):
            pass
    except Exception as error:
        # As there: an error of the connection only says that another rank died.
        if worker.is_main and "gloo" not in str(error):
            attempts.record_failure(folder, worker, error)
        raise


def _not_asked() -> bool:
    return False


def _install(fault: dict[str, Any], met: str) -> None:
    """Prepare this process for its fault."""

    def note(moment: str) -> None:
        _note(met, moment)

    kind = fault["kind"]
    if kind == "full":
        hooks.fill_disk(1 + int(fault["place"] * 3), note)
    elif kind in hooks.ERRORS:
        hooks.fail(kind, fault, note)
    elif fault["moment"]:
        end = signal.SIGSTOP if kind == "hang" else signal.SIGKILL
        hooks.install(fault["moment"], fault["nth"], note, end)


def _note(path: str, moment: str) -> None:
    """Append a moment and the time to a file. All processes of a machine have the same clock."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    hooks.write(fd, json.dumps({"moment": moment, "at": time.monotonic()}).encode() + b"\n")
    os.close(fd)
