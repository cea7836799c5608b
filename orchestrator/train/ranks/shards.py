"""The shard of all parameters that a rank updates.

In a sharded run (ZeRO-1, arXiv:1910.02054) each rank sums, clips and updates one shard, and has
only its moments; then all ranks gather the weights. That moves as many bytes as to gather the
gradients. All bits are those of a run without shards; see `layout`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.tensor_file import Slice
from orchestrator.train.ranks.exchange import Exchange, Partial, add_subtrees
from orchestrator.train.ranks.layout import Layout

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum_buffer",)


@dataclass(frozen=True)
class Segment:
    """A part of a parameter that lies in the shard.

    Attributes:
        weights: View of the weights; the optimizer updates it.
        first: First number of the parameter that it has.
        region: Region of the layout.
        offset: First number in the part of the shard in that region.
    """

    weights: nn.Parameter
    first: int
    region: int
    offset: int


class Shard:
    """The part of all parameters that this rank updates.

    The parameters become views of one vector, and the groups of the optimizer get the segments of
    the shard as parameters. Their own are kept in the groups as "whole".

    Args:
        layout: The layout of the parameters.
        exchange: The ranks.
        optimizer: An optimizer without state.
    """

    def __init__(
        self, layout: Layout, exchange: Exchange, optimizer: torch.optim.Optimizer
    ) -> None:
        self.layout = layout
        self.exchange = exchange
        self.optimizer = optimizer
        self.own = layout.shard(exchange.place)
        self.gradients: dict[int, Tensor] = {}  # by region
        # Of the rounds before the last, by region.
        self.sums: list[list[Partial]] = [[] for _ in layout.regions]
        self.weights = torch.zeros(layout.tail, device=layout.params[0].device)
        for param in layout.params:
            view = layout.view(self.weights, param)
            view.copy_(param.data)
            param.data = view
        self.segments: dict[Tensor, list[Segment]] = {}
        for group in optimizer.param_groups:
            group["whole"] = group["params"]
            for param in group["whole"]:
                self.segments[param] = self._segments(param)
            group["params"] = [s.weights for param in group["whole"] for s in self.segments[param]]
        self.normed = [
            (place, region, first - start, shape)
            for place, (first, shape) in enumerate(layout.normed)
            for region, (start, stop) in enumerate(self.own)
            if start <= first < stop
        ]
        # With a list as index, the CPU would wait for the GPU in each step.
        places = [place for place, *_ in self.normed]
        self.norm_places = torch.tensor(places, dtype=torch.int64, device=self.weights.device)

    def _segments(self, param: nn.Parameter) -> list[Segment]:
        offset = self.layout.offsets[param]
        found = []
        for region, (start, stop) in enumerate(self.own):
            first = max(start, offset)
            last = min(stop, offset + param.numel())
            if first < last:
                weights = self.weights[first:last]
                if last - first == param.numel():
                    weights = weights.view_as(param)
                segment = nn.Parameter(weights, requires_grad=False)
                segment.__dict__.update(param.__dict__)  # such as `row_parts`
                found.append(Segment(segment, first - offset, region, first - start))
        return found

    def scatter(self, partials: Sequence[Partial], spare: Sequence[Tensor]) -> None:
        """Add the sums of a round that is not the last over the ranks of this node."""
        for region, (start, stop) in enumerate(self.layout.regions):
            if start < stop:
                parts, unused = self._parts(region, partials, spare)
                self.sums[region] = self.exchange.scatter(parts, unused)

    def reduce_region(
        self, region: int, partials: Sequence[Partial], divisor: int, spare: Sequence[Tensor] = ()
    ) -> None:
        """Set the gradients of the segments in a region to the sum over all ranks, divided.

        Args:
            region: Number of the region. All ranks must reduce the regions in the same order.
            partials: Sums of this rank in the last round. The halves of a subtree are added here.
            divisor: Number of micro-batches.
            spare: Vectors that may be overwritten in this region.
        """
        start, stop = self.layout.regions[region]
        parts, unused = self._parts(region, partials, spare)
        own = parts[0].flat
        if start < stop:
            # A copy: the sum may be a view of what all ranks have sent, as long as the region.
            own = self.exchange.reduce_scatter(parts, unused, self.sums[region]).clone()
        for partial in self.sums[region]:
            if partial.flat.is_cuda:  # `Overlap` reads it in a stream that did not allocate it
                partial.flat.record_stream(torch.cuda.current_stream(partial.flat.device))
        self.sums[region] = []
        self.gradients[region] = own.div_(divisor) if divisor > 1 else own

    def _parts(
        self, region: int, partials: Sequence[Partial], spare: Sequence[Tensor]
    ) -> tuple[list[Partial], list[Tensor]]:
        """Return the sums in a region, by subtree, and memory that may be overwritten."""
        area = slice(*self.layout.regions[region])
        parts = [Partial(p.first, p.slots, p.flat[area]) for p in partials]
        done = add_subtrees(parts)
        return parts, [flat[area] for flat in spare] + [partial.flat for partial in done]

    def set_gradients(self) -> Tensor:
        """Give all segments their gradients, when all regions are reduced.

        Returns:
            The norms of the pieces and matrices of this shard, zero for others.
        """
        for segments in self.segments.values():
            for segment in segments:
                end = segment.offset + segment.weights.numel()
                own = self.gradients[segment.region][segment.offset : end]
                segment.weights.grad = own.view_as(segment.weights)
        return self._norms()

    def _norms(self) -> Tensor:
        norms = self.weights.new_zeros(len(self.layout.normed))
        parts = [
            self.gradients[region][first : first + math.prod(shape)].view(shape)
            for _, region, first, shape in self.normed
        ]
        if parts:
            norms[self.norm_places] = torch.stack(torch._foreach_norm(parts))
        return norms

    def gather_weights(self) -> None:
        """Drop the gradients, and copy the weights of all shards to all ranks."""
        self.gradients = {}
        for segments in self.segments.values():
            for segment in segments:
                segment.weights.grad = None
        for (start, stop), (first, last) in zip(self.layout.regions, self.own, strict=True):
            if start < stop:
                own = self.weights[first:last].clone()
                self.exchange.all_gather(self.weights[start:stop], own)

    # ---- state of the optimizer ----

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """Return the whole state of a parameter; empty before the first update.

        All ranks must call this function.
        """
        if param not in self.segments:
            return {}
        mine = [(s, self.optimizer.state.get(s.weights, {})) for s in self.segments[param]]
        has_state = torch.zeros(1, dtype=torch.int32, device=param.device)
        has_state += sum(bool(state) for _, state in mine)
        self.exchange.add_up(has_state)
        if not has_state:
            return {}
        found = {}
        for name in _state_names(param):
            whole = torch.zeros(() if name == "step" else param.shape, device=param.device)
            flat = whole.view(-1)
            for segment, state in mine:
                value = state[name].view(-1)
                if name != "step" or segment.first == 0:
                    flat[segment.first : segment.first + len(value)] = value
            # Each number has one owner. As integers, because -0.0 + 0.0 is 0.0.
            self.exchange.add_up(flat.view(torch.int32))
            found[name] = whole
        return found

    def own_state(self, params: Mapping[str, nn.Parameter]) -> dict[str, Slice]:
        """Return what the optimizer keeps of the numbers in this shard."""
        own: dict[str, Slice] = {}
        for name, param in params.items():
            for segment in self.segments.get(param, []):
                for key, value in self.optimizer.state.get(segment.weights, {}).items():
                    tensor = f"{name}/{key}"
                    if value.dim():
                        part = Slice(value.reshape(-1), segment.first, tuple(param.shape), tensor)
                        own[f"{tensor}/{segment.first}"] = part
                    elif segment.first == 0:  # a number for the whole parameter
                        own[tensor] = Slice(value.view(-1), 0, ())
        return own

    def wanted(self, params: Mapping[str, nn.Parameter]) -> dict[str, list[range]]:
        """Return which numbers this shard has of each tensor of the optimizer."""
        found: dict[str, list[range]] = {}
        for name, param in params.items():
            numbers = [
                range(segment.first, segment.first + segment.weights.numel())
                for segment in self.segments.get(param, [])
            ]
            if numbers:
                for key in _state_names(param):
                    found[f"{name}/{key}"] = [range(1)] if key == "step" else numbers
        return found

    def set_state(self, param: nn.Parameter, name: str, value: Tensor) -> None:
        """Take the numbers of the state of a parameter that are `wanted`."""
        segments = self.segments[param]
        if name == "step":
            values = [value.view(()).clone() for _ in segments]  # each segment counts its steps
        else:
            parts = value.split([segment.weights.numel() for segment in segments])
            values = [part.view_as(s.weights) for part, s in zip(parts, segments, strict=True)]
        for segment, own in zip(segments, values, strict=True):
            self.optimizer.state[segment.weights][name] = own


def _state_names(param: Tensor) -> tuple[str, ...]:
    return MUON_STATE if hasattr(param, "slot") else ADAMW_STATE
