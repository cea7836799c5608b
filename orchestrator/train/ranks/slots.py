"""Slots of a step: which rank has which, and which sums it holds while it adds them.

Estimates of memory use this module as well, so it does not import torch. "A vector" has the
gradients of all parameters.

A rank has its slots in one round or two. After the first, the ranks of a node add what they have,
and each holds its chunk of the sum: so a rank needs fewer vectors at a time. Each round sends as
many bytes inside a node; between nodes, nothing is sent before the last.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.config.checks import is_sharded
from orchestrator.config.experiment import Experiment
from orchestrator.own_code import is_own

# Ranks have two rounds if they are many, and would need more vectors than these at a time.
MANY_RANKS = 4
FEW_VECTORS = 2


@dataclass(eq=False)
class Subtree:
    """A sum of slots.

    Attributes:
        first: First slot.
        slots: Number of slots, a power of two that divides `first`.
    """

    first: int
    slots: int


AnySubtree = TypeVar("AnySubtree", bound=Subtree)


def deal(slots: int, workers: int) -> list[range]:
    """Return the slots of each rank: contiguous, and no rank has more than needed.

    The borders are multiples of large powers of two where they may be, so that ranks bring few
    subtrees.
    """
    most = -(-slots // workers)
    borders = [0]
    for others in range(workers - 1, 0, -1):  # the ranks behind this border
        lowest = max(borders[-1] + 1, slots - others * most)
        highest = min(borders[-1] + most, slots - others)
        borders.append(max(range(lowest, highest + 1), key=lambda slot: slot & -slot))
    return [range(*borders) for borders in zip(borders, [*borders[1:], slots], strict=True)]


def deal_in_rounds(slots: int, nodes: Sequence[int], rounds: int = 1) -> list[list[range]]:
    """Return the slots of each rank by round. The slots of a node are one range.

    Args:
        slots: S, a power of two.
        nodes: Number of ranks of each node.
        rounds: Largest number of rounds, a power of two.
    """
    ranks = sum(nodes)
    if nodes[0] == 1 or len(set(nodes)) > 1 or ranks & (ranks - 1) or ranks * rounds > slots:
        return [[mine] for mine in deal(slots, ranks)]
    size = slots // ranks // rounds
    return [
        [
            range(first, first + size)
            for turn in range(rounds)
            for first in [((node * rounds + turn) * nodes[0] + rank) * size]
        ]
        for node in range(len(nodes))
        for rank in range(nodes[0])
    ]


def subtrees(slots: range) -> list[tuple[int, int]]:
    """Return (first slot, number of slots) of the largest subtrees that make up a range."""
    found = []
    first = slots.start
    while first < slots.stop:
        size = 1 << (slots.stop - first).bit_length() - 1
        size = min(size, first & -first or size)
        found.append((first, size))
        first += size
    return found


def complete(stack: list[AnySubtree]) -> Iterator[tuple[AnySubtree, AnySubtree]]:
    """Take the last sum off for as long as the last two are the halves of one subtree.

    Yields:
        The half that stays and must become the sum, and the other one.
    """
    while len(stack) > 1:
        left, right = stack[-2:]
        if left.slots != right.slots or left.first % (2 * left.slots):
            break
        stack.pop()
        left.slots *= 2
        yield left, right


def joins(stack: Sequence[Subtree], slot: int) -> bool:
    """Return whether the last sum is the slot with which `slot` is a subtree."""
    return bool(stack) and slot % 2 == 1 and (stack[-1].first, stack[-1].slots) == (slot - 1, 1)


def vectors(mine: Iterable[int], pairs: bool) -> int:
    """Return how many vectors a rank needs at a time to add its slots.

    Args:
        mine: The slots.
        pairs: A slot may be added to another one by autograd.
    """
    stack: list[Subtree] = []
    most = 0
    for slot in mine:
        if pairs and joins(stack, slot):
            stack[-1].slots = 2
        else:
            stack.append(Subtree(slot, 1))
        most = max(most, len(stack))
        for _ in complete(stack):
            pass
    return most


def adds_pairs(experiment: Experiment) -> bool:
    """Return whether a backward pass adds once to the gradient of each parameter.

    A model of the user may checkpoint activations by backward passes inside of one.
    """
    return not is_own(experiment.model.kind)


def is_overlapped(experiment: Experiment, nodes: int, device: str) -> bool:
    """Return whether sharded ranks overlap their exchange with the last backward pass.

    Args:
        experiment: The configuration.
        nodes: Number of nodes of the ranks.
        device: Device of the ranks.
    """
    wanted = experiment.train.overlap_exchange
    if wanted == "auto":
        # Inside a node the exchange takes little time. On a GPU, `overlap` was not run yet, and the
        # backward pass of a compiled model gives all gradients at its end.
        wanted = nodes > 1 and device == "cpu"
    return wanted and adds_pairs(experiment)


def rounds_of(experiment: Experiment, ranks: int) -> int:
    """Return the largest number of rounds: two if many ranks would need many vectors."""
    if ranks < MANY_RANKS or not is_sharded(experiment, ranks):
        return 1
    return 2 if _vectors(range(experiment.slots // ranks), experiment) > FEW_VECTORS else 1


def slots_of_shards(experiment: Experiment, nodes: Sequence[int]) -> list[set[int]]:
    """Return the slots of each rank; without shards, one set of all slots.

    Args:
        experiment: The configuration.
        nodes: Number of ranks of each node.
    """
    ranks = sum(nodes)
    if not is_sharded(experiment, ranks):
        return [set(range(experiment.slots))]
    dealt = deal_in_rounds(experiment.slots, nodes, rounds_of(experiment, ranks))
    return [{slot for numbers in mine for slot in numbers} for mine in dealt]


def most_vectors(
    experiment: Experiment, nodes: Sequence[int], regions: Sequence[float] = (1.0,)
) -> tuple[float, float]:
    """Return how many vectors a rank holds in the backward pass and in the exchange.

    What a second level of the exchange receives is left out: it is a part of a region.

    Args:
        experiment: The configuration.
        nodes: Number of ranks of each node.
        regions: Shares of a vector that sharded ranks exchange one after another, in this order.
    """
    ranks = sum(nodes)
    dealt = deal_in_rounds(experiment.slots, nodes, rounds_of(experiment, ranks))
    brought = [len(subtrees(mine[-1])) for mine in dealt]
    received = [sum(others > i for others in brought) / ranks for i in range(max(brought))]
    found = []
    for mine, own in zip(dealt, brought, strict=True):
        count = max(_vectors(numbers, experiment) for numbers in mine)
        backward = exchange = count + (len(mine) - 1) / nodes[0]  # rounds: nodes of one size
        free = count - own  # vectors for what is received
        if is_sharded(experiment, ranks):
            # The gradient is copied from the first of what was received.
            last = max(sum(received[free:]), sum(received[free:1]) + 1 / ranks)
            done = 0.0  # share of the regions whose gradients have replaced the sums of rounds
            for share in regions:
                replaced = done * (1 / ranks - (len(mine) - 1) / nodes[0])
                exchange = max(exchange, backward + replaced + share * last)
                done += share
        elif ranks > 1:
            exchange += sum(received[free:])
        found.append((backward, exchange))
    return max(first for first, _ in found), max(last for _, last in found)


def _vectors(mine: Iterable[int], experiment: Experiment) -> int:
    is_single = experiment.micro_batches == experiment.slots
    return vectors(mine, is_single and adds_pairs(experiment))
