"""One gradient out of many micro-batches and workers, by the same additions in the same order on any number of workers.

A step has M micro-batches in S canonical slots (S a power of two that divides M); worker r of W owns slots
[r·S/W, (r+1)·S/W). A slot's micro-batches are added left to right by autograd, slots in a balanced binary tree: locally
with a binary counter of buffers, across workers once per step (all_to_all of W chunks, tree sum in rank order,
all_gather: the bytes of a ring all-reduce). So the sum is the same bits on 1, 2, 4 … S workers, which DDP's is not.

Legend: P numbers of parameters; a buffer is float32 (P + M + 1 + padding), the gradients followed by the M losses of the
step's micro-batches and a vote. A loss has one owner and is zero elsewhere, so that the same additions bring it everywhere
exactly; so does the vote, by which workers agree to stop after a step without another message.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Gradients:
    """Owns `param.grad` of every parameter.

    Per step: `begin_slot`/`end_slot` around each of this worker's slots with `record_loss` inside, then `reduce`.

    Args:
        params: all float32 and on one device.
        micro_batches: M of a step over all workers.
        slots: S, a power of two that divides M and that the number of workers divides.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        micro_batches: int,
        slots: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        assert slots & (slots - 1) == 0 and micro_batches % slots == 0 and slots % world_size == 0
        assert all(p.dtype == torch.float32 for p in params)
        self.params, self.micro_batches, self.slots = params, micro_batches, slots
        self.rank, self.world_size = rank, world_size
        self.n_params = sum(p.numel() for p in params)
        # Padded to a multiple of S, not of W: the buffer must not depend on the number of workers.
        self.size = -(-(self.n_params + micro_batches + 1) // slots) * slots
        self.device = params[0].device
        self.free: list[_Buffer] = []
        self.stack: list[_Buffer] = []  # sums of 2^k slots, k falling
        self.slots_done = 0
        self.current = self._bind(self._take())

    @property
    def slots_per_worker(self) -> int:
        return self.slots // self.world_size

    def my_slots(self) -> list[range]:
        """Micro-batch numbers of this step in each slot of this worker."""
        size, first = self.micro_batches // self.slots, self.rank * self.slots_per_worker
        return [
            range(s * size, (s + 1) * size) for s in range(first, first + self.slots_per_worker)
        ]

    def begin_slot(self) -> None:
        """Clear the buffer that `backward` adds to."""
        if self.slots_done:
            self._bind(self._take())
        self.current.flat.zero_()

    def record_loss(self, micro_batch: int, loss: Tensor) -> None:
        """Let the loss of micro-batch `micro_batch` (0-dim, nats per token) travel with its gradient."""
        self.current.flat[self.n_params + micro_batch].copy_(loss.detach())

    def vote(self) -> None:
        """Let `votes` of this step be above zero on every worker."""
        self.current.flat[self.n_params + self.micro_batches] = 1.0

    def end_slot(self) -> None:
        """Merge equal subtrees: like carrying in a binary counter."""
        self.stack.append(self.current)
        self.slots_done += 1
        carry = self.slots_done
        while carry % 2 == 0:
            right = self.stack.pop()
            self.stack[-1].flat.add_(right.flat)
            self.free.append(right)
            carry //= 2

    def reduce(self) -> Tensor:
        """Sum over all slots of all workers, divided by M, into every `param.grad`; returns the M losses, (M,)."""
        assert self.slots_done == self.slots_per_worker and len(self.stack) == 1
        total = self._bind(self.stack.pop())
        self.slots_done = 0
        if self.world_size > 1:
            self._exchange(total.flat)
        if self.micro_batches > 1:
            total.flat[: self.n_params].div_(self.micro_batches)
        return total.flat[self.n_params : self.n_params + self.micro_batches]

    def votes(self) -> Tensor:
        """How many slots voted in the step that was reduced, 0-dim."""
        return self.current.flat[self.n_params + self.micro_batches]

    def norm(self) -> Tensor:
        """Global L2 norm of the reduced gradient, 0-dim (torch.nn.utils.clip_grad_norm_ computes the same)."""
        self.last_norm = nn.utils.get_total_norm(self.current.views)
        return self.last_norm

    def clip(self, max_norm: float) -> None:
        """Scale the gradient down to `max_norm` where its `norm()` is above it, as clip_grad_norm_ does."""
        self.current.flat[: self.n_params].mul_(
            torch.clamp(max_norm / (self.last_norm + 1e-6), max=1.0)
        )

    def _exchange(self, flat: Tensor) -> None:
        chunks = torch.empty_like(flat)
        dist.all_to_all_single(chunks, flat)  # row r: rank r's part of my chunk
        rows = list(chunks.view(self.world_size, -1).unbind())
        while len(rows) > 1:
            rows = [left.add_(right) for left, right in zip(rows[::2], rows[1::2], strict=True)]
        dist.all_gather_into_tensor(flat, rows[0].contiguous())

    def _take(self) -> "_Buffer":
        return self.free.pop() if self.free else _Buffer(self.params, self.size, self.device)

    def _bind(self, buffer: "_Buffer") -> "_Buffer":
        for param, view in zip(self.params, buffer.views, strict=True):
            param.grad = view
        self.current = buffer
        return buffer


class _Buffer:
    """A flat float32 buffer and, in front, one view per parameter in its shape."""

    def __init__(self, params: list[nn.Parameter], size: int, device: torch.device):
        self.flat = torch.zeros(size, dtype=torch.float32, device=device)
        self.views, offset = [], 0
        for p in params:
            self.views.append(self.flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
