"""Sum of the gradients of all micro-batches, with the same bits for any number of ranks.

Floating-point addition is not associative, so the order of the additions is fixed. The M
micro-batches of a step are divided into S canonical slots, and each rank has the slots of a range.
The micro-batches of a slot are added from left to right by autograd. The slots are added in a
balanced binary tree: on each rank the subtrees that it has whole, the others across ranks, once per
step (`ranks/exchange.py`). The tree is the same for W = 1, 2, 3, …, S. torch's
DistributedDataParallel adds in another order for each W, and after a resume.

Notation: M micro-batches per step, S slots, W ranks. A buffer is a float32 vector of the gradients
of all parameters (`ranks/layout.py` says where), M losses and one vote. Each loss is set on one
rank and zero on the others, so that the same additions bring it to all ranks exactly. The vote
makes all ranks stop after the same step, without another message.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from orchestrator.train.ranks.exchange import Exchange, Partial, add_subtrees
from orchestrator.train.ranks.layout import Layout
from orchestrator.train.ranks.overlap import Overlap
from orchestrator.train.ranks.shards import Shard
from orchestrator.train.ranks.slots import joins


class Gradients:
    """Gradient buffers of one rank. They are the `grad` of every parameter.

    In each step: `begin_slot` and `end_slot` around each slot of this rank, with `begin_backward`
    and `record_loss` between them, and `end_round` where `ends_round`; then `reduce`.

    Args:
        params: Parameters, float32, all on one device.
        micro_batches: M of the largest step; S divides it.
        exchange: The slots of this rank, and the sum over all ranks.
        matrices: Those of `params` that are updated as a whole; see `layout.deal_matrices`.
        sharded_by: The optimizer, if each rank updates only a shard of the parameters.
        pairs: A backward pass adds once to the gradient of a parameter. If a slot has one
            micro-batch, autograd then adds each second slot to the one before, with the same bits.
        overlaps: A shard is exchanged during the last backward pass. It needs `pairs`.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        micro_batches: int,
        exchange: Exchange,
        matrices: Iterable[nn.Parameter] = (),
        sharded_by: torch.optim.Optimizer | None = None,
        pairs: bool = True,
        overlaps: bool = False,
    ) -> None:
        assert micro_batches % exchange.slots == 0
        assert all(param.dtype == torch.float32 for param in params)
        self.params = params
        self.micro_batches = micro_batches
        self.exchange = exchange
        self.pairs = pairs
        self.device = params[0].device
        is_sharded = sharded_by is not None
        self.layout = Layout(params, exchange, micro_batches + 1, matrices, is_sharded, overlaps)
        self.shard: Shard | None = None
        self.overlap: Overlap | None = None
        if sharded_by is not None:
            self.shard = Shard(self.layout, exchange, sharded_by)
            self.overlap = Overlap(self.layout) if overlaps else None
        self.size = self.layout.size
        self.free: list[_Buffer] = []
        self.stack: list[_Buffer] = []  # sums of subtrees, the largest first
        self.tails: list[Tensor] = []  # of the rounds of a sharded step
        self.slots_done = 0
        self.current = self._bind(self._take())
        self.last_norm: Tensor | None = None
        # Results of a reduced step, if they are not in `current`.
        self.norms: Tensor | None = None
        self.tail = self.current.flat[self.layout.tail :]

    def set_micro_batches(self, micro_batches: int) -> None:
        """Set M for the next step."""
        assert micro_batches % self.exchange.slots == 0
        assert self.layout.tail + micro_batches < self.size
        self.micro_batches = micro_batches

    def my_slots(self, micro_batches: int | None = None) -> list[range]:
        """Return the micro-batches of each slot of this rank, by default for the present M."""
        size = (micro_batches or self.micro_batches) // self.exchange.slots
        return [range(slot * size, (slot + 1) * size) for slot in self.exchange.mine]

    def begin_slot(self) -> None:
        """Provide a buffer to which `backward` adds: of zeros, or the first slot of a pair."""
        slot = self.exchange.mine[self.slots_done]
        is_single = self.micro_batches == self.exchange.slots
        if self.pairs and is_single and joins(self.stack, slot):
            self._bind(self.stack.pop()).slots = 2
        else:
            if self.stack:
                self._bind(self._take())
            self.current.flat.zero_()
            self.current.first = slot
            self.current.slots = 1
        self.norms = None
        self.tail = self.current.flat[self.layout.tail :]

    def begin_backward(self, micro_batch: int) -> None:
        """Exchange gradients during the next backward pass if it is the last one of this rank."""
        if self.overlap is not None and micro_batch == self.my_slots()[-1][-1]:
            self.overlap.begin(self._reducer([*self.stack, self.current]))

    def record_loss(self, micro_batch: int, loss: Tensor) -> None:
        """Store the loss of a micro-batch (0-dim, nats per token) beside its gradient."""
        self.tail[micro_batch].copy_(loss.detach())

    def vote(self) -> None:
        """Make `votes` of this step positive on all ranks."""
        self.tail[self.micro_batches] = 1.0

    def end_slot(self) -> None:
        """Add the subtrees that this slot completes.

        With shards, the last slot of a round is added later, region by region.
        """
        self.stack.append(self.current)
        self.slots_done += 1
        if self.shard is None or self.slots_done % len(self.exchange.rounds[0]) > 0:
            self.free += add_subtrees(self.stack)

    def ends_round(self) -> bool:
        """Return whether `end_round` is due: after the last slot of a round but the last one."""
        count = len(self.exchange.mine)
        return self.slots_done < count and self.slots_done % len(self.exchange.rounds[0]) == 0

    def end_round(self) -> None:
        """Add the sums of a round over the ranks of this node; all of them call this function."""
        assert self.shard is not None
        self._keep_tail()
        self.shard.scatter(self.stack, [buffer.flat for buffer in self.free])
        self._empty_stack()

    def reduce(self) -> Tensor:
        """Set the `grad` of every parameter to the mean over M micro-batches.

        In a sharded run, only those of the segments of the shard are set.

        Returns:
            The M losses, (M,).
        """
        assert self.slots_done == len(self.exchange.mine)
        self.slots_done = 0
        if self.shard is not None:
            self._reduce_shard(self.shard)
        elif self.exchange.world_size > 1:
            self.exchange.sum(self.stack, [buffer.flat for buffer in self.free])
        total = self._empty_stack()
        if self.shard is None:
            self.tail = total.flat[self.layout.tail :]
            if self.micro_batches > 1:
                total.flat[: self.layout.tail].div_(self.micro_batches)
        return self.tail[: self.micro_batches]

    def _reduce_shard(self, shard: Shard) -> None:
        self._keep_tail()
        if self.overlap is not None and self.overlap.has_begun:
            self.overlap.finish()
        else:
            reduce = self._reducer(self.stack)
            for region in reversed(range(len(self.layout.regions))):
                reduce(region)
        norms = shard.set_gradients()
        tail = torch.stack(self.tails).sum(dim=0)  # each loss is not zero in one of them
        self.tails = []
        values = torch.cat((norms, tail))
        self.exchange.add_up(values)
        self.norms, self.tail = values[: len(norms)], values[len(norms) :]

    def _reducer(self, partials: Sequence[Partial]) -> Callable[[int], None]:
        """Return a function that reduces a region of the shard."""
        assert self.shard is not None
        spare = [buffer.flat for buffer in self.free]
        return functools.partial(
            self.shard.reduce_region, partials=partials, divisor=self.micro_batches, spare=spare
        )

    def _keep_tail(self) -> None:
        self.tails += [partial.flat[self.layout.tail :].clone() for partial in self.stack]

    def _empty_stack(self) -> "_Buffer":
        """Bind the first sum, whose buffer is used again; the others are free."""
        first, *others = self.stack
        self.stack = []
        self.free += others
        return self._bind(first)

    def votes(self) -> Tensor:
        """Return a value that is positive if a slot voted in the reduced step, 0-dim."""
        return self.tail[self.micro_batches]

    def norm(self) -> Tensor:
        """Return the L2 norm of the gradient, 0-dim: of the reduced one, or that in `current`."""
        norms = self.layout.norms(self.current.flat) if self.norms is None else self.norms
        self.last_norm = torch.linalg.vector_norm(norms)
        return self.last_norm

    def clip(self, max_norm: float) -> None:
        """Scale the gradient to `max_norm` if its norm is above, as `clip_grad_norm_` does.

        `norm` must have been called for this gradient.
        """
        assert self.last_norm is not None
        scale = torch.clamp(max_norm / (self.last_norm + 1e-6), max=1.0)
        if self.device.type == "cpu" and scale == 1:  # to read the value, a GPU would have to wait
            return
        if self.shard is not None and self.norms is not None:
            for flat in self.shard.gradients.values():
                flat.mul_(scale)
        else:
            self.current.flat[: self.layout.tail].mul_(scale)

    def _take(self) -> "_Buffer":
        if self.free:
            return self.free.pop()
        return _Buffer(self.layout, self.device)

    def _bind(self, buffer: "_Buffer") -> "_Buffer":
        """Make `buffer` the `grad` of every parameter."""
        for param, view in zip(self.params, buffer.views, strict=True):
            param.grad = view
        self.current = buffer
        return buffer


class _Buffer(Partial):
    """A flat float32 vector, and a view of it for each parameter."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        super().__init__(0, 1, torch.zeros(layout.size, dtype=torch.float32, device=device))
        self.views = [layout.view(self.flat, param) for param in layout.params]
