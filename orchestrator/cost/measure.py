"""Measure the time and memory of a step, an evaluation and a checkpoint on this machine."""

import json
import math
import signal
import subprocess
from dataclasses import asdict, replace

from orchestrator.cluster.layout import Layout
from orchestrator.config.checks import is_sharded
from orchestrator.config.experiment import Experiment
from orchestrator.cost import cache, process
from orchestrator.cost.timing import Crew, Timing, phase_bytes, regions_of_vector, state_bytes
from orchestrator.machine import gpus
from orchestrator.own_code import sources
from orchestrator.runs.facts import model_facts

LIMIT_S = 20.0  # on two idle cores, GPT-2 124M takes half of it
TIMED_S = 1.5  # seconds in which steps and evaluations are timed, at most
# Parts of the messages of torch, CUDA and Python.
OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "MemoryError",
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def measure(
    experiment: Experiment, n_vocab: int, layout: Layout, limit_s: float = LIMIT_S
) -> Timing | str:
    """Return the timing of this layout, from the cache or from some seconds of training.

    Returns:
        The timing, or why it cannot be measured.
    """
    if layout.use_gpu and not gpus():
        return "the run asks for a GPU, and this machine has none to time it on"
    known = cache.read(experiment, n_vocab, layout)
    if known is not None:
        return known
    load = cache.machine_load()
    try:
        worker_timing = time_worker(experiment, n_vocab, layout, limit_s)
    except MemoryError:
        return "this machine has too little memory for a step"
    if isinstance(worker_timing, str):
        return worker_timing
    timing = replace(
        worker_timing,
        eval_tokens_per_s=worker_timing.eval_tokens_per_s * layout.num_workers,
        load=load,
    )
    cache.write(experiment, n_vocab, layout, timing)
    return timing


def time_worker(
    experiment: Experiment,
    n_vocab: int,
    layout: Layout,
    limit_s: float,
    timed_s: float = TIMED_S,
) -> Timing | str:
    """Return the timing of one worker, or why it cannot be measured.

    With `timed_s=0`, only its memory and sizes are exact.

    Raises:
        MemoryError: There is too little memory.
    """
    job = {
        "experiment": share_of_worker(experiment, layout.num_workers).model_dump(),
        "code": [{**asdict(s), "content": s.content.decode("latin-1")} for s in sources()],
        "n_vocab": n_vocab,
        "cpus": layout.cpus_per_worker,
        "device": layout.device,
        "limit_s": limit_s,
        "timed_s": timed_s,
    }
    try:
        done = process.run(json.dumps(job), limit_s)
    except subprocess.TimeoutExpired:
        load = cache.machine_load()
        return f"timing a step takes more than {limit_s:.0f} s at a load of {load:.1f} per CPU"
    except OSError as error:
        return f"timing a step: {error}"
    timing = cache.parse(done.stdout) if done.returncode == 0 else None
    if timing is not None:
        return replace(
            timing, memory_gib=_shared_gib(timing.memory_gib, experiment, n_vocab, layout)
        )
    if done.returncode == -signal.SIGKILL or is_out_of_memory(done.stderr):
        raise MemoryError
    errors = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
    return f"timing a step: {errors[-1]}"


def is_out_of_memory(message: str) -> bool:
    """Return whether the message of an exception means out of memory."""
    return any(words in message for words in OUT_OF_MEMORY)


def _shared_gib(alone_gib: float, experiment: Experiment, n_vocab: int, layout: Layout) -> float:
    """Return the memory of one of several workers, from that of one with its share of a step."""
    count = layout.num_workers
    if count == 1:
        return alone_gib
    facts = model_facts(experiment, n_vocab)
    crew = Crew.of(experiment, layout)
    alone, _ = phase_bytes(share_of_worker(experiment, count), facts, Crew([1]))
    backward, exchange = phase_bytes(experiment, facts, crew)
    if layout.use_gpu:  # no activations in the exchange
        return max(alone_gib + (backward - alone) / 2**30, exchange / 2**30)
    # On a CPU, gloo gathers into a vector of its own, and a sharded worker sends a copy of its
    # part. Regions are gathered one by one, but the heap does not reuse the memory of one before.
    vector = 4 * sum(regions_of_vector(experiment, facts, crew).sizes)
    sent = backward + vector / count if is_sharded(experiment, count) else exchange
    # And a copy of the state becomes a checkpoint: each worker has a part.
    copied = state_bytes(experiment, facts) * (1 - 1 / count)
    return alone_gib + (max(exchange, sent + vector) - alone - copied) / 2**30


def share_of_worker(experiment: Experiment, num_workers: int) -> Experiment:
    """Return an experiment whose steps are the largest share that a worker has of its steps."""
    slots = math.ceil(experiment.slots / num_workers)
    return experiment.replace(
        train__global_batch_size=experiment.largest_batch // experiment.slots * slots,
        train__batch_schedule=None,
        train__reduction_slots=slots & -slots,
        train__init_from="scratch",
        train__compile=False,
        compute__num_workers=1,
    )
