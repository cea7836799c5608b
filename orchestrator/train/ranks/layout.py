"""Layout of all parameters in flat vectors.

- AdamW updates each number by itself. Its parameters lie one after another, and a shard has whole
  pieces of fixed size. Their borders are multiples of the length of any SIMD vector, so that shards
  do not change bits.
- Muon updates matrices as a whole, so a shard has whole matrices: those of the slots of its rank.
- The norm of a gradient is computed from the norms of all pieces and matrices, in a fixed order.
"""

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from orchestrator.train.ranks import regions
from orchestrator.train.ranks.exchange import Exchange
from orchestrator.train.ranks.regions import ALIGNMENT, rounded_up


def deal_matrices(optimizer: torch.optim.Optimizer, slots: int) -> list[nn.Parameter]:
    """Assign each matrix that Muon updates to a slot; return the matrices.

    Each gets an attribute `slot`. Matrices of one slot may be orthogonalised together.
    """
    found = [p for group in optimizer.param_groups if group.get("muon") for p in group["params"]]
    slot_of = regions.slots_of_matrices([param.numel() for param in found], slots)
    for param, slot in zip(found, slot_of, strict=True):
        vars(param)["slot"] = slot
    return found


class Layout:
    """Places of the parameters in a flat vector.

    First come the parameters that are updated number by number, in order; then an area of matrices
    for each shard; then a tail for other numbers, such as losses. Padding is zero.

    Args:
        params: Parameters.
        exchange: The ranks.
        tail: Numbers in the tail.
        matrices: Those of `params` that are updated as a whole; see `deal_matrices`.
        sharded: One shard for each rank. False: one for all.
        overlaps: Buckets are exchanged during a backward pass.

    Attributes:
        size: Numbers in the vector, a multiple of the numbers of slots and ranks.
        regions: (first number, number after the last) of each bucket, and of the matrices.
        tail: First number of the tail.
        offsets: First number of each parameter.
        piece: Numbers in a piece of a bucket.
        normed: (first number, shape) of the pieces that are not all padding, and of the matrices.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        exchange: Exchange,
        tail: int,
        matrices: Iterable[nn.Parameter] = (),
        sharded: bool = False,
        overlaps: bool = False,
    ) -> None:
        self.params = params
        owners = exchange.slots_by_place if sharded else [range(exchange.slots)]
        self.shards = len(owners)
        whole = set(matrices)
        numbers = [param for param in params if param not in whole]
        matrices = [param for param in params if param in whole]
        self.offsets: dict[nn.Parameter, int] = {}
        found = regions.regions_of(
            [param.numel() for param in numbers],
            [(param.numel(), vars(param)["slot"]) for param in matrices],
            owners,
            overlaps,
        )
        self.piece = found.piece
        borders = [0, *itertools.accumulate(found.sizes)]
        border, self.tail = borders[-2:]
        self._place(numbers, 0)
        for place, slots in enumerate(owners):
            area = [param for param in matrices if vars(param)["slot"] in slots]
            self._place(area, border + place * found.area)
        self.normed: list[tuple[int, tuple[int, ...]]] = [
            (first, (self.piece,)) for first in range(0, found.used, self.piece)
        ]
        self.normed += [(self.offsets[matrix], tuple(matrix.shape)) for matrix in matrices]
        self.regions = list(itertools.pairwise(borders))
        self.size = rounded_up(self.tail + tail, math.lcm(exchange.slots, exchange.world_size))

    def _place(self, params: list[nn.Parameter], first: int) -> None:
        """Place parameters one after another."""
        for param in params:
            self.offsets[param] = first
            first += rounded_up(param.numel(), ALIGNMENT)

    def view(self, flat: Tensor, param: nn.Parameter) -> Tensor:
        """Return the part of a vector that belongs to a parameter, in its shape."""
        offset = self.offsets[param]
        return flat[offset : offset + param.numel()].view_as(param)

    def norms(self, flat: Tensor) -> Tensor:
        """Return the L2 norms of all pieces and matrices."""
        parts = [flat[first : first + math.prod(shape)].view(shape) for first, shape in self.normed]
        return torch.stack(torch._foreach_norm(parts))

    def shard(self, place: int) -> list[tuple[int, int]]:
        """Return (first number, number after the last) of a shard in each region."""
        lengths = [(stop - start) // self.shards for start, stop in self.regions]
        return [
            (start + place * length, start + (place + 1) * length)
            for (start, _), length in zip(self.regions, lengths, strict=True)
        ]
