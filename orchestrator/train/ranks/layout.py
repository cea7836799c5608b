"""Layout of all parameters in flat vectors.

- AdamW updates each number by itself. Its parameters lie one after another, and a shard has whole
  pieces of fixed size, whose borders are multiples of every vector of a processor.
- Muon updates matrices as a whole, so a shard has whole matrices: those of the slots of its rank.
- The norm of a gradient is made of the norms of the pieces and matrices, in one order.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from orchestrator.train.ranks.exchange import Exchange

ALIGNMENT = 128  # numbers; each parameter begins at a multiple, as in memory of its own
# Numbers in the smallest piece. A large model has 2,048 to 4,096 pieces, so that the ranks' shares
# are nearly equal.
LEAST_PIECE = 1 << 14
MOST_PIECES_BITS = 12


def deal_matrices(optimizer: torch.optim.Optimizer, slots: int) -> list[nn.Parameter]:
    """Deal out the matrices that Muon updates to the slots; return them.

    Each gets an attribute `slot`. Matrices of one slot may be orthogonalised together.
    """
    found = [p for group in optimizer.param_groups if group.get("muon") for p in group["params"]]
    loads = [0] * slots
    for param in sorted(found, key=lambda param: -param.numel()):
        slot = loads.index(min(loads))
        vars(param)["slot"] = slot
        loads[slot] += param.numel()
    return found


class Layout:
    """Places of the parameters in a flat vector.

    First come the parameters that are updated by numbers, in order; then an area of matrices for
    each shard; then a tail for other numbers. Padding is zero.

    Args:
        params: Parameters.
        exchange: The ranks.
        tail: Numbers in the tail.
        matrices: Those of `params` that are updated as a whole; see `deal_matrices`.
        sharded: One shard for each rank. False: one for all.

    Attributes:
        size: Numbers in the vector, a multiple of the numbers of slots and ranks.
        regions: (first number, number after the last) of both kinds of parameters.
        tail: First number of the tail.
        offsets: First number of each parameter.
        piece: Numbers in a piece of the first region.
        normed: (first number, shape) of the pieces that are not all padding, and of the matrices.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        exchange: Exchange,
        tail: int,
        matrices: Iterable[nn.Parameter] = (),
        sharded: bool = False,
    ) -> None:
        self.params = params
        owners = exchange.slots_by_place if sharded else [range(exchange.slots)]
        self.shards = len(owners)
        whole = set(matrices)
        numbers = [param for param in params if param not in whole]
        matrices = [param for param in params if param in whole]
        self.offsets: dict[nn.Parameter, int] = {}
        used = self._place(numbers, 0)
        self.piece = max(LEAST_PIECE, 1 << max(0, used.bit_length() - MOST_PIECES_BITS))
        border = _round_up(used, self.piece * self.shards)
        areas = [[p for p in matrices if vars(p)["slot"] in slots] for slots in owners]
        longest = max(self._place(area, 0) for area in areas)
        for place, area in enumerate(areas):
            self._place(area, border + place * longest)
        self.normed: list[tuple[int, tuple[int, ...]]] = [
            (first, (self.piece,)) for first in range(0, used, self.piece)
        ]
        self.normed += [(self.offsets[matrix], tuple(matrix.shape)) for matrix in matrices]
        self.tail = border + self.shards * longest
        self.regions = ((0, border), (border, self.tail))
        self.size = _round_up(self.tail + tail, math.lcm(exchange.slots, exchange.world_size))

    def _place(self, params: list[nn.Parameter], first: int) -> int:
        """Place parameters one after another; return the number after them."""
        for param in params:
            self.offsets[param] = first
            first += _round_up(param.numel(), ALIGNMENT)
        return first

    def view(self, flat: Tensor, param: nn.Parameter) -> Tensor:
        """Return the part of a vector that belongs to a parameter, in its shape."""
        offset = self.offsets[param]
        return flat[offset : offset + param.numel()].view_as(param)

    def norms(self, flat: Tensor) -> Tensor:
        """Return the L2 norms of all pieces and matrices."""
        parts = [flat[first : first + math.prod(shape)].view(shape) for first, shape in self.normed]
        return torch.stack(torch._foreach_norm(parts))

    def shard(self, place: int) -> list[tuple[int, int]]:
        """Return (first number, number after the last) of a shard in both regions."""
        lengths = [(stop - start) // self.shards for start, stop in self.regions]
        return [
            (start + place * length, start + (place + 1) * length)
            for (start, _), length in zip(self.regions, lengths, strict=True)
        ]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
