"""Ray Train around the training loop: keeps the workers of one run going to its end.

Eats an experiment and the folders of its run and its tokens; yields a run that ended or an error that says why not.
Ray restarts dead workers; where they go on is ours to say (`latest_valid()`), and Ray is handed no checkpoint. Its
words are translated here, once: world_rank is our rank, ScalingConfig's worker is our worker.
"""

import contextlib
import json
import os
import shutil
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator import files
from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster.layout import COLLECTIVE_TIMEOUT_S, Layout, worker_environment
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.errors import HeldError
from orchestrator.files import write_atomically
from orchestrator.runs import events, lock, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker, agree
from orchestrator.workers import memory, watchdog
from orchestrator.workers.diagnose import ending_of_tracebacks, out_of_memory
from orchestrator.workers.watchdog import Watchdog

PATIENCE = 3  # attempts in a row that may end where they began, before a fault is taken for a bug
MAX_FAILURES = 1000  # whatever they are: an end, where not even the attempts can be written down
WRITER_WAIT_S = 120  # a network file system frees the lock of a machine that is gone after its lease, 90 s as a rule


def fit(experiment: Experiment, run_dir: Path, data_dir: Path, asked: Layout) -> None:
    """Train to the end on Ray Train, restarting dead workers for as long as restarts get anywhere.

    Returns when the workers are done, also where the run stopped itself (see `stopped.json`). Raises Ray's error where
    they could not be run.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

    launch = uuid.uuid4().hex[:8]
    scratch = (
        run_dir / ".ray"
    )  # Ray's own snapshot of the run: a convenience of this attempt, never the truth
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "experiment": experiment.model_dump(),
            "run_dir": str(run_dir),
            "data_dir": str(data_dir),
            "cpus": asked.cpus_per_worker,
            "launch": launch,
        },
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=asked.num_workers,
            use_gpu=asked.use_gpu,
            resources_per_worker={
                "CPU": asked.cpus_per_worker,
                **({"GPU": 1} if asked.use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=launch,
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            worker_runtime_env={"env_vars": worker_environment()},
        ),
    )
    callbacks = trainer._create_default_callbacks  # there is no public way
    # Each start of the workers would wait for one more process, which would have shards of Ray Data to give away.
    trainer._create_default_callbacks = lambda: [
        c for c in callbacks() if not isinstance(c, DatasetsCallback)
    ]
    try:
        trainer.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _work(config: dict[str, Any]) -> None:
    """What each of Ray's workers runs."""
    import ray.train
    import ray.train.torch

    context, run_dir = ray.train.get_context(), Path(config["run_dir"])
    if (run_dir / "stopped.json").exists():
        return  # an earlier attempt of this launch found that going on is of no use
    place = Worker(
        context.get_world_rank(),
        context.get_world_size(),
        str(ray.train.torch.get_device()),
        config["cpus"],
    )
    with _only_writer(run_dir) if place.is_main else contextlib.nullcontext():
        try:
            number = 0
            if place.is_main:
                earlier, launch = _attempts(run_dir), config["launch"]
                is_restart = any(a["launch"] == launch for a in earlier)
                kill = memory.find_kill(RunFolder(run_dir)) if is_restart else None
                if kill is not None:
                    # Another attempt would need the same memory.
                    RunFolder(run_dir).write_ending(out_of_memory(kill))
                    raise RuntimeError(kill.by)  # the other ranks wait for this one
                number = _begin_attempt(run_dir, earlier, launch, place.world_size)
            worker = Worker(
                place.rank, place.world_size, place.device, place.cpus, agree(number, place)
            )
            _train(
                parse_experiment(config["experiment"], "experiment"),
                run_dir,
                Path(config["data_dir"]),
                worker,
            )
        except Exception as error:
            _record_failure(run_dir, place, error)
            raise


@contextlib.contextmanager
def _only_writer(run_dir: Path) -> Iterator[None]:
    """The worker of a driver that was killed may live a little longer than it: nobody writes beside it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.held(RunFolder(run_dir).writer_lock, WRITER_WAIT_S))
        except HeldError as error:
            _stop(
                run_dir,
                f"{error}, a worker of this run that does not end; end it and run the same command again",
                True,
            )
            raise
        yield


def _train(experiment: Experiment, run_dir: Path, data_dir: Path, worker: Worker) -> None:
    """The loop, watched."""
    import ray

    dog = Watchdog(
        run_dir, worker, experiment.compute.hang_after_s, ray.get_runtime_context().get_node_id()
    )
    bell = stop.Listener(RunFolder(run_dir)) if worker.is_main else None
    failed = True
    try:
        run = Trainer(
            experiment,
            RunFolder(run_dir),
            data_dir,
            worker,
            stop_requested=bell or (lambda: False),
            report_phase=dog.beat,
        )
        for _ in run.run():
            pass
        failed = False
    finally:
        dog.close(failed)
        if bell:
            bell.close()


def _attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Those that began, of this launch and of earlier ones."""
    file = run_dir / "attempts.jsonl"
    lines = files.read_text(file).split("\n") if file.exists() else []
    return [
        json.loads(line) for line in lines if line.endswith("}")
    ]  # a full disk may have torn one


def _begin_attempt(
    run_dir: Path, earlier: list[dict[str, Any]], launch: str, world_size: int
) -> int:
    """Note in `attempts.jsonl` where this attempt begins; returns its number, counted from 1 over the whole run.

    Where too many attempts of this launch began at one step, end the run instead: restarts get nowhere.
    """
    watchdog.report(run_dir)
    step = max(checkpoint.steps(run_dir / "checkpoints"), default=0)
    if [a["step"] for a in earlier if a["launch"] == launch][-PATIENCE:] == [step] * PATIENCE:
        last = "\n".join(f.read_text("utf-8") for f in sorted(run_dir.glob("failure-rank*.txt")))
        reason = f"{PATIENCE} attempts in a row failed between step {step} and the next checkpoint"
        _stop(
            run_dir,
            f"{reason}; the last one:\n{last}"
            if last
            else f"{reason}: workers died without a word",
            False,
        )
        raise RuntimeError(reason)
    if any(a["launch"] == launch for a in earlier):
        events.note(
            RunFolder(run_dir),
            "restart",
            f"attempt {len(earlier) + 1} begins at step {step}: a worker of the one before it died",
            step=step,
        )
    file, line = (
        run_dir / "attempts.jsonl",
        {"launch": launch, "step": step, "workers": world_size, "pid": os.getpid()},
    )
    gap = "\n" if file.exists() and not files.read_bytes(file).endswith(b"\n") else ""
    with open(file, "a", encoding="utf-8", opener=files.opener) as out:
        out.write(f"{gap}{json.dumps(line)}\n")
    return len(earlier) + 1


def _record_failure(run_dir: Path, worker: Worker, error: Exception) -> None:
    """Keep the traceback for the driver, and end the run if the user has to change something."""
    folder = RunFolder(run_dir)
    text = "".join(traceback.format_exception(error))
    ending = ending_of_tracebacks(folder, [text], worker.world_size)
    if ending.kind == "user":
        folder.write_ending(ending)
    with contextlib.suppress(OSError):
        write_atomically(folder.failure_file(worker.rank), text)


def _stop(run_dir: Path, reason: str, user: bool) -> None:
    RunFolder(run_dir).write_ending(Ending("user" if user else "failed", reason))
