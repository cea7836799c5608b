"""A micro-batch that fits into the memory of a worker.

`with_auto_size` finds what `train.micro_batch_size=auto` stands for, before the first step.
`advice` is for a run that ran out of memory: it measures two small micro-batches, computes which
one fits, and checks that one with a third measurement. Each measurement runs in a new process, as
in a dry run.
"""

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.cluster import device, dtypes
from orchestrator.cluster.layout import Layout
from orchestrator.config.checks import contradictions
from orchestrator.config.experiment import Experiment
from orchestrator.config.fields import AUTO
from orchestrator.cost.estimate import local_layout
from orchestrator.cost.measure import time_worker
from orchestrator.cost.timing import Timing
from orchestrator.cost.tokens import token_counts
from orchestrator.errors import UserError
from orchestrator.runs.facts import model_facts
from orchestrator.runs.identity import resolve_auto
from orchestrator.runs.storage import run_folder
from orchestrator.workers.memory import OutOfMemory, available_bytes

GIB = 2**30
MARGIN = 0.9  # of the free memory: other processes on the machine grow and shrink
LIMIT_S = 90.0  # for one measurement, which takes some seconds on an idle machine
# Larger micro-batches make a step on a CPU no faster (benchmarks/RESULTS.md).
MOST_CPU_TOKENS = 4096


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
            if candidate.slots >= num_workers:
                found.append(size)
    return found


# ---- train.micro_batch_size=auto ----


def with_auto_size(
    layout: Layout,
    trials: Sequence[tuple[Experiment, int | None]],
    stages: int = 1,
    here: bool = False,
) -> Layout:
    """Return the layout with what `train.micro_batch_size=auto` stands for.

    Args:
        layout: The workers of each trial.
        trials: Experiment and size of the vocabulary of each trial; all get the same number.
        stages: Trials that run at the same time.
        here: Measure on this machine, without Ray.

    Raises:
        UserError: No size fits, or they cannot be measured.
    """
    trials = [trial for trial in trials if trial[0].train.micro_batch_size == AUTO]
    if not trials or layout.micro_batch_size is not None:
        return layout
    print("train.micro_batch_size=auto: measuring which micro-batch fits …", flush=True)
    if here:
        found = _find_size(layout, trials, stages)
    else:
        wait_s = trials[0][0].compute.wait_for_nodes_s
        found = device.on_worker(layout, wait_s, _find_size, layout, trials, stages)
    if isinstance(found, str):
        raise UserError(f"train.micro_batch_size: auto: {found}; give a number")
    print(f"train.micro_batch_size=auto: {found}", flush=True)
    return replace(layout, micro_batch_size=found)


def with_known_size(experiment: Experiment, size: int | None, where: str = "") -> Experiment:
    """Return the experiment with the number that was found for `train.micro_batch_size=auto`.

    Raises:
        UserError: The batches, slots or workers do not fit this number; starts with `where`.
    """
    if size is None or experiment.train.micro_batch_size != AUTO:
        return experiment
    experiment = experiment.replace(train__micro_batch_size=size)
    for problem in contradictions(experiment):
        raise UserError(f"{where}train.micro_batch_size: auto is {size} here; {problem}")
    return experiment


def resolved_here(experiment: Experiment) -> Experiment:
    """Return the experiment of a dry run, with a number for `train.micro_batch_size=auto`."""
    if experiment.train.micro_batch_size != AUTO:
        return experiment
    folder = run_folder(experiment)
    layout = local_layout(experiment)
    if not folder.checkpoint_steps():
        trial = (experiment, token_counts(experiment).n_vocab)
        layout = with_auto_size(layout, [trial], here=True)
    return resolve_auto(experiment, layout, folder)


def _find_size(
    layout: Layout, trials: Sequence[tuple[Experiment, int | None]], stages: int
) -> int | str:
    """Try the sizes from the largest to the smallest. Return one that fits, or a problem."""

    def cost(trial: tuple[Experiment, int]) -> int:
        facts = model_facts(*trial)
        return (facts["flops_per_token"] or facts["parameters"]) * trial[0].model.block_size

    known = [(experiment, n_vocab) for experiment, n_vocab in trials if n_vocab is not None]
    if len(known) < len(trials):
        return "the tokens are not prepared yet: run pipelines/prepare.py first"
    experiment, n_vocab = max(known, key=cost)
    if experiment.train.dtype == AUTO:
        experiment = experiment.replace(train__dtype=dtypes.suitable(experiment, layout))
    room = _room(layout, stages)
    for size in reversed(auto_sizes([experiment for experiment, _ in known], layout)):
        needed = _needed(experiment, size, n_vocab, layout)
        if needed is None:
            return "it cannot be measured on this machine"
        if needed <= room:
            return size
    return f"one sequence needs more than the {max(0, room) / GIB:.2f} GiB of a worker"


def _room(layout: Layout, stages: int) -> float:
    """Return the memory of a worker in bytes."""
    if layout.use_gpu:
        import torch

        return MARGIN * torch.cuda.get_device_properties(0).total_memory
    return MARGIN * available_bytes() / (layout.num_workers * stages)


def auto_sizes(experiments: Sequence[Experiment], layout: Layout) -> list[int]:
    """Return the powers of two, rising, with which the workers can share all steps.

    More workers may come later (`compute.num_workers` is a list), when the slots are fixed.
    """
    counts = [count for e in experiments for count in e.compute.worker_counts]
    layout = replace(layout, num_workers=max([layout.num_workers, *counts]))
    most = min(e.batch_sizes.at(0) for e in experiments) // layout.num_workers
    powers = [1 << i for i in range(most.bit_length())]
    return [size for size in powers if all(_can_share(e, size, layout) for e in experiments)]


def _can_share(experiment: Experiment, size: int, layout: Layout) -> bool:
    tokens = size * experiment.model.block_size
    if size > 1 and tokens > MOST_CPU_TOKENS and not layout.use_gpu:
        return False
    slots = experiment.replace(train__micro_batch_size=size).slots
    batches = [batch for _, batch in experiment.batch_sizes.stretches]
    return slots >= layout.num_workers and not any(b % (size * slots) for b in batches)
