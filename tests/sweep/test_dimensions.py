"""Dimensions of a search space: their parsing, and draws that depend only on their keys."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweep.space.dimensions import Choices, Range, dimension, draw, pick


def test_draw_does_not_depend_on_other_fields():
    some = {
        "schedule.max_lr": Range(1e-4, 1e-2, log=True),
        "model.n_layer": Range(1, 12, integer=True),
    }
    for number in range(20):
        alone = draw(3, number, {"model.n_layer": some["model.n_layer"]})
        assert alone["model.n_layer"] == draw(3, number, some)["model.n_layer"]


@given(
    low=st.floats(1e-8, 1e3),
    width=st.floats(1e-3, 1e3),
    share=st.floats(0, 1, exclude_max=True),
    log=st.booleans(),
)
def test_drawn_number_lies_in_its_range(low, width, share, log):
    high = low * (1 + width)
    assert low <= pick(Range(low, high, log), share) <= high


@given(
    low=st.integers(1, 1000),
    width=st.integers(1, 50),
    share=st.floats(0, 1, exclude_max=True),
    log=st.booleans(),
    step=st.none() | st.integers(1, 60),
)
def test_integer_field_gives_integers_in_range_and_on_steps(low, width, share, log, step):
    step = None if log else step
    value = pick(Range(low, low + width, log, step, integer=True), share)
    assert type(value) is int
    assert low <= value <= low + width
    assert not step or (value - low) % step == 0


def test_all_values_can_be_drawn_and_log_is_uniform_in_the_logarithm():
    shares = [i / 1000 for i in range(1000)]
    assert {pick(Range(1, 4, integer=True), s) for s in shares} == {1, 2, 3, 4}
    assert {pick(Range(1, 4, log=True, integer=True), s) for s in shares} == {1, 2, 3, 4}
    assert {pick(Range(0.1, 0.5, step=0.1), s) for s in shares} == {0.1, 0.2, 0.3, 0.4, 0.5}
    assert {pick(Choices(("a", None, 3)), s) for s in shares} == {"a", None, 3}
    logs = [math.log10(pick(Range(1e-4, 1e-2, log=True), s)) for s in shares]
    assert logs == pytest.approx([-4 + 2 * s for s in shares], abs=1e-5)


def test_parsed_dimension_has_the_types_of_the_field():
    assert dimension("train.max_steps", {"low": 1e2, "high": 6e3, "step": 50.0}) == Range(
        100, 6000, False, 50, True
    )
    assert type(dimension("train.max_steps", {"low": 1e2, "high": 6e3}).low) is int
    assert dimension("optim.max_grad_norm", {"low": 0.1, "high": 1, "log": True}) == Range(
        0.1, 1.0, True
    )
    assert dimension("optim.max_grad_norm", [None, 1]) == Choices((None, 1.0))
    assert (
        dimension("model.dropout", {"low": 0.1, "high": 0.3, "step": 0.2}).step == 0.2
    )  # 0.3 - 0.1 is a little less
