"""Out of memory is not a fault that passes: it is told apart, not tried again, and answered with what would fit.

Eats the error, and the run that met it; yields a sentence with a micro-batch that was really tried beside everything else
that a step needs.
"""

import contextlib
import gc

import torch

from orchestrator.config import Experiment
from orchestrator.numerics import Worker, autocast
from orchestrator.training import Run


def is_exhausted(error: BaseException) -> bool:
    """Whether it says that memory ran out, of a GPU or of the machine."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text))


def advice(experiment: Experiment, worker: Worker, run: Run | None, error: BaseException) -> str:
    """What to do about it, in one line."""
    size = experiment.train.micro_batch_size
    what = f"out of memory on {worker.device} with train.micro_batch_size={size}: {str(error).strip().splitlines()[0][:200]}"
    fits = largest_fitting(experiment, worker, run) if run else None
    if fits is None:
        return f"{what}. No smaller micro-batch fits either: use a smaller model, a shorter model.block_size or more memory"
    return (f"{what}. train.micro_batch_size={fits} fits here, with the same train.global_batch_size; a run that has begun "
            f"needs train.allow_drift=true for it")


def largest_fitting(experiment: Experiment, worker: Worker, run: Run) -> int | None:
    """The largest divisor of the micro-batch below it with which a step fits, by trying them; None: none does."""
    t = experiment.train
    for size in [s for s in range(t.micro_batch_size - 1, 0, -1) if t.micro_batch_size % s == 0]:
        smaller = experiment.model_copy(update={"train": t.model_copy(update={"micro_batch_size": size, "reduction_slots": None})})
        _forget(run)
        if smaller.slots % worker.world_size == 0 and _fits(smaller, worker, run):
            return size
    return None


def _fits(experiment: Experiment, worker: Worker, run: Run) -> bool:
    """One forward and backward of a micro-batch, beside moments and as many gradient buffers as its step would hold."""
    s, shape = run.state, (experiment.train.micro_batch_size, experiment.model.block_size)
    n, size = s.gradients.n_params, s.gradients.size
    buffers = (experiment.slots // worker.world_size).bit_length()  # log2 of a worker's slots, and the running one
    try:
        room = [torch.ones(n, device=worker.device) for _ in range(0 if s.optimizer.state else 2)]
        room += [torch.ones(size, device=worker.device) for _ in range(buffers - 1 + (worker.world_size > 1))]
        tokens = torch.zeros(shape, dtype=torch.int64, device=worker.device)
        with autocast(experiment, worker.device):
            _, loss = s.forward(tokens, tokens)
        loss.backward()
        if worker.device != "cpu":
            torch.cuda.synchronize()
    except Exception as error:
        if not is_exhausted(error):
            raise
        return False
    del room  # until here it stood beside the step
    return True


def _forget(run: Run) -> None:
    """Free what the failed attempt held: its gradient buffers but one, and what lies in caches."""
    run.state.gradients.free.clear()
    del run.state.gradients.stack[1:]
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
