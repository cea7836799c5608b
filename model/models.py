"""Table of models: to add one, write its module and add one entry to `MODELS`.

All code builds shapes with `new_shape` and models with `new_model`, which look into the table.

The configuration imports this table, so torch is imported only when a model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.gpt import GPT
    from model.gpt_config import GPTConfig


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
    from model.gpt_config import GPTConfig

    return GPTConfig(**fields)


def _build_gpt(shape: GPTConfig) -> GPT:
    from model.gpt import GPT

    return GPT(shape)


MODELS: dict[str, ModelKind] = {
    "gpt": ModelKind(_gpt_shape, _build_gpt, "GPT-2: learned positions, pre-norm, tied head"),
}


def new_shape(fields: Mapping[str, Any]) -> GPTConfig:
    """Create the shape of a model from its fields by name.

    The field "kind" is a key of `MODELS`. It may be absent for a GPT: stored shapes do not have it.

    Raises:
        KeyError: There is no such kind.
        TypeError: A field is unknown.
        ValueError: No model can have this shape.
    """
    others = {name: value for name, value in fields.items() if name != "kind"}
    return MODELS[fields.get("kind", "gpt")].shape(**others)


def new_model(shape: GPTConfig) -> GPT:
    """Create a model with random weights from torch's global generator."""
    return MODELS[shape.kind].build(shape)


def empty_model(shape: GPTConfig) -> GPT:
    """Create a model whose parameters have a shape but no values, on the meta device.

    Drawing random values for the meta device would import torch's compiler, which takes a second.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutDraws(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            if func.__name__ in ("normal_", "uniform_"):
                return args[0] if args else kwargs["tensor"]
            return func(*args, **kwargs)

    with torch.device("meta"), WithoutDraws():
        return new_model(shape)
