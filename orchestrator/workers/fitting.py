"""The largest micro-batch that fits into the memory of a worker.

`advice` measures two small micro-batches in a process of its own (`python -m
orchestrator.workers.fitting`), computes which one fits, and checks that one.
"""

import contextlib
import functools
import json
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from model.optim import OPTIMIZERS
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.cost import measure
from orchestrator.train import state
from orchestrator.train.numerics import Worker, autocast, prepare_process
from orchestrator.workers.memory import OutOfMemory, available_bytes

GIB = 2**30
MARGIN = 0.9  # of the free memory: other processes on the machine grow and shrink
MEASURE_S = 120.0


@dataclass(frozen=True)
class Fit:
    """Result of a measurement.

    Attributes:
        micro_batch_size: The largest one that fits; None: not even the smallest does.
        needed_bytes: Memory of a worker with that micro-batch.
    """

    micro_batch_size: int | None
    needed_bytes: int = 0


def advice(
    fault: OutOfMemory, experiment: Experiment, n_vocab: int, layout: Layout, stages: int = 1
) -> str:
    """Return one line that says what to change. Measuring takes up to two minutes.

    Args:
        fault: What happened.
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


def _free_bytes(fault: OutOfMemory, stages: int) -> int | None:
    """Return the memory for each worker; None: it cannot be known in this process."""
    if fault.of_gpu:
        if not torch.cuda.is_available():
            return None
        free, _ = torch.cuda.mem_get_info()
        return int(MARGIN * free)
    if fault.host != socket.gethostname():
        return None
    free = available_bytes() - fault.reserved
    return int(MARGIN * free / (fault.workers * stages))


def largest_fitting(experiment: Experiment, n_vocab: int, layout: Layout, limit: int) -> Fit | None:
    """Find the largest micro-batch, up to that of `experiment`, that fits into `limit` bytes.

    The global batch stays the same. None: it could not be measured.
    """
    job = {
        "experiment": experiment.model_dump(),
        "n_vocab": n_vocab,
        "layout": asdict(layout),
        "limit": limit,
    }
    try:
        done = measure.run_module("orchestrator.workers.fitting", job, MEASURE_S)
    except (subprocess.TimeoutExpired, OSError):
        return None
    if done.returncode != 0:
        return None
    return Fit(**json.loads(done.stdout.splitlines()[-1]))


def sizes_of_same_steps(experiment: Experiment, num_workers: int) -> list[int]:
    """Return the micro-batches, rising, with which the same workers make the same steps."""
    size = experiment.train.micro_batch_size
    found = []
    for smaller in range(1, size + 1):
        if size % smaller == 0:
            candidate = _with_micro_batch(experiment, smaller)
            if candidate.slots % num_workers == 0:
                found.append(smaller)
    return found


def _with_micro_batch(experiment: Experiment, size: int) -> Experiment:
    return experiment.replace(train__micro_batch_size=size, train__compile=False)


# ---- in a process of its own ----


def main() -> None:
    """Read a job from stdin; write a `Fit` to stdout."""
    measure.be_expendable()
    job: dict[str, Any] = json.loads(sys.stdin.read())
    experiment = parse_experiment(job["experiment"], "job")
    layout = Layout(**job["layout"])
    try:
        fit = _measure(experiment, job["n_vocab"], layout, job["limit"])
    except Exception as error:
        if not _is_exhausted(error):
            raise
        fit = Fit(None)  # not even the model fits
    print(json.dumps(asdict(fit)), flush=True)


def _measure(experiment: Experiment, n_vocab: int, layout: Layout, limit: int) -> Fit:
    """Measure two small micro-batches, compute which one fits, and check that one."""
    device = layout.device
    worker = Worker(0, 1, device, layout.cpus_per_worker)
    sizes = sizes_of_same_steps(experiment, layout.num_workers)
    smallest = _with_micro_batch(experiment, sizes[0])  # has the most gradient buffers
    one = measure.one_micro_batch(smallest)
    prepare_process(one, worker)
    held = state.build(one, one.new_model(n_vocab), worker)
    rest = rest_of_a_step(smallest, layout, held)
    hold = functools.partial(hold_a_micro_batch, experiment, device, held)

    hold(sizes[0])  # without a limit, so that all threads of torch are started
    first = _peak_bytes(device)
    if first > limit:
        return Fit(None)
    if len(sizes) == 1:
        return Fit(sizes[0], first)
    _limit_memory(device, limit)
    if not _fits(hold, sizes[1]):
        return Fit(sizes[0], first)
    second = _peak_bytes(device)
    per_sequence = (second - first) / (sizes[1] - sizes[0])

    for size in reversed(sizes):
        needed = int(first + per_sequence * (size - sizes[0]))
        if needed <= limit and _fits(hold, size):
            del rest  # was held beside the micro-batches
            return Fit(size, max(needed, _peak_bytes(device)))
    return Fit(sizes[0], first)


def _fits(hold: Callable[[int], None], size: int) -> bool:
    try:
        hold(size)
    except Exception as error:
        if not _is_exhausted(error):
            raise
        return False
    return True


def rest_of_a_step(
    experiment: Experiment, layout: Layout, held: state.TrainState
) -> list[torch.Tensor]:
    """Allocate what a step needs besides the weights, one gradient buffer and a micro-batch."""
    parameters = held.gradients.n_params
    slots = experiment.slots // layout.num_workers
    # log2(slots) partial sums beside the running one, and a buffer for the exchange.
    buffers = slots.bit_length() - 1 + (layout.num_workers > 1)
    moments = OPTIMIZERS[experiment.optim.kind].moments
    sizes = [parameters] * moments + [held.gradients.size] * buffers
    if not layout.use_gpu:
        sizes.append((1 + moments) * parameters)  # the copy from which a checkpoint is written
    return [torch.ones(size, device=held.gradients.device) for size in sizes]


def hold_a_micro_batch(
    experiment: Experiment, device: str, held: state.TrainState, size: int
) -> None:
    """Run forward and backward of `size` sequences."""
    shape = (size, experiment.model.block_size)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)  # (B, T)
    with autocast(experiment, device):
        _, loss = held.forward(tokens, tokens)
    loss.backward()
    if device != "cpu":
        torch.cuda.synchronize()


def _limit_memory(device: str, limit: int) -> None:
    """Let allocations beyond `limit` fail, so that measuring takes no memory from others."""
    if device != "cpu":
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        return
    # RLIMIT_DATA counts allocated pages, also before they are used.
    left = max(0, limit - _peak_bytes(device))
    allocated = psutil.Process().memory_info().data
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_DATA, (allocated + left, resource.RLIM_INFINITY))


def _peak_bytes(device: str) -> int:
    return int(measure.peak_gib(device) * GIB)


def _is_exhausted(error: BaseException) -> bool:
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    is_runtime_error = isinstance(error, RuntimeError)
    return is_runtime_error and ("can't allocate memory" in text or "out of memory" in text)


if __name__ == "__main__":
    main()
