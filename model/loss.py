"""The loss of a language model.

Shapes: B sequences of T tokens, N = B T positions, C channels, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.protocol import Reduction

IGNORED_TARGET = -1  # a position without a target
BLOCK_NUMEL = 1 << 21  # logits that fit into the cache of a CPU, as float32


def cross_entropy(logits: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    """Return the cross entropy in nats; see `protocol.LanguageModel`.

    It is computed in float32: bfloat16 keeps three digits (10.875 instead of 10.981), and float16
    overflows.

    Args:
        logits: (B, T, V).
        targets: (B, T); -1 where there is no target.
        reduction: "mean" or "sum" over all targets, (); or "window": sums of the sequences, (B,),
            float64.
    """
    flat = logits.float().view(-1, logits.size(-1))  # (B*T, V)
    each = "none" if reduction == "window" else reduction
    loss = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED_TARGET, reduction=each)
    if reduction == "window":
        return loss.view(targets.shape).double().sum(dim=1)
    return loss


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    reduction: Reduction,
    *,
    chunk: int,
    cap: float | None = None,
) -> Tensor:
    """Return the cross entropy of a linear head. The logits of all positions never exist together.

    The forward pass computes the gradients too, while the logits of a chunk exist; the backward
    pass only scales them. Sources: arXiv:2411.09009; Liger Kernel, arXiv:2410.10989.

    Args:
        hidden: (B, T, C).
        weight: (V, C).
        bias: (V,), or None.
        targets: (B, T); -1: no target.
        reduction: As for `cross_entropy`; "window" has no gradient.
        chunk: Positions whose logits exist at a time.
        cap: The logits are cap tanh(z / cap), z = hidden weight^T + bias; None: z.
    """
    flat = hidden.flatten(0, 1)  # (N, C)
    to = targets.flatten()  # (N,)
    if reduction == "window":
        with torch.no_grad():
            losses = _losses(flat, weight, bias, to, chunk, cap, None)
        return losses.view(targets.shape).double().sum(1)
    total = _ChunkedLoss.apply(flat, weight, bias, to, chunk, cap, torch.is_grad_enabled())
    if reduction == "sum":
        return total
    return total / (targets != IGNORED_TARGET).sum()


@dataclass
class _Gradients:
    """Gradients of the summed loss, filled chunk by chunk."""

    hidden: Tensor  # (N, C)
    weight: Tensor  # (V, C), at least float32
    bias: Tensor | None  # (V,)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        cap: float | None,
        with_gradients: bool,
    ) -> Tensor:
        gradients = None
        if with_gradients:
            gradients = _Gradients(
                torch.empty_like(hidden),
                torch.zeros_like(weight, dtype=wide_dtype(weight)),
                None if bias is None else torch.zeros_like(bias, dtype=wide_dtype(bias)),
            )
            ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return _losses(hidden, weight, bias, targets, chunk, cap, gradients).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        # In place, as a second copy would be large. A second backward pass is then an error.
        scaled_bias = None if bias is None else bias.mul_(grad)
        return hidden.mul_(grad), weight.mul_(grad), scaled_bias, None, None, None, None


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int,
    cap: float | None,
    gradients: _Gradients | None,
) -> Tensor:
    """Return the loss of each position, (N,), in at least float32. Add to `gradients`."""
    dtype = weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    weight = weight.to(dtype)  # once, not for each chunk
    losses = []
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        x = hidden[part].to(dtype)
        logits = F.linear(x, weight, None if bias is None else bias.to(dtype))
        rows = _rows_at_a_time(logits) or chunk
        for block, to in zip(logits.split(rows), targets[part].split(rows), strict=True):
            losses.append(_block_losses(block, to, cap, gradients))
        if gradients is not None:  # `_block_losses` has replaced the logits
            _add_products(gradients, part, logits, x, weight)
        del logits, block  # before the next chunk, which would be a second one
    return torch.cat(losses)


def _add_products(
    gradients: _Gradients, part: slice, grad: Tensor, x: Tensor, weight: Tensor
) -> None:
    """Add what follows from the gradient with respect to the logits of a chunk, (N, V)."""
    gradients.hidden[part] = grad @ weight
    # A product, its copy in float32, or the sums of each thread would be as large as the head.
    rows = _rows_at_a_time(x) or len(weight)
    for sums, columns in zip(gradients.weight.split(rows), grad.split(rows, 1), strict=True):
        if sums.dtype == grad.dtype:
            sums.addmm_(columns.mT, x)
        else:
            sums += columns.mT @ x


def _rows_at_a_time(matrix: Tensor) -> int | None:
    """Return how many rows of this length stay in the cache of a CPU; None: take all at once.

    A GPU would spend its time on starting kernels, and the compiler on the unrolled loop.
    """
    if matrix.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return max(1, BLOCK_NUMEL // matrix.size(1))


def _block_losses(
    logits: Tensor, to: Tensor, cap: float | None, gradients: _Gradients | None
) -> Tensor:
    """Return the losses of some positions, (N,).

    If gradients are wanted, replace `logits` by the gradient with respect to them, (N, V), and add
    that of the bias.
    """
    z = logits.to(wide_dtype(logits))
    slope = None
    if cap is not None:
        tanh = (z / cap).tanh_()
        z = tanh * cap
        slope = tanh.square_().neg_().add_(1)
    log_p = torch.log_softmax(z, 1)
    counts = to != IGNORED_TARGET
    rows = torch.arange(len(to), device=to.device)
    columns = to.clamp(min=0)
    losses = torch.where(counts, -log_p[rows, columns], 0)
    if gradients is not None:
        # softmax - one-hot; 0 for positions without a target
        grad = log_p.exp_()
        grad[rows, columns] -= 1
        grad.mul_(counts.unsqueeze(1))
        if slope is not None:
            grad.mul_(slope)
        if gradients.bias is not None:
            gradients.bias += grad.sum(0)
        logits.copy_(grad)
    return losses


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or float64 if the tensor has it."""
    return torch.promote_types(tensor.dtype, torch.float32)
