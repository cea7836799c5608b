"""Trains one run on Ray Train; Ray starts dead workers again.

Read `fit` first, then `_work`, which every worker process runs. Workers always continue from our
own newest valid checkpoint. Checkpoints are not reported to Ray, because Ray would copy them.

What Ray calls `world_rank` is our rank.
"""

import contextlib
import os
import shutil
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator import files, folders, lines
from orchestrator.cluster import connection, private
from orchestrator.cluster.layout import COLLECTIVE_TIMEOUT_S, Layout, worker_environment
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.errors import HeldError
from orchestrator.runs import events, lock, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker, agree
from orchestrator.workers import hangs, memory
from orchestrator.workers.diagnose import ending_of_tracebacks, out_of_memory
from orchestrator.workers.watchdog import Watchdog

# Attempts in a row that may fail without a new checkpoint, or with the same error (`same_error`).
# Another attempt would fail too.
PATIENCE = 3
MAX_FAILURES = 1000  # Ray's limit, in case our own count cannot be stored
# On a network file system, the lock of a lost machine is freed when its lease ends, usually after
# 90 s.
WRITER_WAIT_S = 120


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
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestrator.workers.same_error import SameErrorLimit

    launch = uuid.uuid4().hex[:8]
    resources = {"CPU": layout.cpus_per_worker}
    if layout.use_gpu:
        resources["GPU"] = 1
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "experiment": experiment.model_dump(),
            "folder": str(folder.path),
            "data_dir": str(data_dir),
            "cpus": layout.cpus_per_worker,
            "launch": launch,
            "key": (folder.read_record() or {}).get("key"),
        },
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
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
            worker_runtime_env={"env_vars": worker_environment()},
        ),
    )
    private.drop_datasets_callback(trainer)
    controllers = private.controllers_of(trainer)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        if connection.failure() is None:
            private.abort(controllers)
        raise
    finally:
        shutil.rmtree(folder.ray_scratch, ignore_errors=True)


def _work(config: dict[str, Any]) -> None:
    """Train in one worker process of Ray."""
    import ray.train
    import ray.train.torch

    folder = RunFolder(config["folder"])
    if (folder.read_record() or {}).get("key") != config["key"]:
        return  # the folder was removed or moved, which the driver reports
    if folder.ending_file.exists():
        return  # an earlier attempt of this launch recorded that the run must not go on
    context = ray.train.get_context()
    rank = context.get_world_rank()
    world_size = context.get_world_size()
    device = str(ray.train.torch.get_device())
    worker = Worker(rank, world_size, device, config["cpus"])
    with (
        folders.holding(folder.path),
        _only_writer(folder) if worker.is_main else contextlib.nullcontext(),
    ):
        try:
            number = 0
            if worker.is_main:
                number = start_workers_attempt(folder, config["launch"], world_size)
            number = agree(number, worker)
            worker = Worker(rank, world_size, device, config["cpus"], number)
            experiment = parse_experiment(config["experiment"], "experiment")
            train_watched(experiment, folder, Path(config["data_dir"]), worker)
        except Exception as error:
            record_failure(folder, worker, error)
            raise


@contextlib.contextmanager
def _only_writer(folder: RunFolder) -> Iterator[None]:
    """Lock the run for this worker. A worker of a killed driver may still run for a while."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.held(folder.writer_lock, WRITER_WAIT_S))
        except HeldError as error:
            reason = (
                f"{error}, a worker of this run that does not end; end it and run the same command "
                "again"
            )
            folder.write_ending(Ending("user", reason))
            raise
        yield


def train_watched(
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


# ---- attempts ----


def start_workers_attempt(folder: RunFolder, launch: str, world_size: int) -> int:
    """Append this attempt to attempts.jsonl, and return its number in the whole run, from 1.

    Here an attempt is one start of the workers. In run.json (`identity.begin_attempt`) it is one
    start of the command, during which Ray may start the workers several times.

    Args:
        folder: Folder of the run.
        launch: Name of this call of `fit`. Attempts with another name belong to earlier commands.
        world_size: Number of workers.

    Raises:
        RuntimeError: Another attempt would not help. The ending is recorded, so that Ray's next
            attempt returns at once.
    """
    earlier = _read_attempts(folder)
    same_launch = [attempt for attempt in earlier if attempt["launch"] == launch]
    kill = memory.find_kill(folder) if same_launch else None
    if kill is not None:
        folder.write_ending(out_of_memory(kill))
        raise RuntimeError(kill.by)  # the other ranks wait for this one
    hangs.report(folder)

    step = max(folder.checkpoint_steps(), default=0)
    if [attempt["step"] for attempt in same_launch][-PATIENCE:] == [step] * PATIENCE:
        reason = f"{PATIENCE} attempts in a row failed between step {step} and the next checkpoint"
        last = "\n".join(folder.read_failures())
        details = f"; the last one:\n{last}" if last else ": workers died without a traceback"
        folder.write_ending(Ending("failed", reason + details))
        raise RuntimeError(reason)

    number = len(earlier) + 1
    if same_launch:
        message = f"attempt {number} begins at step {step}, because a worker died"
        events.note(folder, "restart", message, step=step)
    # `step` is that of the newest checkpoint, `pid` that of rank 0.
    start = {"launch": launch, "step": step, "workers": world_size, "pid": os.getpid()}
    lines.append(folder.attempts_file, start)
    return number


def _read_attempts(folder: RunFolder) -> list[dict[str, Any]]:
    found = [lines.parse(line, launch=str, step=int) for line in lines.read(folder.attempts_file)]
    return [attempt for attempt in found if attempt is not None]


def record_failure(folder: RunFolder, worker: Worker, error: Exception) -> None:
    """Store the traceback; record the ending if the next attempt would fail in the same way."""
    text = "".join(traceback.format_exception(error))
    ending = ending_of_tracebacks(folder, [text], worker.world_size)
    with contextlib.suppress(OSError):  # the driver gets the error itself
        if ending.kind in ("user", "again"):
            folder.write_ending(ending)
        files.write_atomically(folder.failure_file(worker.rank), text)
