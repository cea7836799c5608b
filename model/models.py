"""Table of models: to add one, write its module and add one entry to `MODELS`.

The configuration imports this table, so torch is imported only when a model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.gpt import GPT, GPTConfig


@dataclass(frozen=True)
class ModelKind:
    """One architecture.

    Attributes:
        shape: Creates the shape from its fields. Raises ValueError if no model can have it.
        build: Creates the model, with random weights from torch's global generator.
        help: One line for `--help`.
    """

    shape: Callable[..., GPTConfig]
    build: Callable[[GPTConfig], GPT]
    help: str


def _gpt_shape(**fields: Any) -> GPTConfig:
    from model.gpt import GPTConfig

    return GPTConfig(**fields)


def _build_gpt(shape: GPTConfig) -> GPT:
    from model.gpt import GPT

    return GPT(shape)


MODELS: dict[str, ModelKind] = {
    "gpt": ModelKind(_gpt_shape, _build_gpt, "GPT-2: learned positions, pre-norm, tied head"),
}
