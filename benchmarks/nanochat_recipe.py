"""nanochat's model and optimizer, rebuilt from its public description: a peer to measure against.

It is not nanochat's code. What is rebuilt, from the project's description of 2026-07
(https://github.com/karpathy/nanochat):

- model: RMSNorm without gains, no biases, rotary positions on all frequencies (base 100,000), q and
  k times 1.2 after their norm, sliding windows SSSL, gated value embeddings on every second layer
  and the last, factors of the residual stream and of the embedding per layer, a gated smear, the
  stream of the middle layer subtracted before the head, logits capped at 15;
- optimizer: Muon by Polar Express (arXiv:2505.16932) with NorMuon's variance reduction
  (arXiv:2510.05491), rows equilibrated, cautious weight decay; AdamW for the rest;
- schedules: 40 steps of warmup, then constant, linear down to 5 % over the last 65 %; momentum 0.85
  to 0.97 over 400 steps and down to 0.90 in the decay; weight decay by a cosine to 0.

Shapes: B sequences, T tokens, C channels, H heads, D = C / H, V = vocab_size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.muon import POLAR_EXPRESS

GATE_CHANNELS = 12
SMEAR_CHANNELS = 24


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Block(nn.Module):
    """One layer."""

    def __init__(
        self, width: int, heads: int, hidden: int, vocab_size: int, window: int, has_value: bool
    ):
        super().__init__()
        self.heads = heads
        self.window = window
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.projection = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)
        self.value_embedding = nn.Embedding(vocab_size, width) if has_value else None
        self.value_gate = nn.Linear(GATE_CHANNELS, heads, bias=False) if has_value else None

    def forward(self, x: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self._attend(_norm(x), tokens, cos, sin)
        return x + self.contract(F.relu(self.expand(_norm(x))).square())

    def _attend(self, x: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, c = x.shape
        shape = (b, t, self.heads, c // self.heads)
        q, k, v = (layer(x).view(shape) for layer in (self.query, self.key, self.value))
        if self.value_embedding is not None and self.value_gate is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x[..., :GATE_CHANNELS]))  # (B, T, H)
            v = v + gate.unsqueeze(-1) * self.value_embedding(tokens).view(shape)
        q, k = (1.2 * _norm(_rotate(part, cos, sin)) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        mask = None
        if self.window < t:
            distance = torch.arange(t)[:, None] - torch.arange(t)
            mask = (distance >= 0) & (distance < self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.projection(y.transpose(1, 2).reshape(b, t, c))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class NanochatModel(nn.Module):
    """The model. Its weights depend on torch's global generator.

    Args:
        layers: Number of blocks.
        heads: Attention heads of a block.
        width: C.
        hidden: Width of the MLP; nanochat has 4 C. Less makes up for tables of a small model.
        block_size: Longest context in tokens.
        vocab_size: V.
    """

    def __init__(
        self, layers: int, heads: int, width: int, hidden: int, block_size: int, vocab_size: int
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                hidden,
                vocab_size,
                block_size if i == layers - 1 or i % 4 == 3 else block_size // 4,
                (layers - 1 - i) % 2 == 0,
            )
            for i in range(layers)
        )
        self.head = nn.Linear(width, vocab_size, bias=False)
        shares = [i / max(1, layers - 1) for i in range(layers)]
        self.residual = nn.Parameter(torch.tensor([1.15 - 0.10 * share for share in shares]))
        self.first = nn.Parameter(torch.tensor([0.20 - 0.15 * share for share in shares]))
        self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear = nn.Parameter(torch.zeros(()))
        self.middle = nn.Parameter(torch.tensor(0.2))
        exponents = torch.arange(0, width // heads, 2) / (width // heads)
        angles = torch.outer(torch.arange(block_size), 100_000.0**-exponents)[:, None]
        self.register_buffer("cos", angles.cos())  # (T, 1, D / 2)
        self.register_buffer("sin", angles.sin())
        self._initialize(width)

    @torch.no_grad()
    def _initialize(self, width: int) -> None:
        bound = math.sqrt(3 / width)  # a uniform distribution of std 1 / sqrt(C)
        for name, parameter in self.named_parameters():
            if name.endswith(("projection.weight", "contract.weight", "gate.weight")):
                parameter.zero_()
            elif name == "embedding.weight":
                parameter.normal_(std=0.8)
            elif name == "head.weight":
                parameter.normal_(std=0.001)
            elif name.endswith("expand.weight"):
                parameter.uniform_(-0.4 * bound, 0.4 * bound)
            elif name.endswith("weight"):
                parameter.uniform_(-bound, bound)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of (B, T) targets, in nats."""
        x = _norm(self.embedding(tokens))
        gate = self.smear * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
        x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)
        embedded, middle = x, x
        for i, block in enumerate(self.blocks):
            x = self.residual[i] * x + self.first[i] * embedded
            x = block(x, tokens, self.cos[: tokens.size(1)], self.sin[: tokens.size(1)])
            if i == len(self.blocks) // 2:
                middle = x
        logits = self.head(_norm(x - self.middle * middle))
        logits = 15 * torch.tanh(logits.float() / 15)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass
