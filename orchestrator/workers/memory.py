"""Out of memory is not a fault that passes: it is told apart, not tried again, and answered with what would fit.

Eats the error, and the run that met it; yields a sentence with a micro-batch that was really tried beside everything else
that a step needs. For memory that the system takes back by SIGKILL see `oom_kill`.
"""

import contextlib
import gc
import traceback

import torch

from model.optim import OPTIMIZERS
from orchestrator.config.experiment import Experiment
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker, autocast
from orchestrator.train.state import TrainState


def is_exhausted(error: BaseException) -> bool:
    """Whether it says that memory ran out, of a GPU or of the machine."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in text or "out of memory" in text)
    )


def advice(
    experiment: Experiment, worker: Worker, run: Trainer | None, error: BaseException
) -> str:
    """What to do about it, in one line."""
    traceback.clear_frames(
        error.__traceback__
    )  # they hold the step that failed, with its activations
    what = f"out of memory on {worker.device} with {named(experiment)}: {str(error).strip().splitlines()[0][:200]}"
    return f"{what}. {remedy(largest_fitting(experiment, worker, run) if run else None, 'here')}"


def named(experiment: Experiment) -> str:
    return f"train.micro_batch_size={experiment.train.micro_batch_size}"


def remedy(fits: int | None, where: str) -> str:
    """What to set, where a micro-batch of `fits` sequences fits; None: none does."""
    if fits is None:
        return f"No smaller micro-batch fits {where} either: use a smaller model, a shorter model.block_size or more memory"
    return (
        f"train.micro_batch_size={fits} fits {where}, with the same train.global_batch_size; a run that has begun needs "
        f"train.allow_drift=true for it"
    )


def smaller(experiment: Experiment, world_size: int) -> list[Experiment]:
    """The same steps in smaller micro-batches, the largest first."""
    t = experiment.train
    sizes = [s for s in range(t.micro_batch_size - 1, 0, -1) if t.micro_batch_size % s == 0]
    found = [experiment.replace(train__micro_batch_size=size) for size in sizes]
    return [e for e in found if e.slots % world_size == 0]


def largest_fitting(experiment: Experiment, worker: Worker, run: Trainer) -> int | None:
    """The largest divisor of the micro-batch below it with which a step fits, by trying them; None: none does."""
    for candidate in smaller(experiment, worker.world_size):
        _forget(run)
        try:
            held = rest_of_a_step(candidate, worker, run.state)
            # A sequence more for every eight: a run's allocator is not as tidy as one that has just been emptied.
            hold_a_micro_batch(
                candidate, worker, run.state, candidate.train.micro_batch_size // 8 + 1
            )
            del held  # until here it stood beside the micro-batch
        except Exception as error:
            if not is_exhausted(error):
                raise
            continue
        return candidate.train.micro_batch_size
    return None


def rest_of_a_step(experiment: Experiment, worker: Worker, s: TrainState) -> list[torch.Tensor]:
    """What a step holds beside a micro-batch and the state as it is: moments, and gradient buffers of a worker's slots."""
    buffers = (
        experiment.slots // worker.world_size
    ).bit_length()  # log2 of the slots, and the running one
    sizes = [s.gradients.n_params] * (
        0 if s.optimizer.state else OPTIMIZERS[experiment.optim.kind].moments
    ) + [s.gradients.size] * (buffers - 1 + (worker.world_size > 1))
    return [torch.ones(size, device=worker.device) for size in sizes]


def hold_a_micro_batch(
    experiment: Experiment, worker: Worker, s: TrainState, more: int = 0
) -> None:
    """Hold what one forward and backward needs, of `more` sequences besides."""
    shape = experiment.train.micro_batch_size + more, experiment.model.block_size
    tokens = torch.zeros(shape, dtype=torch.int64, device=worker.device)  # (B, T)
    with autocast(experiment, worker.device):
        _, loss = s.forward(tokens, tokens)
    loss.backward()
    if worker.device != "cpu":
        torch.cuda.synchronize()


def _forget(run: Trainer) -> None:
    """Free what the failed attempt held: its gradient buffers but one, and what lies in caches."""
    run.state.gradients.free.clear()
    del run.state.gradients.stack[1:]
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
