"""Sum of the gradients of all micro-batches, with the same bits for any number of ranks.

Floating-point addition is not associative, so the order of the additions is fixed. The M
micro-batches of a step are divided into S canonical slots; rank r of W has slots r S/W to
(r+1) S/W - 1. The micro-batches of a slot are added from left to right by autograd. The slots are
added in a balanced binary tree: the lower levels on each rank, the upper levels across ranks, once
per step. Such a tree is the same for W = 1, 2, 4, …, S. torch's DistributedDataParallel adds in
another order for each W, and after a resume.

Across ranks, each rank sums one chunk of the buffer: an all-to-all, a tree sum in rank order, an
all-gather. That moves as many bytes as a ring all-reduce.

Notation: M micro-batches per step, S slots, W ranks, P parameters. A buffer is a float32 vector of
P gradients, M losses, one vote, and padding to a multiple of S. Each loss is set on one rank and
zero on the others, so that the same additions bring it to all ranks exactly. The vote makes all
ranks stop after the same step, without another message.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Gradients:
    """Gradient buffers of one rank. They are the `grad` of every parameter.

    In each step: `begin_slot` and `end_slot` around each slot of this rank, with `record_loss`
    between them; then `reduce`.

    Args:
        params: Parameters, float32, all on one device.
        micro_batches: M.
        slots: S, a power of two that divides M and is a multiple of W.
        rank: This rank.
        world_size: W.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        micro_batches: int,
        slots: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert slots & (slots - 1) == 0 and micro_batches % slots == 0 and slots % world_size == 0
        assert all(param.dtype == torch.float32 for param in params)
        self.params = params
        self.micro_batches = micro_batches
        self.slots = slots
        self.rank = rank
        self.world_size = world_size
        self.device = params[0].device
        self.n_params = sum(param.numel() for param in params)
        # Padded to a multiple of S, not of W: the buffer must not depend on the number of ranks.
        self.size = -(-(self.n_params + micro_batches + 1) // slots) * slots
        self.free: list[_Buffer] = []
        self.stack: list[_Buffer] = []  # sums of subtrees, the largest first
        self.slots_done = 0
        self.current = self._bind(self._take())
        self.last_norm: Tensor | None = None

    @property
    def slots_per_worker(self) -> int:
        """S / W."""
        return self.slots // self.world_size

    def my_slots(self) -> list[range]:
        """Return the micro-batches of each slot of this rank."""
        size = self.micro_batches // self.slots
        first = self.rank * self.slots_per_worker
        mine = range(first, first + self.slots_per_worker)
        return [range(slot * size, (slot + 1) * size) for slot in mine]

    def begin_slot(self) -> None:
        """Provide a buffer of zeros, to which `backward` adds."""
        if self.slots_done:
            self._bind(self._take())
        self.current.flat.zero_()

    def record_loss(self, micro_batch: int, loss: Tensor) -> None:
        """Store the loss of a micro-batch (0-dim, nats per token) beside its gradient."""
        self.current.flat[self.n_params + micro_batch].copy_(loss.detach())

    def vote(self) -> None:
        """Make `votes` of this step positive on all ranks."""
        self.current.flat[self.n_params + self.micro_batches] = 1.0

    def end_slot(self) -> None:
        """Add up subtrees of equal size: one addition for each carry of a binary counter."""
        self.stack.append(self.current)
        self.slots_done += 1
        carry = self.slots_done
        while carry % 2 == 0:
            right = self.stack.pop()
            self.stack[-1].flat.add_(right.flat)
            self.free.append(right)
            carry //= 2

    def reduce(self) -> Tensor:
        """Set the `grad` of every parameter to the mean over M micro-batches.

        Returns:
            The M losses, (M,).
        """
        assert self.slots_done == self.slots_per_worker and len(self.stack) == 1
        total = self._bind(self.stack.pop())
        self.slots_done = 0
        if self.world_size > 1:
            self._exchange(total.flat)
        if self.micro_batches > 1:
            total.flat[: self.n_params].div_(self.micro_batches)
        return total.flat[self.n_params : self.n_params + self.micro_batches]

    def votes(self) -> Tensor:
        """Return the number of slots that voted in the reduced step, 0-dim."""
        return self.current.flat[self.n_params + self.micro_batches]

    def norm(self) -> Tensor:
        """Return the L2 norm of the reduced gradient, 0-dim, as `clip_grad_norm_` computes it."""
        self.last_norm = nn.utils.get_total_norm(self.current.views)
        return self.last_norm

    def clip(self, max_norm: float) -> None:
        """Scale the gradient to `max_norm` if its norm is above, as `clip_grad_norm_` does.

        `norm` must have been called for this gradient.
        """
        assert self.last_norm is not None
        scale = torch.clamp(max_norm / (self.last_norm + 1e-6), max=1.0)
        if self.device.type == "cpu" and scale == 1:  # to read the value, a GPU would have to wait
            return
        self.current.flat[: self.n_params].mul_(scale)

    def _exchange(self, flat: Tensor) -> None:
        """Sum `flat` over all ranks, in place."""
        chunks = torch.empty_like(flat)
        # Row r of the result is the chunk of this rank in the buffer of rank r.
        dist.all_to_all_single(chunks, flat)
        rows = list(chunks.view(self.world_size, -1).unbind())
        while len(rows) > 1:
            rows = [left.add_(right) for left, right in zip(rows[::2], rows[1::2], strict=True)]
        dist.all_gather_into_tensor(flat, rows[0].contiguous())

    def _take(self) -> "_Buffer":
        if self.free:
            return self.free.pop()
        return _Buffer(self.params, self.size, self.device)

    def _bind(self, buffer: "_Buffer") -> "_Buffer":
        """Make `buffer` the `grad` of every parameter."""
        for param, view in zip(self.params, buffer.views, strict=True):
            param.grad = view
        self.current = buffer
        return buffer


class _Buffer:
    """A flat float32 vector, and a view of its first elements for each parameter."""

    def __init__(self, params: list[nn.Parameter], size: int, device: torch.device) -> None:
        self.flat = torch.zeros(size, dtype=torch.float32, device=device)
        self.views: list[Tensor] = []
        offset = 0
        for param in params:
            self.views.append(self.flat[offset : offset + param.numel()].view_as(param))
            offset += param.numel()
