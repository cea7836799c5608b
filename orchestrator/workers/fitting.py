"""A micro-batch that fits into the memory of a worker.

`advice` measures two small micro-batches, computes which one fits, and checks that one with a third
measurement. Each measurement runs in a new process, as in a dry run.
"""

import math
import socket
from dataclasses import dataclass

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.cost.measure import time_worker
from orchestrator.cost.timing import Timing
from orchestrator.workers.memory import OutOfMemory, available_bytes

GIB = 2**30
MARGIN = 0.9  # of the free memory: other processes on the machine grow and shrink
LIMIT_S = 90.0  # for one measurement, which takes some seconds on an idle machine


@dataclass(frozen=True)
class Fit:
    """Result of the search.

    Attributes:
        micro_batch_size: One that fits; None: not even the smallest fits.
        needed_bytes: Memory of a worker with that micro-batch.
    """

    micro_batch_size: int | None
    needed_bytes: float = 0.0


def advice(
    fault: OutOfMemory, experiment: Experiment, n_vocab: int, layout: Layout, stages: int = 1
) -> str:
    """Return one line that says what to change. Measuring takes half a minute or more.

    Args:
        fault: How the memory ran out.
        experiment: The experiment that ran out of memory.
        n_vocab: Size of its vocabulary.
        layout: Its workers.
        stages: Stages of a sweep that run at the same time.
    """
    size = experiment.train.micro_batch_size
    problem = f"out of memory on {fault.host} with train.micro_batch_size={size}: {fault.by}"
    if layout.use_gpu and not fault.of_gpu:
        return (
            f"{problem}. It was the machine's memory, not the GPU's: use a machine with more, or "
            "fewer processes on it"
        )
    room = _free_bytes(fault, stages)
    fit = None if room is None else largest_fitting(experiment, n_vocab, layout, room)
    if room is None or fit is None:
        return f"{problem}. Use a smaller train.micro_batch_size, a smaller model or more memory"
    where = f"in the {max(0, room) / GIB:.2f} GiB that a worker has there now"
    if fit.micro_batch_size is None:
        return (
            f"{problem}. No smaller micro-batch fits {where} either: use a smaller model, a "
            "shorter model.block_size or more memory"
        )
    if fit.micro_batch_size == size:
        return (
            f"{problem}. It needs {fit.needed_bytes / GIB:.2f} GiB and would fit {where}: something"
            " else took the memory; free it and run the same command again"
        )
    return (
        f"{problem}. train.micro_batch_size={fit.micro_batch_size} fits {where}, with the same "
        "train.global_batch_size; a run that has begun needs train.allow_drift=true for it"
    )


def _free_bytes(fault: OutOfMemory, stages: int) -> float | None:
    """Return the free memory for each worker; None: it cannot be measured from this process."""
    if fault.of_gpu:
        import torch

        if not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info()
        return MARGIN * free
    if fault.host != socket.gethostname():
        return None
    return MARGIN * (available_bytes() - fault.reserved) / (fault.workers * stages)


def largest_fitting(
    experiment: Experiment, n_vocab: int, layout: Layout, limit: float
) -> Fit | None:
    """Find a large micro-batch, up to that of `experiment`, that fits into `limit` bytes.

    The global batch stays the same. If the computed one does not fit, the result is the largest one
    that was measured before. None: it could not be measured.
    """
    sizes = sizes_of_same_steps(experiment, layout.num_workers)
    measured: list[Fit] = []
    for size in sizes[:2]:
        used = _needed(experiment, size, n_vocab, layout)
        if used is None:
            return None
        if used > limit:
            return measured[0] if measured else Fit(None)
        measured.append(Fit(size, used))
    if len(sizes) < 3:
        return measured[-1]

    # Memory grows linearly with the micro-batch.
    least = measured[0].needed_bytes
    per_sequence = (measured[1].needed_bytes - least) / (sizes[1] - sizes[0])
    computed = [s for s in sizes[2:] if least + per_sequence * (s - sizes[0]) <= limit]
    if computed:
        used = _needed(experiment, computed[-1], n_vocab, layout)
        if used is not None and used <= limit:
            return Fit(computed[-1], used)
    return measured[-1]


def _needed(experiment: Experiment, size: int, n_vocab: int, layout: Layout) -> float | None:
    """Measure the memory of a worker in bytes.

    Infinite if the measurement itself ran out of memory; None if it failed for another reason.
    """
    candidate = experiment.replace(train__micro_batch_size=size)
    try:
        timing = time_worker(candidate, n_vocab, layout, LIMIT_S, timed_s=0.0)
    except MemoryError:
        return math.inf
    return timing.memory_gib * GIB if isinstance(timing, Timing) else None


def sizes_of_same_steps(experiment: Experiment, num_workers: int) -> list[int]:
    """Return the micro-batches, rising, with which the same workers make the same steps."""
    largest = experiment.train.micro_batch_size
    found = []
    for size in range(1, largest + 1):
        if largest % size == 0:
            candidate = experiment.replace(train__micro_batch_size=size)
            if candidate.slots % num_workers == 0:
                found.append(size)
    return found
