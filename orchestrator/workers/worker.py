"""What every worker process of a run does. Only the workers import torch."""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
from ray.train.collective import broadcast_from_rank_zero

from orchestrator import folders
from orchestrator.cluster import nodes
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.errors import HeldError
from orchestrator.own_code import register
from orchestrator.runs import lock, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker, agree
from orchestrator.workers import places, process_group
from orchestrator.workers.attempts import record_failure, start_workers_attempt
from orchestrator.workers.profiler import Profiler
from orchestrator.workers.watchdog import Watchdog


def work(config: dict[str, Any]) -> None:
    """Train in one worker process of Ray."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    found = places.find(config, rank)
    folder = found.folder
    layout = replace(Layout(**config["layout"]), num_workers=context.get_world_size())
    worker = replace(process_group.worker_of(rank, layout), has_folder=found.is_shared)
    # An earlier attempt of this launch may have recorded that the run must not go on.
    is_over = folder.ending_file.exists()
    if layout.num_workers > 1:
        address = process_group.new_address() if worker.is_main else None
        # Rank 0 decides: another rank may see its files later.
        is_over, address, host, software = broadcast_from_rank_zero(
            (is_over, address, socket.gethostname(), nodes.software())
        )
        nodes.require_software(host, software)
        if not is_over:
            process_group.join(address, rank, layout)
    if is_over:
        return
    train(found, worker, config)
    process_group.leave()


def train(found: places.Places, worker: Worker, config: dict[str, Any]) -> None:
    """Train in this process, whose process group is ready. `config` is that of `work`."""
    folder = found.folder
    with (
        folders.holding(folder.path),
        _only_writer(folder) if worker.is_main else contextlib.nullcontext(),
    ):
        try:
            number = 0
            if worker.is_main:
                number = start_workers_attempt(folder, config["launch"], worker.world_size)
            worker = replace(worker, attempt=agree(number, worker))
            register(config["code"])
            experiment = parse_experiment(config["experiment"], "experiment")
            profiled = config["profile"] if worker.is_main else 0
            _train_watched(experiment, folder, found.data_dir, worker, profiled)
        except Exception as error:
            record_failure(folder, worker, error)
            raise


@contextlib.contextmanager
def _only_writer(folder: RunFolder) -> Iterator[None]:
    """Lock the run for this worker. A worker of a killed driver may still run for a while."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.held(folder.writer_lock, lock.WRITER_WAIT_S))
        except HeldError as error:
            reason = (
                f"{error}, a worker of this run that does not end; end it and run the same command "
                "again"
            )
            folder.write_ending(Ending("user", reason))
            raise
        yield


def _train_watched(
    experiment: Experiment, folder: RunFolder, data_dir: Path, worker: Worker, profiled: int
) -> None:
    """Run the training loop under a watchdog, and stop it on request. Profile some steps."""
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(folder, worker, experiment.compute.hang_after_s))
        report_phase = watchdog.report_phase
        if profiled:
            profiler = stack.enter_context(Profiler(folder, profiled, report_phase))
            report_phase = profiler.report_phase
        listener = stop.Listener(folder) if worker.is_main else None
        trainer = Trainer(
            experiment,
            folder,
            data_dir,
            worker,
            stop_requested=listener or _not_asked,
            report_phase=report_phase,
        )
        try:
            for _ in trainer.run():
                pass
        finally:
            if listener is not None:
                listener.close()


def _not_asked() -> bool:
    """Return False: only the answer of rank 0 counts."""
    return False
