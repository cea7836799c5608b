"""Sum of vectors over all ranks, with the same bits for any number of ranks and machines.

The S slots of a step are the leaves of a balanced binary tree of additions. A rank has the slots of
a range, adds them as far as they are whole subtrees, and brings the sums of these subtrees. Where W
is a power of two, it brings one; else the ranges have borders inside of subtrees.

If each machine (node) has the same number of ranks, the sum has two levels: first the ranks of a
node, then the ranks with the same place on each node. Each level is an all-to-all, after which a
rank has its chunk of the subtrees of all members, and adds them as far as they are whole. Between
nodes that moves fewer bytes than a ring all-reduce; one all-to-all would move up to four times as
many. No arithmetic depends on the way of the bytes.

Notation: S slots, W ranks, N nodes of L ranks, P numbers in a vector.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from orchestrator.cluster.layout import COLLECTIVE_TIMEOUT_S
from orchestrator.train.ranks.slots import Subtree, complete, deal_in_rounds, subtrees

Partition = tuple[tuple[int, ...], ...]  # ranks of each group, rising; each rank is in one group


@dataclass(eq=False)
class Partial(Subtree):
    """The sum of one subtree.

    Attributes:
        flat: The sum, (P,) float32.
    """

    flat: Tensor


AnyPartial = TypeVar("AnyPartial", bound=Partial)


class Group(Protocol):
    """Collectives among some ranks. Tests replace them."""

    def all_to_all(
        self, out: Tensor, sent: Tensor, from_each: list[int], to_each: list[int]
    ) -> None:
        """Send parts of `sent` of the sizes `to_each` to the members; receive those `from_each`."""

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        """Set `out` to the vectors `mine` of all members, in the order of their ranks."""

    def add_up(self, values: Tensor) -> None:
        """Add numbers over all ranks, also those of other groups, in any order."""


@dataclass(frozen=True)
class TorchGroup:
    """Collectives of torch.distributed among the ranks of this rank's group of a partition."""

    partition: Partition

    def all_to_all(
        self, out: Tensor, sent: Tensor, from_each: list[int], to_each: list[int]
    ) -> None:
        """As `Group` says."""
        dist.all_to_all_single(out, sent, from_each, to_each, group=self._group())

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        """As `Group` says."""
        dist.all_gather_into_tensor(out, mine, group=self._group())

    def add_up(self, values: Tensor) -> None:
        """As `Group` says."""
        dist.all_reduce(values)

    def _group(self) -> dist.ProcessGroup | None:
        if len(self.partition) == 1:
            return None  # all ranks
        return _subgroup(dist.group.WORLD, self.partition)


@functools.lru_cache(maxsize=2)  # all stages of a process use the groups of its process group
def _subgroup(world: dist.ProcessGroup | None, partition: Partition) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(
        [list(ranks) for ranks in partition], timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    )
    return group


