"""What a step, an evaluation and a checkpoint cost on this machine: measured for seconds, so that a run's cost is known first.

Eats an experiment and a layout; yields a `Timing`, from a process of its own (its peak of memory and its threads are then
those of a worker) or from `$XDG_CACHE_HOME/espalier/calibration/`, and what follows from it for a whole run by arithmetic.
The steps are real ones, on random tokens that lie in memory.

Not in it: traffic between workers (of several, one's share is timed), torch.compile (steps are timed without it), tokens
that a disk is slow to give, and pages of the shards, which the system takes back when it needs them.
"""

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from model.generate import generate
from orchestrator.cluster.layout import WORKER_ENVIRONMENT
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.data.dataset import Manifest
from orchestrator.files import write_atomically
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.train import state
from orchestrator.train.checkpointer import Checkpointer
from orchestrator.train.evaluate import SAMPLE_PROMPT, SAMPLE_TOKENS, EvalSet
from orchestrator.train.meter import memory_metrics
from orchestrator.train.numerics import Worker, autocast, device_name, prepare_process
from orchestrator.train.step import Step

FORMAT = 2  # of the cache; a change of what is measured is a new one
STEPS_S, EVALUATION_S = 3.0, 1.0  # how long each is timed
RAY_GIB = 0.125  # resident in a worker of Ray beside what is measured here: 385 MiB after all imports, 257 without Ray
STARTS = 5  # process starts that fit between a launch and the first step: of Ray's controller, then of workers, on shared CPUs
LIMIT_S = 60.0
SOURCES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Timing:
    """Seconds and bytes of one layout on one machine.

    step_s: of one update. eval_tokens_per_s: forward only, over all workers. sample_s: of the text that an evaluation
    writes. memory_gib: peak of a worker, resident on a CPU, allocated by torch on a GPU. startup_s: from the start of a
    process to where it can build a model.
    """

    step_s: float
    eval_tokens_per_s: float
    sample_s: float
    checkpoint_s: float
    checkpoint_bytes: float
    memory_gib: float
    startup_s: float


# ---- what follows for a run ----
def start_seconds(timing: Timing) -> float:
    """From the launch of a run to its first evaluation or step."""
    return STARTS * timing.startup_s


def steps_seconds(steps: int, timing: Timing) -> float:
    return steps * timing.step_s


