"""Optimizers: to add one, write its builder and add one entry to `OPTIMIZERS`.

The configuration imports this table, so torch is imported only when an optimizer is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

GROUPS = ("matrix", "embedding", "head", "scalar")  # see `protocol.HasParameterGroups`
ParameterGroups = list[dict[str, Any]]  # as torch.optim takes them


@dataclass(frozen=True)
class GroupSettings:
    """Settings of one group of parameters; None takes the general setting, or that of the kind."""

    lr_scale: float | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """Values that an optimizer is built from."""

    max_lr: float  # the training loop sets the rate of each step
    beta1: float  # decay of the first moment, 0 to 1
    beta2: float  # decay of the second moment, 0 to 1
    weight_decay: float  # of all groups but scalar, which has none
    momentum: float = 0.95  # only of muon
    cautious: bool = False  # only of muon
    polar_steps: int | None = None  # only of muon: iterations of Polar Express; None: Newton-Schulz
    groups: Mapping[str, GroupSettings] = field(default_factory=dict)  # by name


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        build: Creates the optimizer from parameter groups in torch's format. Each has the keys
            "params", "names", "group", "groups" (the groups of its parameters, "group" is the
            first), "weight_decay", "lr_scale" and "betas".
        help: One line for `--help`.
        moments: Float32 tensors that the optimizer keeps per parameter, by group, for the estimates
            of memory and of checkpoint size.
        lr_scales: Factors of the learning rate by group; 1 if a group is not here.
        files: Files of this repository that only this optimizer uses and that decide its bits.
        may_be_sharded: It updates each number by itself, or as Muon does; see `shards.Shard`.
    """

    build: Callable[[ParameterGroups, OptimizerSettings], Optimizer]
    help: str
    moments: Mapping[str, int]
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    may_be_sharded: bool = False


def build(kind: str, model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """Build an optimizer for the parameters of `model` that require a gradient."""
    groups = parameter_groups(kind, model, settings)
    optimizer = OPTIMIZERS[kind].build(groups, settings)
    for group in optimizer.param_groups:  # a schedule multiplies it
        group["full_weight_decay"] = group.get("weight_decay", 0.0)
    return optimizer


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

    allow_without_compiler()
    # On a CPU, the fused kernel is five times as fast as the default one.
    return UncompiledAdamW(groups, lr=settings.max_lr, eps=1e-8, fused=True)


def muon(groups: ParameterGroups, settings: OptimizerSettings) -> Optimizer:
    """Build Muon for the matrices and AdamW for the rest; see `muon.py`."""
    from model.muon import NEWTON_SCHULZ, POLAR_EXPRESS, MuonAdamW

    is_polar = settings.polar_steps is not None
    matrices = {
        "muon": True,
        "momentum": settings.momentum,
        "cautious": settings.cautious,
        "coefficients": POLAR_EXPRESS[: settings.polar_steps] if is_polar else NEWTON_SCHULZ,
    }
    found = [group | matrices if group["group"] == "matrix" else group for group in groups]
    return MuonAdamW(found, settings.max_lr)


def allow_without_compiler() -> None:
    """Let methods of torch's optimizers run without importing torch's compiler.

    They are marked as not to be compiled. At the first call, the mark imports the compiler, which
    would take 1.5 s of each start, unless the method has the attribute that is set here.
    """
    from torch.optim import Optimizer

    for method in vars(Optimizer).values():
        marked = getattr(method, "__wrapped__", None)
        if marked is not None:
            marked.__dynamo_disable = marked


_TWO = dict.fromkeys(GROUPS, 2)
OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(
        adamw, "Adam with decoupled weight decay", moments=_TWO, may_be_sharded=True
    ),
    "muon": OptimizerKind(
        muon,
        "Muon for the matrices inside the blocks, AdamW for the rest; lr_scale is 5 for embedding, "
        "0.4 for head and 2.5 for scalar",
        moments={**_TWO, "matrix": 1},
        lr_scales={"embedding": 5.0, "head": 0.4, "scalar": 2.5},
        files=("model/muon.py",),
        may_be_sharded=True,
    ),
}


def parameter_groups(kind: str, model: nn.Module, settings: OptimizerSettings) -> ParameterGroups:
    """Return the parameters that require a gradient, by equal settings, in the order of the model.

    Without settings of its own, each group has weight decay but "scalar": biases, norms, scales.
    Sources: nanoGPT, configure_optimizers; GPT-3, arXiv:2005.14165, appendix B.

    Returns:
        Groups in torch's format; see `OptimizerKind.build`. For adamw, one list has all tensors of
        two or more dimensions with equal settings, whatever their group.

    Raises:
        ValueError: The model does not have the groups that the optimizer needs.
    """
    group_of = _groups_by_name(kind, model)
    resolved = {name: _resolved(OPTIMIZERS[kind], name, settings) for name in GROUPS}
    found: dict[Any, dict[str, Any]] = {}
    if kind == "adamw":  # torch's and nanoGPT's two groups, even if one of them is empty
        for has_decay, name in ((True, "matrix"), (False, "scalar")):
            found[has_decay, resolved[name]] = _group(name, resolved[name])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of[name]
        first = parameter.dim() >= 2 if kind == "adamw" else group
        group_settings = resolved[group]
        entry = found.setdefault((first, group_settings), _group(group, group_settings))
        entry["params"].append(parameter)
        entry["names"].append(name)
        if group not in entry["groups"]:
            entry["groups"].append(group)
    return list(found.values())


def _groups_by_name(kind: str, model: nn.Module) -> dict[str, str]:
    """Return the group of each parameter."""
    from model.protocol import HasParameterGroups

    if isinstance(model, HasParameterGroups):
        groups = model.parameter_groups()
        return {name: group for group, names in groups.items() for name in names}
    if kind == "muon":
        raise ValueError(f"optim.kind={kind} needs a model with `parameter_groups`")
    return {
        name: "matrix" if parameter.dim() >= 2 else "scalar"
        for name, parameter in model.named_parameters()
    }


def _resolved(kind: OptimizerKind, group: str, settings: OptimizerSettings) -> GroupSettings:
    """Return the settings of a group without None."""
    own = settings.groups.get(group, GroupSettings())
    general = GroupSettings(
        lr_scale=kind.lr_scales.get(group, 1.0),
        weight_decay=0.0 if group == "scalar" else settings.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
    )
    given = {name: value for name, value in vars(own).items() if value is not None}
    return replace(general, **given)


def _group(name: str, settings: GroupSettings) -> dict[str, Any]:
    return {
        "params": [],
        "names": [],
        "group": name,
        "groups": [],
        "lr_scale": settings.lr_scale,
        "weight_decay": settings.weight_decay,
        "betas": (settings.beta1, settings.beta2),
    }
