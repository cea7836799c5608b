"""A transformer as people train it today: rotary positions, RMSNorm, squared ReLU, untied head.

Edit this file to try an idea. Each part can be switched off: `modern_config.py` lists the settings,
their sources and their defaults; `protocol.py` says what the rest of the project expects.

Shapes: B sequences, T tokens in this call, S tokens in the cache after this call, C = n_embd,
H = n_head, K = n_kv_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.cache import LayerCache
from model.loss import chunked_cross_entropy, cross_entropy, wide_dtype
from model.modern_config import ModernConfig
from model.operations import normalize, rotate, squared_relu
from model.protocol import Reduction

LastToken = dict[str, Tensor]  # what `smear` needs of the last token, by name, (B, 1, C) each


class BlockCache(LayerCache):
    """What a block keeps of earlier tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.last: LastToken = {}


class ModernCache:
    """What the model keeps of earlier tokens, for at most `capacity` of them."""

    def __init__(self, config: ModernConfig, capacity: int) -> None:
        self.layers = [BlockCache(capacity) for _ in range(config.n_layer)]
        self.last: LastToken = {}

    @property
    def length(self) -> int:
        """Number of tokens stored so far."""
        return self.layers[0].length


class RMSNorm(nn.Module):
    """`normalize` times a gain per channel, if the model has gains."""

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.gain: nn.Parameter | None = None
        if config.norm_gains:
            self.gain = nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        y = normalize(x).to(x.dtype)
        return y if self.gain is None else y * self.gain


def smear(x: Tensor, factor: Tensor | None, last: LastToken | None, name: str) -> Tensor:
    """Add the channels of the previous token, times a factor each: (B, T, C).

    Args:
        x: Channels of each token, (B, T, C).
        factor: (C,); None changes nothing.
        last: From it comes the token before the first one, and the last one goes into it.
        name: Key of `last`.
    """
    if factor is None:
        return x
    before = x.new_zeros(x.size(0), 1, x.size(2))
    if last is not None:
        before = last.get(name, before)
        last[name] = x[:, -1:]
    return x + factor * torch.cat((before, x[:, :-1]), dim=1)


def zeros(config: ModernConfig, is_used: bool) -> nn.Parameter | None:
    """Return a factor of `smear`, if the model has it."""
    return nn.Parameter(torch.zeros(config.n_embd)) if is_used else None


def rotation(config: ModernConfig, positions: Tensor) -> Tensor:
    """Return cosine and sine of the angle of each pair of channels: (T, 1, D/2, 2)."""
    pairs = config.head_size // 2
    turning = round(pairs * config.rotary_share)
    frequencies = torch.zeros(pairs, device=positions.device)
    exponents = torch.linspace(0, 1, turning, device=positions.device)
    frequencies[:turning] = config.rotary_base**-exponents
    angles = torch.outer(positions, frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(1)


class Attention(nn.Module):
    """Attention over earlier positions, with fewer key heads than query heads if K < H."""

    def __init__(self, config: ModernConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window = config.window_of(layer)
        c, bias = config.n_embd, config.bias
        kv = config.kv_heads * config.head_size
        # Three matrices: Muon orthogonalises each by itself.
        self.query = nn.Linear(c, c, bias=bias)
        self.key = nn.Linear(c, kv, bias=bias)
        self.value = nn.Linear(c, kv, bias=bias)
        self.projection = nn.Linear(c, c, bias=bias)
        self.value_embedding: nn.Embedding | None = None
        if config.has_value_embedding(layer):
            self.value_embedding = nn.Embedding(config.vocab_size, kv)

    def forward(self, x: Tensor, tokens: Tensor, turn: Tensor, cache: LayerCache | None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        config = self.config
        heads = (*tokens.shape, -1, config.head_size)  # (B, T, H or K, D)
        v = self.value(x)
        q = rotate(normalize(self.query(x).view(heads)), turn).to(v.dtype)
        k = rotate(normalize(self.key(x).view(heads)), turn).to(v.dtype)
        if self.value_embedding is not None:
            # Half: Adam then moves this table at half of the rate of the other embedding.
            v = v + 0.5 * self.value_embedding(tokens).to(v.dtype)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v.view(heads)))  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
        y = self._attend(q, k, v)  # (B, H, T, D)
        return self.projection(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t, s = q.size(2), k.size(2)
        if t == 1:  # the only query sees the last keys, and needs no mask
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        mask = None
        if t > 1 and (s > t or s > self.window):
            distance = torch.arange(s - t, s, device=q.device)[:, None] - torch.arange(
                s, device=q.device
            )
            mask = (distance >= 0) & (distance < self.window)  # (T, S)
        groups = q.size(1) // k.size(1)
        if groups > 1:
            k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))  # (B, H, S, D)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=t > 1 and mask is None,
            scale=self.config.attention_scale / math.sqrt(self.config.head_size),
        )


