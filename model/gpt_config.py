"""Shape of a GPT-2. This module imports no torch, so that commands can check a shape at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model. The defaults are GPT-2 124M with a padded vocabulary.

    Attributes:
        block_size: Longest context in tokens.
        vocab_size: Rows of the embedding. It may be larger than the tokenizer's vocabulary.
        n_layer: Transformer blocks.
        n_head: Attention heads per block.
        n_embd: Width of the residual stream.
        dropout: Probability, 0 <= dropout < 1.
        bias: Biases in the linear layers and LayerNorms. GPT-2 has them.
        activation: "gelu" (exact, as in nanoGPT) or "gelu_tanh" (the approximation that OpenAI's
            weights were trained with).
        loss_chunk: Positions whose logits exist at a time while the loss is computed; None: all.

    Raises:
        ValueError: No model can have this shape.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu"
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "loss_chunk"):
            value = getattr(self, name)
            if name == "loss_chunk" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head: {self.n_head} does not divide n_embd={self.n_embd}")


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd, activation="gelu_tanh"
    )


# OpenAI's models by name.
GPT2_SIZES: dict[str, GPTConfig] = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
}
