"""GPT-2: a decoder-only transformer with learned positions, pre-norm blocks and a tied head.

Architecture, parameter names and initialization are those of GPT-2 (Radford et al. 2019) in the
layout of nanoGPT (https://github.com/karpathy/nanoGPT), so that weights can be exchanged by name.
The head has no tensor of its own: it uses `transformer.wte.weight`.

Shapes: B sequences, T tokens in this call, S tokens in the cache after this call, C = n_embd,
H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import LayerCache
from model.flops import flops_per_token
from model.gpt_config import GPTConfig
from model.loss import chunked_cross_entropy, cross_entropy
from model.protocol import Reduction

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # our name -> nn.GELU's `approximate`


class KVCache:
    """Keys and values of all attention layers for one batch of sequences.

    Pass the same cache to consecutive forward calls: first the prompt, then one token at a time.
    Use it only under `torch.no_grad()`.

    Args:
        config: Shape of the model.
        capacity: Largest number of tokens, at most block_size. None: block_size.
    """

    def __init__(self, config: GPTConfig, capacity: int | None = None) -> None:
        self.capacity = min(capacity or config.block_size, config.block_size)
        self.layers = [LayerCache(self.capacity) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Number of tokens stored so far."""
        return self.layers[0].length


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and earlier positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        # Queries, keys and values: see `protocol.HasParameterGroups`.
        self.c_attn.weight.row_parts = 3  # type: ignore[attr-defined]
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(c, dim=2)
        )
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        # PyTorch aligns the causal mask with the first key, which is wrong if the cache has earlier
        # keys. A single new token needs no mask: it may see every key.
        is_causal = k.size(2) == t
        assert is_causal or t == 1, "after the prompt, a cache takes one token at a time"
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=is_causal
        )  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(b, t, c)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=ACTIVATIONS[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = self.gelu(self.c_fc(x))  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention and MLP, each on a normalized input and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class Transformer(nn.Module):
    """The layers of GPT-2; their names are those of its state dict."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, tokens: Tensor, start: int, cache: KVCache | None) -> Tensor:
        """Map (B, T) tokens at positions `start` and following to (B, T, C)."""
        # Positions are consecutive, so a slice is enough. Its gradient needs no scatter.
        positions = self.wpe.weight[start : start + tokens.size(1)]  # (T, C)
        x = self.drop(self.wte(tokens) + positions)  # (B, T, C)
        for i, block in enumerate(self.h):
            layer_cache = cache.layers[i] if cache is not None else None
            x = block(x, layer_cache)  # (B, T, C)
        return self.ln_f(x)


class GPT(nn.Module):
    """A GPT-2. The weights are random and depend only on torch's global generator."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self._initialize()

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers; see `protocol.HasBlocks`."""
        return self.transformer.h

    @torch.no_grad()
    def _initialize(self) -> None:
        """Draw all weights as GPT-2 does: from N(0, 0.02), and zeros for biases.

        The 2 n_layer projections into the residual stream have a smaller deviation, so that their
        sum does not grow with the depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() >= 2:
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the logits of the last position, or the loss: see `protocol.LanguageModel`.

        Raises:
            ValueError: There are more tokens than block_size.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit into block_size={self.config.block_size}")
        x = self.transformer(tokens, start, cache)  # (B, T, C)
        if targets is None:
            return self._head(x[:, -1:])  # (B, 1, V)
        if self.config.loss_chunk is None:
            return cross_entropy(self._head(x), targets, reduction)
        head = self.transformer.wte.weight
        chunk = self.config.loss_chunk
        return chunked_cross_entropy(x, head, None, targets, reduction, chunk=chunk)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of all positions: (B, T) -> (B, T, V)."""
        return self._head(self.transformer(tokens, 0, None))

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.transformer.wte.weight)  # (B, T, V)

    def flops_per_token(self, block_size: int) -> int:
        """Return the FLOPs of training on one token; see `flops.flops_per_token`."""
        return flops_per_token(replace(self.config, block_size=block_size))

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache for `capacity` tokens."""
        return KVCache(self.config, capacity)

    def parameter_groups(self) -> dict[str, list[str]]:
        """Return the names of the parameters by group; the tied head belongs to the embedding."""
        groups: dict[str, list[str]] = {"matrix": [], "embedding": [], "head": [], "scalar": []}
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                groups["scalar"].append(name)
            elif name.startswith("transformer.h."):
                groups["matrix"].append(name)
            else:
                groups["embedding"].append(name)
        return groups

    def num_parameters(self, positions: bool = True) -> int:
        """Return the number of parameters. The tied head counts once.

        Args:
            positions: False leaves out the position embeddings, as nanoGPT does.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        if positions:
            return total
        return total - self.transformer.wpe.weight.numel()
