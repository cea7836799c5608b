"""A language model without attention: gated causal convolutions, as in arXiv:1612.08083."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, kernel):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.shift = nn.Conv1d(width, width, kernel, groups=width)
        self.gate = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, x):  # (B, T, width)
        y = self.norm(x).transpose(1, 2)
        # Zeros on the left: no position sees a later token.
        y = F.pad(y, (self.shift.kernel_size[0] - 1, 0))
        y = self.shift(y).transpose(1, 2)
        return x + self.gate(y).sigmoid() * self.value(y)


class GatedConv(nn.Module):
    @dataclass(frozen=True)
    class Config:
        block_size: int = 64
        vocab_size: int = 256
        width: int = field(default=64, metadata={"help": "channels of the hidden state"})
        n_layer: int = field(default=4, metadata={"help": "convolutions"})
        kernel: int = field(default=4, metadata={"help": "tokens that a convolution sees"})
        dropout: float = field(default=0.0, metadata={"help": "probability of dropout at the end"})

        def __post_init__(self):
            if self.kernel > self.block_size:
                raise ValueError(f"kernel={self.kernel} is above block_size={self.block_size}")

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.Sequential(
            *(Block(config.width, config.kernel) for _ in range(config.n_layer))
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens, targets=None, *, reduction="mean", cache=None):
        x = self.dropout(self.blocks(self.embedding(tokens)))  # (B, T, width)
        if targets is None:
            return self.head(x[:, -1:])  # (B, 1, V)
        logits = self.head(x).float().transpose(1, 2)  # (B, V, T)
        losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")  # (B, T)
        if reduction == "window":
            return losses.sum(1, dtype=torch.float64)
        return losses.sum() if reduction == "sum" else losses.sum() / (targets >= 0).sum()

    def parameter_groups(self):
        groups = {"matrix": [], "embedding": [], "head": [], "scalar": []}
        for name, parameter in self.named_parameters():
            top = name.partition(".")[0]
            inner = "matrix" if parameter.dim() == 2 else "scalar"
            groups[top if top in groups else inner].append(name)
        return groups
