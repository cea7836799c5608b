"""Loss over a fixed stretch of a split: every target once, the same bits on any number of workers.

Eats a model and `eval_batches`; yields nats per token and bits per byte. Batch i belongs to worker i mod W; each
window's losses are summed in float64 and the windows' sums are added in window order.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class EvalResult:
    """loss: nats per token. bits_per_byte: over the UTF-8 bytes of the targets. tokens: how many targets."""

    loss: float
    bits_per_byte: float
    tokens: int


class EvalSet:
    """Batches of one split and, counted once, how many tokens and bytes their targets are.

    Args:
        batches: what `eval_batches` gives: `len()`, and `[i] -> (inputs, targets, window_ids)`, (B, T) each.
        byte_lengths: bytes of each token id, (n_vocab,).
    """

    def __init__(self, batches, byte_lengths: np.ndarray):
        self.batches, self.tokens, self.bytes, self.windows = batches, 0, 0, 0
        for i in range(len(batches)):
            _, targets, window_ids = batches[i]
            real = targets[targets >= 0]
            self.tokens += real.size
            self.bytes += int(byte_lengths[real].sum())
            self.windows = max(self.windows, int(np.max(window_ids)) + 1)

    def evaluate(self, model: nn.Module, device: torch.device, autocast, rank: int = 0, world_size: int = 1) -> EvalResult:
        """Run the model over this worker's share and gather; every worker returns the same result."""
        sums = torch.zeros(self.windows, dtype=torch.float64, device=device)
        training = model.training
        model.eval()
        with torch.no_grad():
            for i in range(rank, len(self.batches), world_size):
                inputs, targets, window_ids = self.batches[i]
                losses = self._losses(model, inputs, targets, device, autocast)  # (B, T)
                real = torch.from_numpy(np.asarray(window_ids) >= 0).to(device)
                ids = torch.from_numpy(np.asarray(window_ids)).to(device)[real]
                sums[ids] = losses.double().sum(dim=1)[real]
        model.train(training)
        if world_size > 1:
            dist.all_reduce(sums)  # every window has one owner and is zero elsewhere: exact
        loss = math.fsum(sums.tolist()) / self.tokens
        bits = loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan
        return EvalResult(loss, bits, self.tokens)

    @staticmethod
    def _losses(model, inputs, targets, device, autocast) -> torch.Tensor:
        x, y = (torch.from_numpy(a).to(device) for a in (inputs, targets))
        with autocast:
            return model(x, y, reduction="none")[1]
