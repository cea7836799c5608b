"""Optimizers: to add one, write its builder and add one entry to `OPTIMIZERS`.

The configuration imports this table, so torch is imported only when an optimizer is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

ParameterGroups = list[dict[str, Any]]  # as torch.optim takes them


@dataclass(frozen=True)
class OptimizerSettings:
    """Values that an optimizer is built from."""

    max_lr: float  # the training loop sets the rate of each step
    beta1: float  # decay of the first moment, 0 to 1
    beta2: float  # decay of the second moment, 0 to 1
    weight_decay: float  # of tensors with two or more dimensions


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        build: Creates the optimizer from parameter groups in torch's format.
        help: One line for `--help`.
        moments: Float32 tensors that the optimizer keeps per parameter, for the estimates of
            memory and of checkpoint size.
    """

    build: Callable[[ParameterGroups, OptimizerSettings], Optimizer]
    help: str
    moments: int


def build(kind: str, model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Build an optimizer for the parameters of `model` that require a gradient."""
    groups = parameter_groups(model, settings.weight_decay)
    return OPTIMIZERS[kind].build(groups, settings)


def adamw(groups: ParameterGroups, settings: OptimizerSettings) -> Optimizer:
    """Build AdamW. Source: arXiv:1711.05101."""
    import torch
    from torch.optim import AdamW

    update = inspect.unwrap(AdamW.step)

    class UncompiledAdamW(AdamW):
        """AdamW without the wrapper of `step`, which imports torch's compiler."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            return update(self, closure)

    _allow_without_compiler()
    betas = (settings.beta1, settings.beta2)
    # On a CPU, the fused kernel is five times as fast as the default one.
    return UncompiledAdamW(groups, lr=settings.max_lr, betas=betas, eps=1e-8, fused=True)


def _allow_without_compiler() -> None:
    """Let methods of torch's optimizers run without importing torch's compiler.

    They are marked as not to be compiled. At the first call, the mark imports the compiler, which
    would take 1.5 s of each start, unless the method has the attribute that is set here.
    """
    from torch.optim import Optimizer

    for method in vars(Optimizer).values():
        marked = getattr(method, "__wrapped__", None)
        if marked is not None:
            marked.__dynamo_disable = marked


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(adamw, "Adam with decoupled weight decay", moments=2),
}


def parameter_groups(model: nn.Module, weight_decay: float) -> ParameterGroups:
    """Return two groups, with and without weight decay. Both keep the order of the model.

    Tensors of two or more dimensions (matrices and embeddings) have weight decay; biases and
    LayerNorms do not. Sources: nanoGPT, configure_optimizers; GPT-3, arXiv:2005.14165, appendix B.

    Returns:
        Groups with the keys "params", "weight_decay" and "names". Parameters that require no
        gradient are left out.
    """
    decayed: dict[str, Any] = {"params": [], "weight_decay": weight_decay, "names": []}
    not_decayed: dict[str, Any] = {"params": [], "weight_decay": 0.0, "names": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = decayed if parameter.dim() >= 2 else not_decayed
        group["params"].append(parameter)
        group["names"].append(name)
    return [decayed, not_decayed]
