"""Sizes of the regions of a flat vector, and the slot of each matrix that Muon updates.

Estimates of memory use this module as well, so it does not import torch.
"""

import itertools
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 128  # numbers; each parameter begins at a multiple, aligned as a tensor of its own
# Numbers in the smallest piece. A large model has 2,048 to 4,096 pieces, so that the ranks' shares
# are nearly equal.
LEAST_PIECE = 1 << 14
MOST_PIECES_BITS = 12
# Numbers in the smallest bucket, and the most buckets. Each takes messages of its own; a backward
# pass hides their latency.
LEAST_BUCKET = 1 << 23
LEAST_OVERLAPPING_BUCKET = 1 << 19
MOST_BUCKETS = 16


@dataclass(frozen=True)
class Regions:
    """Regions of a vector: parameters updated number by number, in buckets, and then matrices.

    Ranks exchange one region after another, so they receive only one at a time. Each region is in
    equal shards.

    Attributes:
        shards: Number of shards.
        used: Numbers of the buckets before their padding.
        piece: Numbers in a piece of a bucket. A shard has whole pieces.
        area: Numbers in the area of matrices of each shard: as many as the largest one needs.
        overlaps: Buckets are exchanged during a backward pass.
    """

    shards: int
    used: int
    piece: int
    area: int
    overlaps: bool

    @property
    def buckets(self) -> list[int]:
        """Numbers of each bucket. They depend on the number of shards; no bits depend on them."""
        unit = self.piece * self.shards
        units = -(-self.used // unit)
        least = LEAST_OVERLAPPING_BUCKET if self.overlaps else LEAST_BUCKET
        count = max(1, min(MOST_BUCKETS, units, self.used // least))
        borders = [units * place // count * unit for place in range(count + 1)]
        return [stop - start for start, stop in itertools.pairwise(borders)]

    @property
    def sizes(self) -> list[int]:
        """Numbers of each region."""
        return [*self.buckets, self.shards * self.area]


def regions_of(
    numbers: Iterable[int],
    matrices: Sequence[tuple[int, int]],
    owners: Sequence[Container[int]],
    overlaps: bool,
) -> Regions:
    """Return the regions of some parameters.

    Args:
        numbers: Sizes of the parameters that are updated number by number.
        matrices: (size, slot) of those that are updated as a whole.
        owners: Slots of each shard.
        overlaps: Buckets are exchanged during a backward pass.
    """
    used = sum(rounded_up(size, ALIGNMENT) for size in numbers)
    piece = max(LEAST_PIECE, 1 << max(0, used.bit_length() - MOST_PIECES_BITS))
    areas = [
        sum(rounded_up(size, ALIGNMENT) for size, slot in matrices if slot in slots)
        for slots in owners
    ]
    return Regions(len(owners), used, piece, max(areas), overlaps)


def slots_of_matrices(sizes: Sequence[int], slots: int) -> list[int]:
    """Return the slot of each matrix. The largest come first, each to the slot with least numbers.

    Of slots with equally many, the first one in the order of reversed bits: of eight slots, 0, 4,
    2, 6, 1, 5, 3, 7. A rank has neighbouring slots, so the ranks get nearly equal shares. Which
    matrices share a slot, and so all bits, do not depend on this order.
    """
    bits = slots.bit_length() - 1
    order = [int(f"{slot:0{bits}b}"[::-1], 2) for slot in range(slots)]
    loads = [0] * slots
    found = [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        slot = min(order, key=loads.__getitem__)
        loads[slot] += sizes[place]
        found[place] = slot
    return found


def rounded_up(number: int, multiple: int) -> int:
    """Return the least multiple that is not less than a number."""
    return -(-number // multiple) * multiple
