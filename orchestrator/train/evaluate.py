"""Loss over a fixed stretch of a split: every target once, the same bits on any number of workers.

Eats a model and `eval_batches`; yields nats per token and bits per byte. Batch i belongs to worker i mod W; each
window's losses are summed in float64 and the windows' sums are added in window order.
"""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
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


class AbandonedError(Exception):
    """An evaluation that was asked to end early, on every worker at the same batch."""


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

    def evaluate(
        self,
        model: nn.Module,
        device: torch.device,
        autocast,
        rank: int = 0,
        world_size: int = 1,
        go_on: Callable[[], bool] = lambda: True,
        waiting: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> EvalResult:
        """Run the model over this worker's share and gather; every worker returns the same result.

        Args:
            go_on: asked before each batch, equally often on every worker and with the same answer.
            waiting: entered where this worker waits for the others.

        Raises:
            AbandonedError: `go_on` said no.
        """
        sums = torch.zeros(self.windows, dtype=torch.float64, device=device)
        training = model.training
        model.eval()
        try:
            for first in range(0, len(self.batches), world_size):
                if not go_on():
                    raise AbandonedError
                if first + rank < len(self.batches):
                    self._add(sums, self.batches[first + rank], model, device, autocast)
        finally:
            model.train(training)
        if world_size > 1:
            with waiting():
                dist.all_reduce(sums)  # every window has one owner and is zero elsewhere: exact
        loss = math.fsum(sums.tolist()) / self.tokens
        bits = loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan
        return EvalResult(loss, bits, self.tokens)

    @staticmethod
    @torch.no_grad()
    def _add(sums: torch.Tensor, batch, model: nn.Module, device: torch.device, autocast) -> None:
        """Put the sums of a batch's windows, nats, into their places in `sums`, (windows,)."""
        inputs, targets, ids = (torch.from_numpy(np.asarray(a)).to(device) for a in batch)
        with autocast:
            losses = model(inputs, targets, reduction="none")[1]  # (B, T)
        real = ids >= 0
        sums[ids[real]] = losses.double().sum(dim=1)[real]
