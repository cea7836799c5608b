"""What a model is: read this first if you add one. `model/modern.py` is an example.

A model is a class that is a `torch.nn.Module`, with a frozen dataclass of its settings. Its fields
become the settings `model.<field>`. An entry of `MODELS` in `models.py` names both: its key is the
value of `model.kind`. A user's own model needs no entry: `model.kind=path/to/file.py:Class` is
`Class` with the settings `Class.Config` (docs/own-code.md; `tests/own/conv.py` is an example).

`Class(config)` builds the model on the CPU with random weights that depend on torch's global
generator alone, which is seeded with `train.seed` before. The parameters are float32; under
`train.dtype`, the forward pass runs in `torch.autocast`.

What you get in return: the same bits on any number of workers and after a kill, sweeps that share
common steps, evaluation, sampling, and the estimate of time and memory. For this, equal parameters,
inputs and state of torch's generators must give equal bits: use no random numbers but torch's, no
clock, and no state from one call of `forward` to the next but the cache. A buffer does not change,
and one with `persistent=False` follows from the config alone: a checkpoint has the state dict.

    @dataclass(frozen=True)
    class Config:
        block_size: int = 256
        vocab_size: int = 256
        width: int = field(default=128, metadata={"help": "hidden state; GRU, arXiv:1406.1078"})

        def __post_init__(self):
            if self.width % 8:
                raise ValueError(f"width={self.width} must be divisible by 8")

Shapes: B sequences, T tokens in this call, V = vocab_size. Tokens and targets are int64.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

Reduction = Literal["mean", "sum", "window"]


class Config(Protocol):
    """Settings of a model: a frozen dataclass with at least these two fields.

    A field has the type int, float, bool, str or Literal, or one of them `| None`, a default, and
    `field(metadata={"help": "one line, with its source"})`. `__post_init__` raises ValueError for
    what no model can have; the message names the fields and says what to change.

    Attributes:
        block_size: Longest context in tokens.
        vocab_size: V. It is not set as `model.vocab_size`: it follows from the tokenizer.
    """

    @property
    def block_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


class Cache(Protocol):
    """What a model keeps of the tokens before, for sampling."""

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""


class LanguageModel(nn.Module):
    """What every model has. It need not inherit from this class, but from `torch.nn.Module`.

    Attributes:
        config: The `Config` that it was built with; set for a user's own model.
    """

    config: Config

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the logits of the next token, or the loss.

        Args:
            tokens: (B, T), T <= block_size. With a cache, they continue the tokens in it.
            targets: (B, T): the token after each position, -1 where there is no target.
            reduction: How the losses of the positions are added up.
            cache: Result of `new_cache`; only without targets, under `torch.no_grad()`. A model
                without `new_cache` never gets one.

        Returns:
            Without targets: the logits of the last position, (B, 1, V).
            With targets, the cross entropy in nats. Compute it in float32 under autocast too:
            - "mean": mean over all targets, (), float32. The training loop calls `backward` on it.
            - "sum": sum over all targets, (), float32.
            - "window": sum of each sequence, (B,), added in float64. The evaluation uses it.
        """
        raise NotImplementedError


@runtime_checkable
class HasInitWeights(Protocol):
    """Optional. Without it, the first weights are those of the constructor."""

    def init_weights(self, seed: int) -> None:
        """Set the values of the parameters, once, before a run trains its first step.

        It is called after the constructor, on the CPU, under `torch.no_grad()`. Just before,
        torch's global generator is seeded with `seed`, which is `train.seed`: the values do not
        depend on what the constructor drew. Shapes and names stay, and so do buffers that are not
        in the state dict. It is not called for weights of a checkpoint or of `train.init_from`.
        """


@runtime_checkable
class HasParameterGroups(Protocol):
    """Optional. Without it, the optimizer `muon` refuses the model."""

    def parameter_groups(self) -> dict[str, list[str]]:
        """Return the names of all parameters, each once, by group.

        - "matrix": matrices between hidden states, two dimensions each. Muon orthogonalises each by
          itself. If one has several below each other, such as query, key and value, set the
          attribute `row_parts` of the parameter to their number.
        - "embedding": tables that tokens or positions are looked up in; a tied head too.
        - "head": the weights that map the last hidden state to logits.
        - "scalar": all others: gains, biases, scales.
        """


@runtime_checkable
class HasFlops(Protocol):
    """Optional. Without it, no FLOPs and no MFU are reported."""

    def flops_per_token(self, block_size: int) -> int:
        """Return the FLOPs of training on one token in sequences of `block_size` tokens.

        Each weight that multiplies counts 6: a multiplication and an addition forward, and twice as
        many backward. See `model/flops.py` for attention.
        """


@runtime_checkable
class HasBlocks(Protocol):
    """Optional. Without it, `train.activation_checkpointing` refuses the model, and `train.compile`
    compiles it as a whole on a CPU too.

    Attributes:
        blocks: Modules, such as the layers, which are called with positional arguments. With
            activation checkpointing, the backward pass runs each again, to compute what the forward
            pass did not keep. torch.compile compiles each by itself on a CPU; then it has an
            effect only where they are called as modules.
    """

    blocks: Iterable[nn.Module]


@runtime_checkable
class HasCache(Protocol):
    """Optional. Without it, sampling computes the whole context again for each token."""

    def new_cache(self, capacity: int) -> Cache:
        """Return an empty cache for `capacity` <= block_size tokens.

        The prompt comes first, (B, T), then one token at a time, (B, 1). The logits must be those
        without a cache, up to rounding.
        """
