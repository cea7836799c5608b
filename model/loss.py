"""The loss of a language model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from model.protocol import IGNORED_TARGET, Reduction


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
