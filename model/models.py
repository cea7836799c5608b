"""Table of models: to add one, write its module and add one entry to `MODELS`.

All code builds settings with `new_config` and models with `new_model`, which look into the table.

The configuration imports this table, so torch is imported only when a model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from model.gpt_config import GPTConfig
from model.modern_config import ModernConfig

if TYPE_CHECKING:
    from model.protocol import Config, LanguageModel

DEFAULT = "gpt2"


@dataclass(frozen=True)
class ModelKind:
    """One architecture.

    Attributes:
        config: The class of its settings; see `protocol.Config`.
        build: Creates the model, with random weights from torch's global generator.
        help: One line for `--help`.
        files: Files of this repository that only this model uses and that decide its bits.
    """

    config: type
    build: Callable[[Any], LanguageModel]
    help: str
    files: tuple[str, ...]


def _build_gpt2(config: GPTConfig) -> LanguageModel:
    from model.gpt import GPT

    return cast("LanguageModel", GPT(config))


def _build_modern(config: ModernConfig) -> LanguageModel:
    from model.modern import Modern

    return cast("LanguageModel", Modern(config))


MODELS: dict[str, ModelKind] = {
    "gpt2": ModelKind(
        GPTConfig,
        _build_gpt2,
        "GPT-2: learned positions, pre-norm, tied head",
        ("model/gpt.py", "model/gpt_config.py", "model/weights.py"),
    ),
    "modern": ModelKind(
        ModernConfig,
        _build_modern,
        "rotary positions, RMSNorm, squared ReLU, untied head",
        ("model/modern.py", "model/modern_config.py", "model/operations.py"),
    ),
}


def fields_of(config: Config) -> dict[str, Any]:
    """Return the settings of a model by name."""
    return asdict(config)  # type: ignore[call-overload]


def stored_config(kind: str, config: Config) -> dict[str, Any]:
    """Return the fields that `new_config` reads. Those of a GPT-2 have no kind, as ever."""
    fields = fields_of(config)
    return fields if kind == DEFAULT else {"kind": kind, **fields}


def kind_of(fields: Mapping[str, Any]) -> str:
    """Return the kind of a stored config."""
    return fields.get("kind", DEFAULT)


def new_config(fields: Mapping[str, Any]) -> Config:
    """Create the settings of a model from the fields that `stored_config` returns.

    Raises:
        KeyError: There is no such kind.
        TypeError: A field is unknown.
        ValueError: No model can have these settings.
    """
    others = {name: value for name, value in fields.items() if name != "kind"}
    return MODELS[kind_of(fields)].config(**others)


def new_model(kind: str, config: Config) -> LanguageModel:
    """Create a model with random weights from torch's global generator."""
    return MODELS[kind].build(config)


def empty_model(kind: str, config: Config, device: str = "meta") -> LanguageModel:
    """Create a model whose parameters have a shape but no values; torch's generator stays.

    Drawing random values takes time, and for the meta device it would import torch's compiler.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutDraws(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            kwargs = kwargs or {}
            if func.__name__ in ("normal_", "uniform_"):
                return args[0] if args else kwargs["tensor"]
            return func(*args, **kwargs)

    with torch.random.fork_rng(devices=[]), torch.device(device), WithoutDraws():
        return new_model(kind, config)
