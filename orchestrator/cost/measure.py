"""Measure the time and memory of a step, an evaluation and a checkpoint on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from orchestrator.cluster.layout import WORKER_ENVIRONMENT, Layout
from orchestrator.config.experiment import Experiment
from orchestrator.cost import cache
from orchestrator.cost.timing import Timing

LIMIT_S = 60.0
# Parts of the messages of torch, CUDA and Python.
OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "MemoryError",
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
SOURCES = Path(__file__).resolve().parents[2]


def measure(
    experiment: Experiment, n_vocab: int, layout: Layout, limit_s: float = LIMIT_S
) -> Timing | None:
    """Return the timing of this layout, from the cache or from some seconds of training.

    None if it cannot be measured: the layout needs a GPU that is missing or in use, there is too
    little memory or disk, or the measurement takes more than `limit_s` seconds.
    """
    if layout.use_gpu and not torch.cuda.is_available():
        return None
    known = cache.read(experiment, n_vocab, layout)
    if known is not None:
        return known
    try:
        worker_timing = time_worker(experiment, n_vocab, layout, limit_s)
    except MemoryError:
        return None
    if worker_timing is None:
        return None
    timing = replace(
        worker_timing,
        eval_tokens_per_s=worker_timing.eval_tokens_per_s * layout.num_workers,
    )
    cache.write(experiment, n_vocab, layout, timing)
    return timing


def time_worker(
    experiment: Experiment, n_vocab: int, layout: Layout, limit_s: float
) -> Timing | None:
    """Return the timing of one worker; None if it cannot be measured.

    Raises:
        MemoryError: There is too little memory.
    """
    job = {
        "experiment": share_of_worker(experiment, layout.num_workers).model_dump(),
        "n_vocab": n_vocab,
        "cpus": layout.cpus_per_worker,
        "device": layout.device,
        "limit_s": limit_s,
        "started": time.time(),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cost.bench"],
            input=json.dumps(job),
            text=True,
            cwd=SOURCES,
            capture_output=True,
            timeout=limit_s,
            env={**os.environ, **WORKER_ENVIRONMENT},
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    if done.returncode == 0:
        return cache.parse(done.stdout)
    if done.returncode == -signal.SIGKILL or is_out_of_memory(done.stderr):
        raise MemoryError
    return None


def is_out_of_memory(message: str) -> bool:
    """Return whether the message of an exception means out of memory."""
    return any(words in message for words in OUT_OF_MEMORY)


def share_of_worker(experiment: Experiment, num_workers: int) -> Experiment:
    """Return an experiment whose steps are one worker's share of the steps of `experiment`."""
    return experiment.replace(
        train__global_batch_size=experiment.train.global_batch_size // num_workers,
        train__reduction_slots=experiment.slots // num_workers,
        train__init_from="scratch",
        train__compile=False,
        compute__num_workers=1,
    )
