"""Settings of the steps of a run: its plan, another run's before the branch, an anneal to zero."""

import doctest
import json
from dataclasses import asdict, replace

import pytest

from model.schedule import Schedule, learning_rate
from orchestrator.config import steps as module
from orchestrator.config.steps import (
    NAMES,
    BatchSizes,
    Plan,
    Steps,
    StepSettings,
    first_change,
    steps_of_json,
)

COSINE = Schedule("cosine", 1.0, 0.1, warmup_steps=3, decay_steps=20)
WSD = Schedule("wsd", 0.5, 0.0, warmup_steps=3, decay_steps=30, decay_fraction=0.2)


def plan(lr: Schedule, **changes) -> Plan:
    constant = Schedule("constant", 1.0, decay_steps=20)
    made = Plan(lr, constant, replace(constant, max_lr=0.9), BatchSizes(((0, 4),)))
    return replace(made, **changes)


EVERY = plan(
    COSINE,
    weight_decay=Schedule("piecewise", 1.0, decay_steps=20, points=((0, 1.0), (9, 0.5))),
    momentum=Schedule("wsd", 0.9, 0.8, warmup_steps=5, decay_steps=20),
    batch_sizes=BatchSizes(((0, 4), (5, 8), (12, 16))),
)


def rates(steps: Steps, count: int) -> list[float]:
    return [steps.value("lr", step) for step in range(count)]


def test_doctests():
    results = doctest.testmod(module)
    assert results.failed == 0 and results.attempted >= 4


def test_settings_without_branch_are_those_of_the_plan():
    assert rates(Steps(plan(COSINE)), 25) == [learning_rate(COSINE, n) for n in range(25)]
    assert Steps(plan(COSINE))(3) == StepSettings(1.0, 1.0, 0.9, 4)
    assert Steps(EVERY)(0) == StepSettings(0.25, 1.0, 0.85, 4)
    assert Steps(EVERY)(12) == StepSettings(learning_rate(COSINE, 12), 0.5, 0.9, 16)


def test_settings_before_the_branch_are_those_of_the_other_run():
    steps = Steps(EVERY, before=plan(WSD), splice=7)
    for step in range(20):
        assert steps(step) == Steps(EVERY if step >= 7 else plan(WSD))(step)
    assert [steps.batch_sizes.at(n) for n in range(20)] == [4] * 7 + [8] * 5 + [16] * 8
    assert [steps.value("batch_size", n) for n in range(20)] == [4] * 7 + [8] * 5 + [16] * 8


def test_sequences_before_a_step_are_the_sum_of_the_batches():
    for steps in (Steps(EVERY), Steps(EVERY, plan(WSD), 7), Steps(plan(WSD), EVERY, 7)):
        sizes = steps.batch_sizes
        assert [sizes.before(n) for n in range(20)] == [
            sum(steps.value("batch_size", step) for step in range(n)) for n in range(20)
        ]


def test_constant_settings_are_those_that_never_change():
    steps = Steps(EVERY)
    assert [steps.constant(name) for name in NAMES] == [None] * 4
    assert [first_change(steps, name, 20) for name in NAMES] == [1, 1, 1, 5]
    steps = Steps(plan(WSD))
    assert [steps.constant(name) for name in NAMES] == [None, 1.0, 0.9, 4]
    assert [first_change(steps, name, 20) for name in NAMES] == [1, 20, 20, 20]
    other = plan(WSD, batch_sizes=BatchSizes(((0, 8),)))
    assert Steps(other, plan(WSD), 7).constant("batch_size") is None
    assert first_change(Steps(other, plan(WSD), 7), "batch_size", 20) == 7


def test_anneal_equals_a_wsd_run_with_a_linear_decay_to_zero():
    trunk = plan(Schedule("wsd", 0.5, 0.0, warmup_steps=3, decay_steps=100))
    probe = Steps(trunk, anneal_at=24, anneal_steps=6)
    assert rates(probe, 30) == pytest.approx(rates(Steps(plan(WSD)), 30), rel=1e-12)
    # The trials share these steps, so their rates have the same bits.
    assert rates(probe, 25) == rates(Steps(trunk), 25)
    assert probe.value("lr", 30) == 0.0


@pytest.mark.parametrize(
    "steps",
    [Steps(plan(COSINE)), Steps(EVERY, plan(WSD), 7), Steps(EVERY, anneal_at=5, anneal_steps=3)],
)
def test_json_restores_the_same_settings(steps):
    assert steps_of_json(json.loads(json.dumps(asdict(steps)))) == steps
