"""What every worker process of a run does. Only the workers import torch."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
from ray.train.collective import broadcast_from_rank_zero

from orchestrator import folders
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.errors import HeldError
from orchestrator.runs import lock, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker, agree
from orchestrator.workers import process_group
from orchestrator.workers.attempts import record_failure, start_workers_attempt
from orchestrator.workers.watchdog import Watchdog


def work(config: dict[str, Any]) -> None:
    """Train in one worker process of Ray."""
    folder = RunFolder(config["folder"])
    if is_over(folder, config["key"]):
        return
    rank = ray.train.get_context().get_world_rank()
    layout = Layout(**config["layout"])
    worker = process_group.worker_of(rank, layout)
    if layout.num_workers > 1:
        address = process_group.new_address() if worker.is_main else None
        process_group.join(broadcast_from_rank_zero(address), rank, layout)
    train(folder, worker, config)
    process_group.leave()


def is_over(folder: RunFolder, key: str | None) -> bool:
    """Return whether the workers must not start again."""
    if (folder.read_record() or {}).get("key") != key:
        return True  # the folder was removed or moved, which the driver reports
    # An earlier attempt of this launch may have recorded that the run must not go on.
    return folder.ending_file.exists()


def train(folder: RunFolder, worker: Worker, config: dict[str, Any]) -> None:
    """Train in this process, whose process group is ready. `config` is that of `work`."""
    with (
        folders.holding(folder.path),
        _only_writer(folder) if worker.is_main else contextlib.nullcontext(),
    ):
        try:
            number = 0
            if worker.is_main:
                number = start_workers_attempt(folder, config["launch"], worker.world_size)
            worker = replace(worker, attempt=agree(number, worker))
            experiment = parse_experiment(config["experiment"], "experiment")
            _train_watched(experiment, folder, Path(config["data_dir"]), worker)
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
    experiment: Experiment, folder: RunFolder, data_dir: Path, worker: Worker
) -> None:
    """Run the training loop under a watchdog, and stop it on request."""
    with Watchdog(folder, worker, experiment.compute.hang_after_s) as watchdog:
        listener = stop.Listener(folder) if worker.is_main else None
        trainer = Trainer(
            experiment,
            folder,
            data_dir,
            worker,
            stop_requested=listener or _not_asked,
            report_phase=watchdog.report_phase,
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
