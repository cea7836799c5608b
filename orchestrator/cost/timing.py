"""Estimates of the time, memory and disk of a run, computed from a few measured numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from model.optim import OPTIMIZERS
from orchestrator.cluster.layout import Layout, Node, places
from orchestrator.config.checks import is_sharded
from orchestrator.config.experiment import Experiment
from orchestrator.machine import available_cpus, gpus
from orchestrator.runs.facts import ModelFacts
from orchestrator.train.ranks.regions import Regions, regions_of, slots_of_matrices
from orchestrator.train.ranks.slots import is_overlapped, most_vectors, slots_of_shards

# From launch to the first step, and from the last one to the end, a run takes as long as this many
# starts of one process: the worker imports Ray Train as well, while the driver imports MLflow.
STARTS = 3


@dataclass(frozen=True)
class Timing:
    """Measurements of one layout of workers on one machine.

    Attributes:
        step_s: Seconds of the largest step.
        eval_tokens_per_s: Tokens per second of an evaluation, over all workers.
        sample_s: Seconds to generate the sample text of an evaluation.
        checkpoint_s: Seconds to write a checkpoint.
        checkpoint_bytes: Size of a checkpoint.
        memory_gib: Peak memory of a worker: resident on a CPU, allocated by torch on a GPU.
        startup_s: Seconds from the start of a process until it can build a model.
        load: Processes per CPU that ran or waited for a CPU when this was measured.
    """

    step_s: float
    eval_tokens_per_s: float
    sample_s: float
    checkpoint_s: float
    checkpoint_bytes: float
    memory_gib: float
    startup_s: float
    load: float = 0.0


class Estimate(TypedDict, total=False):
    """Cost of a run or a sweep; `estimated` in summary.json."""

    time_s: float  # as planned
    share_over: float  # part of this time that was over when the steps told it
    corrected_s: float  # the same, from the first steps or minute; only if it differs
    memory_gib: float  # of a worker
    disk_bytes: float  # largest size of all checkpoints at one time
    final_disk_bytes: float  # only of a run: checkpoints at its end, if the best is a recent one


def expected(
    experiment: Experiment, n_val_tokens: int, n_train_tokens: int, timing: Timing
) -> Estimate:
    """Return the cost of a whole run from step 0.

    Args:
        experiment: The configuration.
        n_val_tokens: Tokens of the split `val`.
        n_train_tokens: Tokens of the split `train`.
        timing: Measured on the machine that will train.
    """
    train = experiment.train
    evaluation_s = evaluation_seconds(experiment, n_val_tokens, n_train_tokens, timing)
    return {
        "time_s": start_seconds(timing)
        + steps_seconds(experiment, timing, 0, train.max_steps)
        + evaluations(experiment) * evaluation_s
        + checkpoints(experiment) * timing.checkpoint_s,
        "memory_gib": timing.memory_gib,
        **disk(experiment, timing.checkpoint_bytes),
    }


def disk(experiment: Experiment, checkpoint_bytes: float) -> Estimate:
    """Return what the checkpoints of a run take."""
    keep = experiment.train.keep
    written = checkpoints(experiment)
    # The recent ones, the best one, and one that is being written.
    most = keep + 1
    if experiment.train.eval_interval is not None:
        most += 1
    return {
        "disk_bytes": checkpoint_bytes * min(written, most),
        "final_disk_bytes": checkpoint_bytes * min(written, keep),
    }


def state_bytes(experiment: Experiment, facts: ModelFacts) -> int:
    """Return the size of weights, their average and moments, and so of a checkpoint."""
    weights = facts["parameters"]
    if experiment.train.ema is not None:
        weights += facts["parameters"]
    return 4 * weights + _moment_bytes(experiment, facts)


def _moment_bytes(experiment: Experiment, facts: ModelFacts) -> int:
    moments = OPTIMIZERS[experiment.optim.kind].moments
    others = facts["parameters"] - facts["matrix_parameters"]
    return 4 * (moments["matrix"] * facts["matrix_parameters"] + moments["embedding"] * others)


@dataclass(frozen=True)
class Crew:
    """The workers of a run, by node.

    Attributes:
        nodes: Number of workers of each node.
        overlaps: They exchange gradients during the last backward pass.
    """

    nodes: Sequence[int]
    overlaps: bool = False

    @classmethod
    def of(cls, experiment: Experiment, layout: Layout) -> "Crew":
        """Return the workers of a layout: on nodes like this machine, if it has no room for all."""
        count = layout.num_workers
        each = places([this_machine()], layout) or count
        nodes = [min(each, count - first) for first in range(0, count, each)]
        overlaps = is_overlapped(experiment, len(nodes), layout.device)
        return cls(nodes, is_sharded(experiment, count) and overlaps)

    @property
    def count(self) -> int:
        """Number of workers."""
        return sum(self.nodes)


def this_machine() -> Node:
    """Return the CPUs and GPUs of this machine."""
    return Node(available_cpus(), gpus())


def worker_bytes(experiment: Experiment, facts: ModelFacts, crew: Crew) -> int:
    """Return the memory of a worker for weights, their average, moments and gradients.

    It is the largest of the workers.
    """
    return max(phase_bytes(experiment, facts, crew))


def phase_bytes(experiment: Experiment, facts: ModelFacts, crew: Crew) -> tuple[int, int]:
    """Return `worker_bytes` in the backward pass and while gradients are exchanged.

    Autocast keeps 2 bytes per parameter in the backward pass.
    """
    regions = regions_of_vector(experiment, facts, crew)
    vector = 4 * sum(regions.sizes)
    state = state_bytes(experiment, facts)
    shares = [size / sum(regions.sizes) for size in reversed(regions.sizes)]
    backward, exchange = most_vectors(experiment, crew.nodes, shares)
    if crew.overlaps:
        backward = exchange
    if is_sharded(experiment, crew.count):
        # The weights lie in a vector as well.
        state += vector - 4 * facts["parameters"] - _moment_bytes(experiment, facts)
        moments = OPTIMIZERS[experiment.optim.kind].moments
        state += 4 * moments["embedding"] * sum(regions.buckets) // crew.count
        state += 4 * moments["matrix"] * regions.area
    in_backward = backward * vector
    if experiment.train.dtype != "float32":
        in_backward += 2 * facts["parameters"]
    return state + int(in_backward), state + int(exchange * vector)


def regions_of_vector(experiment: Experiment, facts: ModelFacts, crew: Crew) -> Regions:
    """Return the regions of the gradients of a worker."""
    matrices = facts["matrix_sizes"] if experiment.optim.kind == "muon" else []
    slots = slots_of_matrices(matrices, experiment.slots)
    return regions_of(
        [facts["parameters"] - sum(matrices)],
        list(zip(matrices, slots, strict=True)),
        slots_of_shards(experiment, crew.nodes),
        crew.overlaps,
    )


def steps_seconds(experiment: Experiment, timing: Timing, start: int, stop: int) -> float:
    """Return the seconds of steps [start, stop): in proportion to their sequences."""
    sizes = experiment.batch_sizes
    return (sizes.before(stop) - sizes.before(start)) / experiment.largest_batch * timing.step_s


def start_seconds(timing: Timing) -> float:
    """Return the seconds from the launch of a run to its first evaluation or step."""
    return STARTS * timing.startup_s


def evaluation_seconds(
    experiment: Experiment, n_val_tokens: int, n_train_tokens: int, timing: Timing
) -> float:
    """Return the seconds of one evaluation: on val, on as many tokens of train, and a sample."""
    tokens = evaluation_tokens(experiment, n_val_tokens, n_train_tokens)
    return tokens / timing.eval_tokens_per_s + timing.sample_s


def evaluation_tokens(experiment: Experiment, n_val_tokens: int, n_train_tokens: int) -> int:
    """Return the tokens of one evaluation, with those that fill up the last batches."""
    limit = min(experiment.train.eval_tokens or n_val_tokens, n_val_tokens)
    batch = experiment.train.micro_batch_size * experiment.model.block_size
    tokens = 0
    splits = [n_val_tokens, n_train_tokens]
    if experiment.train.ema is not None:
        splits.append(n_val_tokens)
    for split in splits:
        batches = -(-min(limit, split) // batch)
        tokens += batches * batch
    return tokens


def evaluations(experiment: Experiment, start: int = 0, stop: int | None = None) -> int:
    """Return the number of evaluations in steps [start, stop); stop=None: to the end.

    A run evaluates at step 0, at every interval and at its end.
    """
    max_steps = experiment.train.max_steps
    stop = max_steps if stop is None else stop
    interval = experiment.train.eval_interval
    if interval is None:
        return 0
    at_end = stop == max_steps and stop % interval != 0
    return stop // interval - start // interval + (start == 0) + at_end


def checkpoints(experiment: Experiment, start: int = 0, stop: int | None = None) -> int:
    """Return the number of checkpoints of steps [start, stop): at every interval and at the end."""
    stop = experiment.train.max_steps if stop is None else stop
    interval = experiment.train.checkpoint_interval
    if interval is None:
        return 1
    return (stop - 1) // interval - start // interval + 1
