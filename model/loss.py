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
        loss, grad = _loss_and_gradient(logits, targets[part], cap, gradients is not None)
        losses.append(loss)
        if gradients is not None and grad is not None:
            if gradients.bias is not None:
                gradients.bias += grad.sum(0)
            grad = grad.to(dtype)
            gradients.hidden[part] = grad @ weight
            if gradients.weight.dtype == dtype:
                gradients.weight.addmm_(grad.mT, x)
            else:
                gradients.weight += grad.mT @ x
    return torch.cat(losses)


def _loss_and_gradient(
    logits: Tensor, to: Tensor, cap: float | None, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the losses (N,) and, if wanted, their gradients with respect to the logits, (N, V).

    The gradients overwrite `logits` if these have at least float32: fewer passes over memory.
    """
    z = logits.to(wide_dtype(logits))
    slope = None
    if cap is not None:
        tanh = z.div_(cap).tanh_()
        z = tanh * cap
        if with_gradient:
            slope = tanh.square_().neg_().add_(1)
    counts = to != IGNORED_TARGET
    rows = torch.arange(len(to), device=to.device)
    columns = to.clamp(min=0)
    z.sub_(z.amax(1, keepdim=True))
    shifted = z[rows, columns]
    sums = z.exp_().sum(1)
    losses = torch.where(counts, sums.log() - shifted, 0)
    if not with_gradient:
        return losses, None
    # softmax - one-hot; 0 for positions without a target
    z.mul_((counts / sums).unsqueeze(1))
    z[rows, columns] -= counts.to(z.dtype)
    return losses, z if slope is None else z.mul_(slope)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or float64 if the tensor has it."""
    return torch.promote_types(tensor.dtype, torch.float32)