@dataclass(frozen=True)
class _Level:
    """One all-to-all.

    Attributes:
        group: Its collectives.
        size: Number of members.
        subtrees: (first slot, number of slots) of the subtrees of each member, in rank order, by
            the first slot of this rank in a round.
    """

    group: Group
    size: int
    subtrees: dict[int, list[list[tuple[int, int]]]]

    def reduce_scatter(
        self, mine: Sequence[Partial], before: Iterable[Partial], spare: list[Tensor]
    ) -> list[Partial]:
        """Return the sums of the members' subtrees, of the chunk of this rank.

        Args:
            mine: Sums of the subtrees of this rank.
            before: What this function returned in the rounds before.
            spare: Vectors to receive into. Those that are used are removed.
        """
        by_member = self.subtrees[mine[0].first]
        size = mine[0].flat.numel() // len(by_member)
        received = [*before]
        for i in range(max(map(len, by_member))):
            from_each = [size if i < len(owned) else 0 for owned in by_member]
            flat = mine[i].flat if i < len(mine) else mine[0].flat[:0]
            count = sum(from_each)
            out = spare.pop()[:count] if spare else flat.new_empty(count)
            to_each = [flat.numel() // len(by_member)] * len(by_member)
            self.group.all_to_all(out, flat, from_each, to_each)
            senders = [owned[i] for owned in by_member if i < len(owned)]
            rows = out.view(-1, size)
            received += [Partial(*subtree, row) for subtree, row in zip(senders, rows, strict=True)]
        stack: list[Partial] = []
        for partial in sorted(received, key=lambda partial: partial.first):
            stack.append(partial)
            add_subtrees(stack)
        return stack


class Exchange:
    """Deals out the slots to the ranks, and sums vectors over all ranks.

    Args:
        slots: S, a power of two.
        rank: This rank.
        nodes: A name of each rank's node, by rank.
        new_group: Makes the collectives of this rank's group of a partition.
        rounds: Largest number of rounds in which a rank has its slots; see `slots`.

    Attributes:
        rounds: Slots of this rank in each round.
        mine: Slots of this rank.
        world_size: W.
        place: Number of the chunk of a vector that this rank sums.
        slots_by_place: Slots of the rank of each chunk.
    """

    def __init__(
        self,
        slots: int,
        rank: int = 0,
        nodes: Sequence[str] = ("",),
        new_group: Callable[[Partition], Group] = TorchGroup,
        rounds: int = 1,
    ) -> None:
        assert slots & (slots - 1) == 0 and len(nodes) <= slots
        self.slots = slots
        self.world_size = len(nodes)
        by_node: dict[str, list[int]] = {}
        for other, node in enumerate(nodes):
            by_node.setdefault(node, []).append(other)
        machines = list(by_node.values())
        # Node by node, whatever the numbers of its ranks are.
        order = [other for ranks in machines for other in ranks]
        dealt = deal_in_rounds(slots, [len(ranks) for ranks in machines], rounds)
        owned = dict(zip(order, dealt, strict=True))
        self.rounds = owned[rank]
        self.mine = [slot for mine in self.rounds for slot in mine]
        self.levels: list[_Level] = []
        places = dict.fromkeys(owned, 0)
        for partition, held in _ways(machines, owned):
            [members] = [ranks for ranks in partition if rank in ranks]
            by_round = zip(*(held[other] for other in members), strict=True)
            owned_by_first = {
                ranges[members.index(rank)].start: [subtrees(numbers) for numbers in ranges]
                for ranges in by_round
            }
            self.levels.append(_Level(new_group(partition), len(members), owned_by_first))
            for ranks in partition:
                for i, other in enumerate(ranks):
                    places[other] = places[other] * len(ranks) + i
        self.place = places[rank]
        self.slots_by_place = [
            {slot for mine in owned[other] for slot in mine}
            for other in sorted(owned, key=places.__getitem__)
        ]

    def sum(self, partials: Sequence[Partial], spare: Iterable[Tensor] = ()) -> None:
        """Set the first vector to the sum over all ranks. P must be a multiple of W.

        Args:
            partials: Sums of the subtrees of `mine`, in order, if there is one round.
            spare: Vectors that may be used.
        """
        self.all_gather(partials[0].flat, self.reduce_scatter(partials, spare))

    def scatter(self, partials: Sequence[Partial], spare: Iterable[Tensor]) -> list[Partial]:
        """Return sums over the ranks of a node, of chunks, after a round that is not the last."""
        sums = self.levels[0].reduce_scatter(partials, (), list(spare))
        return [Partial(found.first, found.slots, found.flat.clone()) for found in sums]

    def reduce_scatter(
        self,
        partials: Sequence[Partial],
        spare: Iterable[Tensor] = (),
        before: Iterable[Partial] = (),
    ) -> Tensor:
        """Return the chunk of this rank of the sum over all ranks, (P / W,).

        Args:
            partials: Sums of the subtrees of the last round, in order.
            spare: Vectors that may be used.
            before: What `scatter` returned.
        """
        unused = list(spare)
        for level in self.levels:
            partials = level.reduce_scatter(partials, before, unused)
            before = ()
        [total] = partials
        return total.flat

    def all_gather(self, out: Tensor, chunk: Tensor) -> None:
        """Set `out`, (P,), to the chunks of all ranks."""
        for level in reversed(self.levels):
            gathered = out
            if level is not self.levels[0]:
                gathered = chunk.new_empty(chunk.numel() * level.size)
            level.group.all_gather(gathered, chunk)
            chunk = gathered

    def add_up(self, values: Tensor) -> None:
        """Add numbers over all ranks, in place. Each must be zero on all ranks but one."""
        if self.levels:
            self.levels[0].group.add_up(values)


def _ways(
    machines: list[list[int]], owned: dict[int, list[range]]
) -> list[tuple[Partition, dict[int, list[range]]]]:
    """Return the partition of each level, and by round the slots whose sums each rank brings to it.

    Args:
        machines: Ranks of each node.
        owned: Slots of each rank by round.
    """
    size = len(machines[0])
    if len(machines) == 1 or size == 1 or any(len(ranks) != size for ranks in machines):
        return [((tuple(sorted(owned)),), owned)] if len(owned) > 1 else []
    of_node = {
        other: [range(owned[ranks[0]][0].start, owned[ranks[-1]][-1].stop)]
        for ranks in machines
        for other in ranks
    }
    peers = zip(*machines, strict=True)
    return [
        (tuple(map(tuple, machines)), owned),
        (tuple(tuple(sorted(ranks)) for ranks in peers), of_node),
    ]


def add_subtrees(stack: list[AnyPartial]) -> list[AnyPartial]:
    """Add the last two sums for as long as they are the halves of one subtree.

    Returns:
        The sums that are no longer needed.
    """
    done = []
    for left, right in complete(stack):
        left.flat.add_(right.flat)
        done.append(right)
    return done