def evaluation_seconds(
    experiment: Experiment, n_val_tokens: int, n_train_tokens: int, timing: Timing
) -> float:
    """One evaluation: the stretch of val, as many tokens of train, and the sample; batches are whole ones."""
    limit = min(experiment.train.eval_tokens or n_val_tokens, n_val_tokens)
    batch = experiment.train.micro_batch_size * experiment.model.block_size
    tokens = sum(-(-min(limit, split) // batch) * batch for split in (n_val_tokens, n_train_tokens))
    return tokens / timing.eval_tokens_per_s + timing.sample_s


def evaluations(experiment: Experiment) -> int:
    """Of a whole run: at both ends and at every interval."""
    steps, interval = experiment.train.max_steps, experiment.train.eval_interval
    return 1 + -(-steps // interval) if interval else 0


def checkpoints(experiment: Experiment) -> int:
    """Written by a whole run: at every interval and at the end."""
    steps, interval = experiment.train.max_steps, experiment.train.checkpoint_interval
    return -(-steps // interval) if interval else 1


def expected(
    experiment: Experiment, n_val_tokens: int, n_train_tokens: int, timing: Timing
) -> dict[str, float]:
    """A whole run from step 0: `time_s`; `memory_gib` of a worker; `disk_bytes`, the most that its checkpoints take at a
    time; `final_disk_bytes`, what they take at the end if the best is among the latest.
    """
    written, keep = checkpoints(experiment), experiment.train.keep
    best = 1 if experiment.train.eval_interval else 0
    time_s = (
        start_seconds(timing)
        + steps_seconds(experiment.train.max_steps, timing)
        + written * timing.checkpoint_s
        + evaluations(experiment)
        * evaluation_seconds(experiment, n_val_tokens, n_train_tokens, timing)
    )
    return {
        "time_s": time_s,
        "memory_gib": timing.memory_gib,
        "disk_bytes": timing.checkpoint_bytes
        * min(written, keep + best + 1),  # one is being written
        "final_disk_bytes": timing.checkpoint_bytes * min(written, keep),
    }


# ---- measuring ----
def measure(
    experiment: Experiment,
    n_vocab: int,
    workers: int,
    cpus: int,
    use_gpu: bool,
    *,
    fresh: bool = False,
    limit_s: float = LIMIT_S,
) -> Timing | None:
    """The timing of this layout, from the cache or (always, if `fresh`) from seconds of training in another process.

    None where it cannot be known: no GPU here, or one that somebody else is using, not done within `limit_s` seconds,
    too little memory or room for a checkpoint.
    """
    if use_gpu and not torch.cuda.is_available():
        return None
    if not fresh and (timing := known(experiment, n_vocab, workers, cpus, use_gpu)):
        return timing
    file = cache_file(experiment, n_vocab, workers, cpus, use_gpu)
    job = {
        "experiment": _share(experiment, workers).model_dump(),
        "n_vocab": n_vocab,
        "cpus": cpus,
        "device": "cuda:0" if use_gpu else "cpu",
        "limit_s": limit_s,
        "started": time.time(),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cost.measure"],
            input=json.dumps(job),
            text=True,
            cwd=SOURCES,
            capture_output=True,
            timeout=limit_s,
            env={**os.environ, **WORKER_ENVIRONMENT},
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    one = _parse(done.stdout) if done.returncode == 0 else None
    if one is None:
        return None
    timing = replace(one, eval_tokens_per_s=one.eval_tokens_per_s * workers)
    with contextlib.suppress(OSError):  # a home that cannot be written to
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(timing)))
    return timing


def known(
    experiment: Experiment, n_vocab: int, workers: int, cpus: int, use_gpu: bool
) -> Timing | None:
    """What an earlier `measure` left in the cache. Anybody may have written there: whatever is not numbers is not read."""
    if use_gpu and not torch.cuda.is_available():
        return None
    try:
        return _parse(cache_file(experiment, n_vocab, workers, cpus, use_gpu).read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _share(experiment: Experiment, workers: int) -> Experiment:
    """One worker's part of each step, as an experiment of its own; the state has random weights and is not compiled."""
    return experiment.replace(
        train__global_batch_size=experiment.train.global_batch_size // workers,
        train__reduction_slots=experiment.slots // workers,
        train__init_from="scratch",
        train__compile=False,
        compute__num_workers=1,
    )


def cache_file(
    experiment: Experiment, n_vocab: int, workers: int, cpus: int, use_gpu: bool
) -> Path:
    t = experiment.train
    key = [
        FORMAT,
        asdict(experiment.gpt_config(n_vocab)),
        t.micro_batch_size,
        t.global_batch_size,
        experiment.slots,
        t.dtype,
        experiment.optim.model_dump(),
        workers,
        cpus,
        device_name("cuda:0" if use_gpu else "cpu"),
        torch.__version__,
    ]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "espalier" / "calibration" / f"{name}.json"


def _parse(text: str) -> Timing | None:
    """Positive finite numbers under exactly the names of `Timing`, or None."""
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(stored, dict) or stored.keys() != {f.name for f in fields(Timing)}:
        return None
    return (
        Timing(**stored)
        if all(type(v) in (int, float) and 0 < v < math.inf for v in stored.values())
        else None
    )


# ---- in the other process ----
def main() -> None:
    """A job on stdin, a `Timing` of one worker on stdout."""
    be_expendable()
    job = json.loads(sys.stdin.read())
    experiment, worker = (
        parse_experiment(job["experiment"], "calibration"),
        Worker(device=job["device"], cpus=job["cpus"]),
    )
    print(
        json.dumps(
            asdict(_calibrate(experiment, job["n_vocab"], worker, job["started"], job["limit_s"]))
        )
    )


def _calibrate(
    experiment: Experiment, n_vocab: int, worker: Worker, started: float, limit_s: float
) -> Timing:
    if worker.device != "cpu":
        free, total = torch.cuda.mem_get_info(worker.device)
        if free < 0.8 * total:
            sys.exit(
                "the GPU is in use"
            )  # its times would be wrong, and the other's memory at risk
    prepare_process(experiment, worker)
    startup_s = time.time() - started
    s = state.build(one_micro_batch(experiment), experiment.new_model(n_vocab), worker)
    step_s, s, unused_bytes = _time_steps(experiment, s, worker, limit_s / 4)
    eval_tokens_per_s = _time_evaluation(experiment, s, worker)
    sample_s = _time_sample(experiment, s, worker, n_vocab)
    checkpoint_s, checkpoint_bytes = _time_checkpoint(experiment, s, worker)
    memory_gib = peak_gib(worker.device) + unused_bytes / 2**30
    return Timing(
        step_s, eval_tokens_per_s, sample_s, checkpoint_s, checkpoint_bytes, memory_gib, startup_s
    )


def one_micro_batch(experiment: Experiment) -> Experiment:
    return experiment.replace(
        train__global_batch_size=experiment.train.micro_batch_size, train__reduction_slots=1
    )


def _time_steps(
    experiment: Experiment, s: state.TrainState, worker: Worker, budget_s: float
) -> tuple[float, state.TrainState, int]:
    """Seconds of a step, a state that has made some, and bytes of gradient buffers that a whole step takes besides.

    Where a whole step would not fit `budget_s`, that of one micro-batch is timed and its gradient counted M times.
    """
    one, m = one_micro_batch(experiment), experiment.micro_batches
    parts = _timed_step(one, s, worker)
    if parts[0] < budget_s / 2:
        parts = _timed_step(one, s, worker)  # the first one also warmed up
    if parts[0] * m > budget_s / 2:
        buffers = experiment.slots.bit_length() - 1  # log2(S) partial sums beside the running slot
        return parts[0] * m + parts[1], s, buffers * s.gradients.size * 4
    if m > 1:
        s = state.build(experiment, s.model, worker)
        _timed_step(experiment, s, worker)
    steps, begun = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - begun < min(STEPS_S, budget_s):
        _timed_step(experiment, s, worker)
        steps += 1
    return (time.perf_counter() - begun) / steps, s, 0


def _timed_step(experiment: Experiment, s: state.TrainState, worker: Worker) -> tuple[float, float]:
    """Seconds of the gradient and of the update."""
    step, begun = Step(experiment, s), time.perf_counter()
    s.grad_norm = step.gradient(_random_batches(experiment, s)).norm
    between = time.perf_counter()
    step.update(
        0.0
    )  # a rate that is too high for random tokens would end in weights that no text can be drawn from
    if worker.device != "cpu":
        torch.cuda.synchronize()
    return between - begun, time.perf_counter() - between


def _random_batches(
    experiment: Experiment, s: state.TrainState
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    shape = (experiment.train.micro_batch_size, experiment.model.block_size)
    for _ in range(experiment.micro_batches):
        tokens = torch.randint(s.model.config.vocab_size, shape)  # (B, T)
        yield tokens.to(s.gradients.device), tokens.to(s.gradients.device)


def _time_evaluation(experiment: Experiment, s: state.TrainState, worker: Worker) -> float:
    b, t, vocab = (
        experiment.train.micro_batch_size,
        experiment.model.block_size,
        s.model.config.vocab_size,
    )
    inputs = np.random.default_rng(0).integers(vocab, size=(b, t))  # (B, T)
    eval_set = EvalSet([(inputs, inputs, np.arange(b))], np.ones(vocab))
    begun, batches = 0.0, -1
    while batches < 1 or time.perf_counter() - begun < EVALUATION_S:
        eval_set.evaluate(
            s.forward, torch.device(worker.device), autocast(experiment, worker.device)
        )
        batches += 1
        begun = begun or time.perf_counter()  # the first one warmed up
    return batches * b * t / (time.perf_counter() - begun)


def _time_sample(
    experiment: Experiment, s: state.TrainState, worker: Worker, n_vocab: int
) -> float:
    begun = time.perf_counter()
    with autocast(experiment, worker.device):
        generate(
            s.model,
            torch.zeros(1, SAMPLE_PROMPT, dtype=torch.int64, device=worker.device),
            SAMPLE_TOKENS,
            top_k=50,
            n_vocab=n_vocab,
            seed=0,
        ).tolist()
    return time.perf_counter() - begun


def _time_checkpoint(
    experiment: Experiment, s: state.TrainState, worker: Worker
) -> tuple[float, int]:
    """Seconds and bytes of one checkpoint, in the folder of temporary files; a run does most of it beside training."""
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        (Path(folder) / "tokenizer.json").write_text("{}", "utf-8")
        dataset = Manifest(Path(folder), {}, {})
        begun = time.perf_counter()
        # Its copy of the state counts as memory.
        with Checkpointer(RunFolder(folder), 1, Journal(Path(folder))) as checkpointer:
            checkpointer.save(s.step, *state.snapshot(s, experiment, dataset, worker, {}))
        return time.perf_counter() - begun, folder_bytes(Path(folder) / "checkpoints")


def folder_bytes(folder: Path) -> int:
    """Of all files below it."""
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


def peak_gib(device: str) -> float:
    """What the journal's memory metric would be of a worker."""
    status = Path("/proc/self/status")
    if device != "cpu":
        return next(iter(memory_metrics(device).values()))
    if not status.exists():
        return RAY_GIB + next(iter(memory_metrics(device).values()))
    # ru_maxrss begins with the peak of the process that started this one, which may be a large one.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return RAY_GIB + int(line.split()[1]) * 1024 / 2**30


if __name__ == "__main__":
    main()


def be_expendable() -> None:
    """Where the kernel wants memory back, this process is the one to go: what it tries may be too much."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "utf-8")
