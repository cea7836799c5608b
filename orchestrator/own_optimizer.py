"""Checks of a user's own optimizer: it updates small parameters, and is restored once."""

import copy
from collections import Counter

import torch
from torch import Tensor, nn

from model import optim
from model.optim import GROUPS, OptimizerSettings
from orchestrator.errors import UserError
from orchestrator.own_code import error, failure, parts

SETTINGS = OptimizerSettings(max_lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.1)


class _Tiny(nn.Module):
    """Two parameters of each group."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for group in GROUPS:
            shape = (64,) if group == "scalar" else (64, 32)
            for number in range(2):
                values = torch.randn(shape, generator=generator)
                self.register_parameter(f"{group}{number}", nn.Parameter(values))

    def parameter_groups(self) -> dict[str, list[str]]:
        return {group: [f"{group}0", f"{group}1"] for group in GROUPS}


def moments_of(kind: str) -> dict[str, int]:
    """Update small parameters twice. Return how many numbers are kept for each, by group.

    Raises:
        UserError: The optimizer fails, or a checkpoint would not have all of its state.
    """
    model = _Tiny()
    optimizer = optim.build(kind, model, SETTINGS)
    refuse_other_parameters(kind, model, optimizer)
    _update(kind, model, optimizer)
    moments = {}
    for group in GROUPS:
        state = optimizer.state.get(model.get_parameter(f"{group}0"), {})
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise _refusal(
                    kind, f"state[{key!r}] is {type(value).__name__}; only tensors are stored"
                )
            if not isinstance(key, str) or not key.isidentifier():
                raise _refusal(kind, f"state has the key {key!r}; use a name, as of a variable")
        size = model.get_parameter(f"{group}0").numel()
        moments[group] = round(sum(value.numel() for value in state.values()) / size)
    restored = copy.deepcopy(model)
    other = optim.build(kind, restored, SETTINGS)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            other.state[restored.get_parameter(name)][key] = value.clone()
    _update(kind, model, optimizer)
    _update(kind, restored, other)
    pairs = zip(model.parameters(), restored.parameters(), strict=True)
    if not all(torch.equal(one, two) for one, two in pairs):
        raise _refusal(
            kind,
            "an update after a restart would differ: keep what lasts from one step to the next in "
            "self.state[parameter], as tensors",
        )
    for some in other.param_groups:  # the proof of a checkpoint updates some parameters alone
        some.update(params=some["params"][:1], names=some.get("names", [])[:1])
    _update(kind, restored, other)
    return moments


def _update(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make one update as a step does."""
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = parameter.detach().cos()
    for group in optimizer.param_groups:
        group["lr"] = SETTINGS.max_lr * group["lr_scale"]
    try:
        optimizer.step()
    except (Exception, SystemExit) as problem:
        raise failure("optim", kind, problem, parts(kind)["name"]) from None
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() != places[name]:
            raise _refusal(kind, f"an update gives {name} other memory; change it in place")


def refuse_other_parameters(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that misses a parameter, or has one twice."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    given = Counter(p for group in optimizer.param_groups for p in group["params"])
    if not given.keys() <= {*model.parameters()}:
        raise _refusal(kind, "a parameter in its groups is not one of the model")
    for parameter, name in names.items():
        if given[parameter] != 1:
            count = "not" if parameter not in given else f"{given[parameter]} times"
            raise _refusal(kind, f"parameter {name} is {count} in the groups of the optimizer")


def _refusal(kind: str, problem: str) -> UserError:
    name = parts(kind)["name"]
    return error("optim", kind, f"{name}: {problem}", name)
