"""Schedules: tables computed by hand, nanoGPT, torch's schedulers, and properties."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import model.schedule
from model.schedule import DECAY_SHAPES, SCHEDULES, Schedule, learning_rate

# (kind, shape) -> rates at steps 3..11, for max_lr 1, floor 0.2, warmup of 3 steps, end at step 11.
# wsd decays over the last 4 of 11 steps (0.35 * 11 = 3.85), from step 7 on.
HALF = math.sqrt(0.5)
WARMUP = [0.25, 0.5, 0.75]
TABLES = {
    ("linear", "linear"): [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
    ("cosine", "linear"): [
        0.6 + 0.4 * c
        for c in (1, math.cos(math.pi / 8), HALF, math.sin(math.pi / 8), 0)
        + (-math.sin(math.pi / 8), -HALF, -math.cos(math.pi / 8), -1)
    ],
    ("wsd", "linear"): [1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2],
    ("wsd", "cosine"): [1.0, 1.0, 1.0, 1.0, 1.0, 0.6 + 0.4 * HALF, 0.6, 0.6 - 0.4 * HALF, 0.2],
    ("wsd", "1-sqrt"): [1.0, 1.0, 1.0, 1.0, 1.0, 0.6, 1 - 0.8 * HALF, 1 - 0.4 * math.sqrt(3), 0.2],
    ("power", "linear"): [1.0] * 5 + [0.2 + 0.8 * share**1.2 for share in (0.75, 0.5, 0.25, 0)],
    ("piecewise", "linear"): [0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.5, 0.0],
    ("constant", "linear"): [1.0] * 9,
    ("inverse_sqrt", "linear"): [math.sqrt(4 / (step + 1)) for step in range(3, 12)],
}
LATE = ("wsd", "power")  # decay at the end


@st.composite
def schedules(draw) -> Schedule:
    kind = draw(st.sampled_from(sorted(SCHEDULES.keys() - {"piecewise"})))
    decay_steps = draw(st.integers(1, 300))
    fraction = draw(st.floats(0, 1)) if kind in LATE else 0.2
    stable = decay_steps - round(fraction * decay_steps) if kind in LATE else decay_steps
    return Schedule(
        kind,
        draw(st.floats(1e-8, 10)),
        min_lr_ratio=draw(st.floats(0, 1)),
        warmup_steps=draw(st.integers(0, stable)),
        decay_steps=decay_steps,
        decay_fraction=fraction,
        decay_shape=draw(st.sampled_from(sorted(DECAY_SHAPES))),
    )


def torch_rates(scheduler_of, max_lr: float, steps: int) -> list[float]:
    """Return the rate of each update with the torch scheduler `scheduler_of(optimizer)`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=max_lr)
    scheduler = scheduler_of(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(schedule: Schedule, steps: int) -> list[float]:
    return [learning_rate(schedule, step) for step in range(steps)]


@pytest.mark.parametrize(("kind", "shape"), TABLES)
def test_rates_equal_table(kind, shape):
    schedule = Schedule(
        kind,
        1.0,
        0.2,
        warmup_steps=3,
        decay_steps=11,
        decay_fraction=0.35,
        decay_shape=shape,
        points=((4, 0.5), (9, 1.0), (11, 0.0)),
    )
    expected = WARMUP + TABLES[kind, shape]
    assert our_rates(schedule, 12) == pytest.approx(expected, rel=1e-12)
    late = 0.2 if kind == "inverse_sqrt" else expected[-1]  # sqrt(4 / 100), which is the floor, too
    assert learning_rate(schedule, 99) == pytest.approx(late, rel=1e-12)


def test_every_schedule_and_decay_shape_has_a_table():
    assert {kind for kind, _ in TABLES} == set(SCHEDULES)
    assert {shape for kind, shape in TABLES if kind == "wsd"} == set(DECAY_SHAPES)


@pytest.mark.parametrize(
    ("warmup_iters", "lr_decay_iters", "ratio"),
    [(2000, 600_000, 0.1), (100, 2000, 0.1), (0, 50, 0)],
)
def test_cosine_equals_nanogpt_bit_for_bit(warmup_iters, lr_decay_iters, ratio):
    top = 6e-4
    bottom = top * ratio

    def get_lr(it: int) -> float:
        if it < warmup_iters:
            return top * (it + 1) / (warmup_iters + 1)
        if it > lr_decay_iters:
            return bottom
        done = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
        return bottom + 0.5 * (1.0 + math.cos(math.pi * done)) * (top - bottom)

    schedule = Schedule("cosine", top, ratio, warmup_steps=warmup_iters, decay_steps=lr_decay_iters)
    for step in {
        *range(0, lr_decay_iters + 20, max(1, lr_decay_iters // 997)),
        warmup_iters,
        lr_decay_iters,
    }:
        assert learning_rate(schedule, step) == get_lr(step)


def test_cosine_equals_torch():
    expected = torch_rates(
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=3e-5), 3e-4, 51
    )
    assert our_rates(Schedule("cosine", 3e-4, 0.1, decay_steps=50), 51) == pytest.approx(
        expected, rel=1e-9
    )


def test_linear_equals_torch():
    expected = torch_rates(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=50), 3e-4, 60)
    assert our_rates(Schedule("linear", 3e-4, 0.1, decay_steps=50), 60) == pytest.approx(
        expected, rel=1e-9
    )


def test_constant_with_warmup_equals_torch():
    expected = torch_rates(
        lambda o: lr_scheduler.LinearLR(o, 1 / 11, 1.0, total_iters=10), 3e-4, 30
    )
    schedule = Schedule("constant", 3e-4, warmup_steps=10, decay_steps=30)
    assert our_rates(schedule, 30) == pytest.approx(expected, rel=1e-9)


def test_inverse_sqrt_equals_torch_lambda():
    def scheduler_of(
        optimizer,
    ):  # the formula of arXiv:1706.03762 with steps counted from 1, scaled to its peak
        return lr_scheduler.LambdaLR(
            optimizer, lambda n: min((n + 1) ** -0.5, (n + 1) * 11**-1.5) * 11**0.5
        )

    schedule = Schedule("inverse_sqrt", 3e-4, 0.0, warmup_steps=10, decay_steps=1)
    assert our_rates(schedule, 300) == pytest.approx(torch_rates(scheduler_of, 3e-4, 300), rel=1e-9)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 50))
