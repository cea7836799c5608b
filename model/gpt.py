"""GPT-2: a decoder-only transformer with learned positions, pre-norm blocks and a tied head.

Eats token ids, yields logits and a loss in nats per token. Architecture, parameter names and initialisation are those
of GPT-2 (Radford et al. 2019) in the layout of nanoGPT (https://github.com/karpathy/nanoGPT), so that weights move in
both directions by name. The head has no tensor of its own: it *is* `transformer.wte.weight`.

Shapes: B sequences, T tokens in this call, S tokens seen so far (cache and call), C = n_embd, H = n_head,
D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED_TARGET = -1
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # our name -> nn.GELU's `approximate`


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M with the vocabulary padded to a multiple of 128.

    block_size: longest context, tokens. vocab_size: rows of the embedding (padded; ids of the tokenizer are fewer).
    n_layer, n_head, n_embd: blocks, attention heads per block, width. dropout: probability, 0 <= dropout < 1.
    bias: biases in the linear layers and LayerNorms (GPT-2 has them; without is slightly faster and not worse).
    activation: "gelu" (exact, as nanoGPT) or "gelu_tanh" (the approximation that OpenAI's weights were trained with).

    Raises ValueError, quoting the value, for a shape that no model can have.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu"

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: heads share it equally"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )


class LayerCache:
    """Keys and values of one attention layer, in buffers of fixed capacity that are filled from the left."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, each (B, H, T, D), and return all that is stored, each (B, H, S, D)."""
        b, h, t, d = k.shape
        if self.keys is None:  # only now are batch, dtype (autocast!) and device known
            self.keys, self.values = (
                k.new_empty(b, h, self.capacity, d),
                v.new_empty(b, h, self.capacity, d),
            )
        end = self.length + t
        assert end <= self.capacity, f"{end} tokens in a cache of {self.capacity}"
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """What attention has already computed of one batch of sequences: one LayerCache per block.

    Hand the same cache to consecutive forward calls, the prompt first and then one token at a time. `capacity` is the
    largest number of tokens it may hold, at most block_size. For inference: call under torch.no_grad().
    """

    def __init__(self, config: GPTConfig, capacity: int | None = None):
        self.capacity = min(capacity or config.block_size, config.block_size)
        self.layers = [LayerCache(self.capacity) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Tokens stored so far."""
        return self.layers[0].length


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(c, dim=2)
        )
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        # SDPA aligns its causal mask with the first key. One query against a longer cache may see every key.
        is_causal = k.size(2) == t
        assert is_causal or t == 1, "after the prompt a cache takes one token at a time"
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=is_causal
        )  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(b, t, c)))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=ACTIVATIONS[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """A GPT-2 of the shape `config`, with random weights that are a function of torch's global RNG alone."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self._initialise()

    @torch.no_grad()
    def _initialise(self):
        """GPT-2's: N(0, 0.02), zero biases; projections into the residual stream, 2 n_layer of them, scaled down."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith("c_proj.weight")
                parameter.normal_(
                    std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                )
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and with targets the loss.

        tokens: (B, T) int64. targets: (B, T) int64, where -1 means no target here. With targets the logits are
        (B, T, V) and the loss, in nats and always float32, is the mean over the targets that count (NaN if none does),
        or with reduction="none" a (B, T) tensor that is 0 where ignored. Without targets the logits are those of the
        last position only, (B, 1, V), and the loss is None. cache: see KVCache; tokens then continue what it holds.

        Raises ValueError for more tokens than block_size and for an unknown reduction.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.size(1)
        if end > self.config.block_size:
            raise ValueError(
                f"{end} tokens do not fit into block_size={self.config.block_size}: crop or window them"
            )
        # A slice, not a look-up: positions are consecutive, and its gradient needs no scatter.
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[start:end]  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache.layers[i] if cache is not None else None)  # (B, T, C)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self._head(x[:, -1:]), None  # (B, 1, V)
        logits = self._head(x)  # (B, T, V)
        return logits, _loss(logits, targets, reduction)

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.transformer.wte.weight)  # (B, T, V)

    def num_parameters(self, positions: bool = True) -> int:
        """Number of parameters; without `positions` as nanoGPT reports it. The tied head counts once."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total if positions else total - self.transformer.wpe.weight.numel()

    def crop_block_size(self, block_size: int):
        """Keep the first `block_size` positions only. Before the optimizer is made: the parameter is replaced.

        Raises ValueError where the model has fewer positions than that.
        """
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"block_size={block_size} must lie in 1..{self.config.block_size}, what the model has"
            )
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False
        )


def _loss(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross entropy in float32: bfloat16 keeps three digits (10.875 for 10.981), and half overflows."""
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    flat = logits.float().view(-1, logits.size(-1))  # (B*T, V)
    loss = F.cross_entropy(
        flat, targets.reshape(-1), ignore_index=IGNORED_TARGET, reduction=reduction
    )
    return loss.view(targets.shape) if reduction == "none" else loss  # (B, T) or ()
