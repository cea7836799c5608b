"""Brings fields into one form, so that experiments that mean the same are equal."""

from typing import Any

from model.optim import GROUPS, OPTIMIZERS
from orchestrator.config.experiment import Experiment
from orchestrator.own_code import is_own


def with_null(experiment: Experiment) -> dict[str, Any]:
    """Return all fields as `Experiment.flat`.

    A value that null would stand for is null, and a field that has no effect has its default.
    """
    experiment = experiment.effective()
    flat = experiment.flat()
    optim = experiment.optim
    kind = OPTIMIZERS.get(optim.kind)  # None: a user's file that is not loaded
    scales = kind.lr_scales if kind is not None else {}
    meanings = {
        "schedule.momentum.final": optim.momentum,
        "schedule.momentum.decay_fraction": experiment.schedule.decay_fraction,
        "schedule.weight_decay.decay_fraction": experiment.schedule.decay_fraction,
    }
    for group in GROUPS if not is_own(optim.kind) else ():  # the user's function sees what is null
        meanings |= {
            f"optim.groups.{group}.lr_scale": scales.get(group, 1.0),
            f"optim.groups.{group}.weight_decay": 0.0 if group == "scalar" else optim.weight_decay,
            f"optim.groups.{group}.beta1": optim.beta1,
            f"optim.groups.{group}.beta2": optim.beta2,
        }
    if experiment.model.kind == "modern":
        meanings["model.n_kv_head"] = flat["model.n_head"]
        if flat["model.window"] is not None:
            meanings["model.window_size"] = max(1, experiment.model.block_size // 4)
    equal = {key for key, value in meanings.items() if flat[key] == value}
    return {key: None if key in equal else value for key, value in flat.items()}