def test_inverse_sqrt_does_not_depend_on_decay_steps(one, other, warmup):
    short, long = (
        Schedule("inverse_sqrt", 3e-4, warmup_steps=warmup, decay_steps=end) for end in (one, other)
    )
    assert our_rates(short, 300) == our_rates(long, 300)


def test_wsd_equals_chain_of_torch_schedulers():
    def chain(optimizer):
        warmup = lr_scheduler.LinearLR(optimizer, 1 / 11, 1.0, total_iters=10)
        stable = lr_scheduler.ConstantLR(optimizer, 1.0)
        decay = lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=20)
        return lr_scheduler.SequentialLR(optimizer, [warmup, stable, decay], milestones=[10, 80])

    schedule = Schedule("wsd", 3e-4, 0.05, warmup_steps=10, decay_steps=100, decay_fraction=0.2)
    assert our_rates(schedule, 110) == pytest.approx(torch_rates(chain, 3e-4, 110), rel=1e-9)


@given(schedules())
def test_rates_rise_to_peak_and_fall_to_floor(schedule):
    rates = our_rates(schedule, schedule.decay_steps + 5)
    rise, fall = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    near = schedule.max_lr * 1e-12
    floor = schedule.max_lr * (1 if schedule.kind == "constant" else schedule.min_lr_ratio)
    if schedule.kind == "inverse_sqrt":
        assert all(rate >= floor for rate in fall)
        rates, fall = (
            rates[: schedule.warmup_steps + 1],
            fall[:1] + [floor] * 5,
        )  # it reaches the floor when it does
    assert all(0 < a < b for a, b in zip(rise, rise[1:], strict=False))
    assert all(a >= b - near for a, b in zip(fall, fall[1:], strict=False))
    assert max(rates) <= schedule.max_lr + near
    assert fall[-5:] == [pytest.approx(floor)] * 5
    if schedule.warmup_steps < schedule.decay_steps:
        assert fall[0] == pytest.approx(schedule.max_lr) or schedule.decay_fraction == 1


@given(
    st.integers(20, 500),
    st.integers(1, 500),
    st.sampled_from(sorted(DECAY_SHAPES)),
    st.floats(1e-6, 1),
)
def test_wsd_runs_of_different_length_share_steps_before_decay(length, more, shape, peak):
    short = Schedule("wsd", peak, warmup_steps=5, decay_steps=length, decay_shape=shape)
    long = Schedule("wsd", peak, warmup_steps=5, decay_steps=length + more, decay_shape=shape)
    shared = length - round(0.2 * length) + 1
    assert our_rates(short, shared) == our_rates(long, shared)


@given(st.integers(2, 500), st.floats(0.01, 1), st.floats(0.1, 4))
def test_power_with_floor_zero_is_the_smaller_of_peak_and_power(length, fraction, exponent):
    schedule = Schedule(
        "power", 2.0, 0.0, decay_steps=length, decay_fraction=fraction, exponent=exponent
    )
    decaying = max(1, round(fraction * length))
    expected = [min(2.0, 2.0 * ((length - n) / decaying) ** exponent) for n in range(length)]
    assert our_rates(schedule, length) == pytest.approx(expected, rel=1e-9)


@given(st.dictionaries(st.integers(0, 50), st.floats(0, 2), min_size=1))
def test_piecewise_is_linear_interpolation(points):
    points = tuple(sorted(points.items()))
    schedule = Schedule("piecewise", 1.0, decay_steps=1, points=points)
    expected = np.interp(range(60), *zip(*points, strict=True))
    assert our_rates(schedule, 60) == pytest.approx(expected, abs=1e-12)


def test_docstring_examples():
    results = doctest.testmod(model.schedule)
    assert results.attempted >= 2 * len(SCHEDULES)
    assert results.failed == 0