class Recipe:
    """nanochat's two optimizers and its schedules, for a run of `steps` updates.

    Attributes:
        model: The model.
        steps: Length of the run.
        warmup: Steps of warmup; nanochat has 40 in runs of thousands.
        momentum_warmup: Steps in which the momentum rises; nanochat has 400.
        scale: A factor of all learning rates.
    """

    model: NanochatModel
    steps: int
    warmup: int = 40
    momentum_warmup: int = 400
    scale: float = 1.0

    def __post_init__(self) -> None:
        model = self.model
        matrices = [
            parameter
            for name, parameter in model.blocks.named_parameters()
            if "value_embedding" not in name and "gate" not in name
        ]
        shapes = sorted({parameter.shape for parameter in matrices})
        self.stacks = [[p for p in matrices if p.shape == shape] for shape in shapes]
        self.states = [_MuonState(stack) for stack in self.stacks]
        by_width = (model.embedding.embedding_dim / 768) ** -0.5
        tables = [b.value_embedding.weight for b in model.blocks if b.value_embedding is not None]
        gates = [b.value_gate.weight for b in model.blocks if b.value_gate is not None]
        groups = [
            ([model.head.weight], 0.008 * by_width, (0.8, 0.96)),
            ([model.embedding.weight], 0.3 * by_width, (0.8, 0.995)),
            (tables, 0.15 * by_width, (0.8, 0.995)),
            ([model.residual], 0.005, (0.8, 0.95)),
            ([model.first], 0.5, (0.96, 0.95)),
            ([model.smear, model.middle, model.smear_gate.weight, *gates], 0.2, (0.8, 0.95)),
        ]
        self.adamw = torch.optim.AdamW(
            [{"params": p, "lr": lr, "first": lr, "betas": betas} for p, lr, betas in groups],
            eps=1e-10,
            weight_decay=0.0,
            fused=True,
        )

    def rate(self, step: int) -> float:
        """Return the factor of the learning rates at the 0-based `step`."""
        if step < self.warmup:
            return self.scale * (step + 1) / self.warmup
        left = (self.steps - step) / (0.65 * self.steps)
        return self.scale * min(1.0, 0.05 + 0.95 * left)

    def momentum(self, step: int) -> float:
        """Return the momentum of Muon."""
        rising = 0.85 + 0.12 * min(1.0, step / self.momentum_warmup)
        over = max(0.0, 1 - (self.steps - step) / (0.65 * self.steps))
        return rising + over * (0.90 - rising)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the weights from their gradients, and clear these."""
        rate = self.rate(step)
        for group in self.adamw.param_groups:
            group["lr"] = group["first"] * rate
        self.adamw.step()
        decay = 0.28 * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for stack, state in zip(self.stacks, self.states, strict=True):
            state.update(stack, 0.02 * rate, self.momentum(step), decay)
        self.model.zero_grad(set_to_none=True)


class _MuonState:
    """Muon for matrices of one shape, stacked."""

    def __init__(self, stack: list[nn.Parameter]) -> None:
        first = stack[0]
        self.buffer = torch.zeros(len(stack), *first.shape)
        # The variance is kept along the longer side.
        self.dim = -1 if first.size(0) >= first.size(1) else -2
        self.variance = torch.zeros_like(self.buffer).mean(self.dim, keepdim=True)

    def update(self, stack: list[nn.Parameter], lr: float, momentum: float, decay: float) -> None:
        grad = torch.stack([parameter.grad for parameter in stack])
        self.buffer.lerp_(grad, 1 - momentum)
        x = grad.lerp(self.buffer, momentum)
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-10)
        x = _polar(x)
        rows, columns = x.shape[1:]
        wanted = math.sqrt(min(rows, columns))
        self.variance.lerp_(x.square().mean(self.dim, keepdim=True), 0.1)
        x = x * self.variance.clamp(min=1e-10).rsqrt()
        # The first gradient of a matrix before a projection, which starts at 0, is 0.
        x = x * (wanted / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-10))
        lr = lr * math.sqrt(max(1.0, rows / columns))
        for parameter, update in zip(stack, x.unbind(), strict=True):
            parameter.sub_(lr * decay * parameter * (update * parameter >= 0) + lr * update)


def _polar(x: Tensor) -> Tensor:
    """Replace the singular values of each matrix by values of about 1."""
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x
    x = x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True)).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
