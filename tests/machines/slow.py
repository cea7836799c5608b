"""A model that trains slowly without using a CPU, so that a test can act in the middle of a run."""

import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PAUSE_S = float(os.environ.get("PAUSE_S", "0"))  # of each micro-batch
LONGER_FILE = os.environ.get("PAUSE_LONGER_FILE", "")  # while it is there, four times as much


class Slow(nn.Module):
    @dataclass(frozen=True)
    class Config:
        block_size: int = 16
        vocab_size: int = 256
        width: int = 16

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens, targets=None, *, reduction="mean", cache=None):
        x = self.embedding(tokens)  # (B, T, width)
        if targets is None:
            return self.head(x[:, -1:])  # (B, 1, V)
        if self.training:
            time.sleep(4 * PAUSE_S if os.path.exists(LONGER_FILE) else PAUSE_S)
        logits = self.head(x).float().transpose(1, 2)  # (B, V, T)
        losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")  # (B, T)
        if reduction == "window":
            return losses.sum(1, dtype=torch.float64)
        return losses.sum() if reduction == "sum" else losses.sum() / (targets >= 0).sum()

    def parameter_groups(self):
        return {"matrix": [], "embedding": ["embedding.weight"], "head": ["head.weight"]}
