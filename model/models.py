"""Table of models: to add one, write its module and add one entry to `MODELS`.

All code builds settings with `new_config` and models with `new_model`, which look into the table.

The configuration imports this table, so torch is imported only when a model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from model.gpt_config import GPTConfig
from model.modern_config import ModernConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model.protocol import Config, LanguageModel

DEFAULT = "gpt2"


@dataclass(frozen=True)
class ModelKind:
    """One architecture.

    Attributes:
        config: The class of its settings; see `protocol.Config`.
        build: Calls the constructor, which draws weights from torch's global generator.
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


def new_model(kind: str, config: Config, seed: int) -> LanguageModel:
    """Create a model with its first weights.

    Its constructor draws them from torch's global generator as it is. If the model has
    `init_weights`, see `protocol.HasInitWeights`, this function calls it with `seed`.
    """
    import torch

    from model.protocol import HasInitWeights

    model = MODELS[kind].build(config)
    if isinstance(model, HasInitWeights):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.init_weights(seed)
    return model


def empty_model(kind: str, config: Config, device: str = "meta") -> LanguageModel:
    """Create a model whose parameters have a shape but no values; torch's generator stays.

    `init_weights` is not called. Drawing random values takes time, and for the meta device it would
    import torch's compiler.
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
        return MODELS[kind].build(config)


def checkpoint_activations(model: LanguageModel) -> None:
    """Let the backward pass compute the activations inside of each block again; arXiv:1604.06174.

    The forward pass then keeps only the inputs of the blocks. The bits stay, also with dropout.

    Raises:
        ValueError: The model has no blocks; see `protocol.HasBlocks`.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    blocks = _blocks(model)
    if not blocks:
        raise ValueError(
            "train.activation_checkpointing needs a model with `blocks`; set it to false"
        )

    def again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return forward(*args)
            return checkpoint(forward, *args, use_reentrant=False)

        return run

    for block in blocks:
        if "forward" not in vars(block):  # not yet
            block.forward = again(block.forward)


def compiled(model: LanguageModel, device: str) -> nn.Module:
    """Return a module that computes the model with torch.compile; it may be the model itself.

    On a CPU, each block is compiled by itself: blocks of the same kind share their code, and the
    backward pass gives the gradients of a block before it goes on to the next one. A model without
    blocks (see `protocol.HasBlocks`), and each model on a GPU, is compiled as a whole.

    What this process has compiled before is dropped, and all shapes are constants: else the bits
    would depend on earlier models and shapes. By default, torch compiles a second shape with code
    for all shapes. A function that has `recompile_limit` compiled versions runs uncompiled from
    then on, without an error.
    """
    import torch

    torch.compiler.reset()
    blocks = _blocks(model) if device == "cpu" else []
    # Each block may need code of its own, for training and for evaluation. torch's defaults are 8
    # and 256.
    limit = max(8, 2 * len(blocks))
    torch.compiler.config.recompile_limit = limit
    torch.compiler.config.accumulated_recompile_limit = max(256, limit)
    for block in blocks:
        block.compile(dynamic=False)
    if blocks:
        return model
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def _blocks(model: LanguageModel) -> list[nn.Module]:
    """Return the blocks of a model; none if its `blocks` are something else, such as a number."""
    import torch

    from model.protocol import HasBlocks

    blocks = model.blocks if isinstance(model, HasBlocks) else []
    found = list(blocks) if isinstance(blocks, Iterable) else []
    return found if all(isinstance(block, torch.nn.Module) for block in found) else []