class MLP(nn.Module):
    """Two linear layers with a squared ReLU between them."""

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.projection(squared_relu(self.expand(x)))


class Block(nn.Module):
    """Attention and MLP, each on a normalized input and added to the residual stream."""

    def __init__(self, config: ModernConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config)
        self.attention_smear = zeros(config, config.layer_smear)
        self.mlp_smear = zeros(config, config.layer_smear)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, tokens: Tensor, turn: Tensor, cache: BlockCache | None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        last = cache.last if cache is not None else None
        y = smear(self.attention_norm(x), self.attention_smear, last, "attention")
        x = x + self.dropout(self.attention(y, tokens, turn, cache))
        y = smear(self.mlp_norm(x), self.mlp_smear, last, "mlp")
        return x + self.dropout(self.mlp(y))


class Modern(nn.Module):
    """The model. Its weights are random and depend only on torch's global generator."""

    Config = ModernConfig

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.smear = zeros(config, config.smear)
        self.embedding_norm = RMSNorm(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.layer_scalars: nn.Parameter | None = None  # of the stream and of the embedding
        if config.layer_scalars:
            self.layer_scalars = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(config.n_layer, 1))
        self.head_norm = RMSNorm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Draw the weights as track 3 does: the first logits are 0, each block first adds 0."""
        for name, parameter in self.named_parameters():
            if name.endswith(("projection.weight", "head.weight", "bias")):
                parameter.zero_()
            elif name == "embedding.weight":
                parameter.normal_()
            elif name.endswith("value_embedding.weight"):
                parameter.normal_(std=0.2)
            elif name.endswith("weight"):
                parameter.normal_(std=math.sqrt(0.33 / parameter.size(1)))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
        cache: ModernCache | None = None,
    ) -> Tensor:
        """Return the logits of the last position, or the loss: see `protocol.LanguageModel`.

        Raises:
            ValueError: There are more tokens than block_size.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit into block_size={self.config.block_size}")
        turn = rotation(self.config, torch.arange(start, end, device=tokens.device))
        x = embedded = self._embed(tokens, cache)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            if self.layer_scalars is not None:
                x = self.layer_scalars[i, 0] * x + self.layer_scalars[i, 1] * embedded
            x = block(x, tokens, turn, cache.layers[i] if cache is not None else None)
        if targets is None:
            return self._logits(self.head_norm(x[:, -1:]))  # (B, 1, V)
        return self._loss(self.head_norm(x), targets, reduction)

    def _embed(self, tokens: Tensor, cache: ModernCache | None) -> Tensor:
        last = cache.last if cache is not None else None
        x = smear(self.embedding(tokens), self.smear, last, "embedding")  # (B, T, C)
        return self.embedding_norm(x)

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.head(x)  # (B, T, V)
        cap = self.config.logit_cap
        return logits if cap is None else cap * torch.tanh(logits.to(wide_dtype(logits)) / cap)

    def _loss(self, x: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        config = self.config
        if config.loss_chunk is None:
            return cross_entropy(self._logits(x), targets, reduction)
        return chunked_cross_entropy(
            x,
            self.head.weight,
            self.head.bias,
            targets,
            reduction,
            chunk=config.loss_chunk,
            cap=config.logit_cap,
        )

    def parameter_groups(self) -> dict[str, list[str]]:
        """Return the names of the parameters by group, for the optimizers."""
        groups: dict[str, list[str]] = {"matrix": [], "embedding": [], "head": [], "scalar": []}
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or name == "layer_scalars":
                groups["scalar"].append(name)
            elif name.startswith("head"):
                groups["head"].append(name)
            elif "embedding" in name:
                groups["embedding"].append(name)
            else:
                groups["matrix"].append(name)
        return groups

    def flops_per_token(self, block_size: int) -> int:
        """Return 6 N + 12 C W over all layers. N: weights that multiply; W: tokens that are seen.

        As in `flops.flops_per_token`, the half that causal attention masks counts.
        """
        groups = self.parameter_groups()
        multiplied = (self.get_parameter(name) for name in groups["matrix"] + groups["head"])
        layers = range(self.config.n_layer)
        seen = sum(min(block_size, self.config.window_of(layer)) for layer in layers)
        return 6 * sum(weight.numel() for weight in multiplied) + 12 * self.config.n_embd * seen

    def new_cache(self, capacity: int) -> ModernCache:
        """Return an empty cache for `capacity` tokens."""
        return ModernCache(self.config, capacity)
