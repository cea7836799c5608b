"""Settings of the model `modern`. This module imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ModernConfig:
    """Settings of the model `modern`. The defaults gave the lowest loss at equal parameters.

    The sources are modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt) with the simple
    model of its track 3, and nanochat (https://github.com/karpathy/nanochat).

    Raises:
        ValueError: No model can have these settings.
    """

    block_size: int = _field(1024, "longest context in tokens")
    vocab_size: int = _field(50304, "rows of the embedding and of the head")
    n_layer: int = _field(12, "transformer blocks")
    n_head: int = _field(6, "query heads per block")
    n_kv_head: int | None = _field(
        None, "key and value heads, each for n_head / n_kv_head queries (2305.13245); null: n_head"
    )
    n_embd: int = _field(768, "width of the residual stream")
    dropout: float = _field(0.0, "probability of dropout after each part of a block")
    bias: bool = _field(False, "biases in the linear layers, initially 0; track 3 has them")
    norm_gains: bool = _field(
        False, "a learned factor per channel after each RMSNorm (1910.07467); track 3 has them"
    )
    rotary_base: float = _field(
        1024.0, "the slowest rotary frequency turns by 1/base radians a token (2104.09864; track 3)"
    )
    rotary_share: float = _field(
        0.5, "share of the frequencies that turn; the other channels have no position (track 3)"
    )
    attention_scale: float = _field(
        1.36, "attention scores are this times q k / sqrt(head size); track 3: 0.12 for 128"
    )
    window: str | None = _field(
        None,
        "S (sliding window) or L (whole context) for each layer, repeated, as in SSSL; the last "
        "layer is always L (nanochat); null: all L",
    )
    window_size: int | None = _field(
        None, "tokens that an S layer sees, the own one too; null: a quarter of block_size"
    )
    value_embeddings: Literal["last", "alternate"] | None = _field(
        "last",
        "layers whose values have an embedding of the token added: the last one, or every second "
        "one and the last (modded-nanogpt, nanochat); null: none",
    )
    smear: bool = _field(
        True, "add the embedding of the previous token, times a factor per channel (nanochat)"
    )
    layer_smear: bool = _field(
        False,
        "smear the inputs of attention and MLP in each layer too (Canon layers, 2512.17351, of one "
        "token)",
    )
    layer_scalars: bool = _field(
        False, "learned factors of the residual stream and of the embedding per layer (nanochat)"
    )
    logit_cap: float | None = _field(
        None, "logits become cap tanh(logits / cap) (2408.00118); track 3 has 15; null: no cap"
    )
    loss_chunk: int | None = _field(
        None,
        "positions whose logits exist at a time while the loss is computed; saves memory for large "
        "vocabularies (2411.09009); null: all",
    )

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            self._check_count(name)
        for name in ("n_kv_head", "window_size", "loss_chunk"):
            if getattr(self, name) is not None:
                self._check_count(name)
        for name in ("rotary_base", "attention_scale", "logit_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not 0 <= self.rotary_share <= 1:
            raise ValueError(f"rotary_share must be 0 to 1, got {self.rotary_share}")
        self._check_heads()
        self._check_window()

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def _check_heads(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head={self.n_head} must be divisible by n_kv_head={self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(
                f"n_embd={self.n_embd} / n_head={self.n_head} must be even: rotary positions turn "
                "pairs of channels"
            )

    def _check_window(self) -> None:
        if self.window is None:
            if self.window_size is not None:
                raise ValueError(f"window_size={self.window_size} needs window, as in window=SSSL")
        elif not self.window or set(self.window) - set("SL"):
            raise ValueError(f"window must be letters S and L, as in SSSL, got {self.window!r}")

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_kv_head or self.n_head

    def window_of(self, layer: int) -> int:
        """Return the number of tokens that a position of a layer sees, itself included."""
        last = layer == self.n_layer - 1
        if self.window is None or last or self.window[layer % len(self.window)] == "L":
            return self.block_size
        return min(self.window_size or max(1, self.block_size // 4), self.block_size)

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether the values of a layer have an embedding of the token added."""
        from_last = self.n_layer - 1 - layer
        if self.value_embeddings == "alternate":
            return from_last % 2 == 0
        return self.value_embeddings == "last" and from_last == 0
