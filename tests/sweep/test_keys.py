"""Two trials have one key exactly if they compute the same weights, for every setting of a step.

The weights are computed: a field that an optimizer, a model or a schedule does not read must not
separate trials, and one that it reads must.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model import optim
from orchestrator.config.experiment import Experiment, field_docs, parse_experiment
from orchestrator.runs.identity import identity_differences
from orchestrator.sweep.branch import Branch, settings_of_steps
from orchestrator.sweep.trials import settings_of
from tests.helpers.threads import one_thread  # noqa: F401

STEPS = 6
BASE = {
    "model": {"block_size": 4, "pad_vocab_to": 1, "n_layer": 1, "n_head": 1, "n_embd": 4},
    "train": {
        "max_steps": STEPS,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "dtype": "float32",
    },
    "optim": {},
    # All steps but the first two belong to a decay.
    "schedule": {"warmup_steps": 1, "decay_fraction": 0.7, "momentum": {"final": 0.3}},
}
PLACES = ("schedule", "schedule.weight_decay", "schedule.momentum")
ENDS = {"decay_steps": 5, "decay_fraction": 0.3, "decay_shape": "cosine", "exponent": 2}
# Another value of each setting of the update, with which the weights differ if it is read.
OTHERS = {
    "optim.beta1": 0.5,
    "optim.beta2": 0.5,
    "optim.weight_decay": 0.9,
    "optim.momentum": 0.5,
    "optim.momentum_warmup_steps": 2,
    "optim.cautious": True,
    "optim.polar_steps": 2,
    **{
        f"optim.groups.{group}.{field}": 0.7
        for group in optim.GROUPS
        for field in ("lr_scale", "weight_decay", "beta1", "beta2")
    },
    "schedule.max_lr": 1e-2,
    "schedule.min_lr_ratio": 0.9,
    "schedule.warmup_steps": 2,
    **{f"schedule.{field}": value for field, value in ENDS.items()},
    "schedule.points": {0: 0.4},
    **{
        f"schedule.{name}.{field}": value
        for name in ("weight_decay", "momentum")
        for field, value in {
            "decay_steps": 5,
            "decay_fraction": 0.3,
            "points": {0: 0.4},
        }.items()
    },
    "schedule.weight_decay.min_ratio": 0.5,
    "schedule.momentum.final": 0.5,
    **{f"{place}.kind": "linear" for place in PLACES},
}
# Of the learning rate, the weight decay and the momentum
KINDS = [
    ("constant", "constant", "constant"),
    ("constant", "wsd", "constant"),
    ("cosine", "constant", "wsd"),
    ("power", "piecewise", "inverse_sqrt"),
    ("inverse_sqrt", "power", "piecewise"),
    ("piecewise", "linear", "power"),
    ("wsd", "inverse_sqrt", "cosine"),
    ("linear", "cosine", "linear"),
]


def weights(experiment: Experiment) -> bytes:
    """Make the updates of a run on gradients that need no data. Return the last weights."""
    torch.manual_seed(1)
    model = experiment.new_model(8)
    optimizer = optim.build(experiment.optim.kind, model, experiment.optimizer_settings())
    steps = experiment.steps()
    for step in range(STEPS):
        settings = steps(step)
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = (parameter.detach() + 0.1 * (number + step)).cos()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * group["lr_scale"]
            group["weight_decay"] = settings.weight_decay * group["full_weight_decay"]
            if "momentum" in group:
                group["momentum"] = settings.momentum
        optimizer.step()
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


def key(experiment: Experiment) -> str:
    steps = experiment.steps()
    root = settings_of(experiment, steps(0), "tokens", 1)
    rates, others = settings_of_steps(steps, STEPS)
    return Branch("", root, rates, others=others).key(STEPS)


def experiment(**fields: Any) -> Experiment:
    """Return an experiment with some fields besides those of BASE."""
    tree = copy.deepcopy(BASE)
    for field, value in fields.items():
        *sections, name = field.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return parse_experiment(tree, "test")


def pairs(optimizer: str, model: str) -> Iterator[tuple[str, Experiment, Experiment]]:
    """Yield a field, an experiment, and one that differs from it in this field alone."""
    for kinds in KINDS:
        fields = {"optim.kind": optimizer, "model.kind": model}
        for place, kind in zip(PLACES, kinds, strict=True):
            fields[f"{place}.kind"] = kind
            if kind == "piecewise":
                fields[f"{place}.points"] = {0: 1.0, 4: 0.3}
        one = experiment(**fields)
        for field, value in OTHERS.items():
            place = field.rpartition(".")[0]
            is_kind = field.endswith(".kind")
            if field.endswith(".points") or is_kind:
                # Points are refused for other kinds, and needed for this one.
                is_possible = (f"{place}.points" in fields) != is_kind
            else:
                is_possible = True
            if is_possible:
                yield field, one, experiment(**fields | {field: value})


@pytest.mark.parametrize(
    ("optimizer", "model"),
    [
        ("adamw", "gpt2"),
        ("muon", "modern"),
        pytest.param("adamw", "modern", marks=pytest.mark.slow),
        pytest.param("muon", "gpt2", marks=pytest.mark.slow),
    ],
)
def test_setting_separates_trials_exactly_if_it_is_read(optimizer, model):
    wrong = []
    before = None
    for field, one, other in pairs(optimizer, model):
        if before is not one:
            before, expected = one, weights(one)
        is_read = weights(other) != expected
        if is_read != (key(one) != key(other)):
            wrong.append((field, is_read, one.schedule))
        if not is_read and identity_differences(one, other, STEPS):
            wrong.append((field, "refused at a resume", one.schedule))
    assert wrong == []


def test_every_setting_of_an_update_is_in_the_table():
    sections = ("optim.", "schedule.")
    fields = {field for field in field_docs() if field.startswith(sections)}
    # The step itself reads the norm, whatever the kinds are.
    assert fields - {"optim.kind", "optim.max_grad_norm"} == OTHERS.keys()
