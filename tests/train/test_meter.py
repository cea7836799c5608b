"""The open log window: means in a fixed order, times that add up, and nothing that leaks into the next window."""

import itertools

import pytest

from orchestrator.train import meter
from orchestrator.train.meter import Meter, memory_metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    return tick


def window(clock, *laps: tuple[str, float], losses=((1.0,),)) -> dict[str, float]:
    m = Meter(started=0.0, _mark=0.0)
    for name, seconds in laps:
        clock(seconds)
        m.lap(name)
    for step in losses:
        m.add(list(step))
    return m.flush(tokens_per_step=100)


def test_the_loss_is_the_exact_mean_over_every_micro_batch_of_every_step(clock):
    losses = [[1e16, 1.0], [-1e16, 1.0]]  # which left to right would give 0.25
    metrics = window(clock, ("compute", 1.0), losses=losses)
    assert metrics["train/loss"] == 0.5
    assert metrics["train/loss_max"] == 1e16


def test_times_are_booked_where_they_were_spent(clock):
    metrics = window(
        clock,
        ("data", 1.0),
        ("compute", 6.0),
        ("rest", 1.0),
        ("checkpoint", 5.0),
        ("evaluation", 7.0),
        losses=[[1.0]] * 4,
    )
    assert metrics["perf/step_time_s"] == 2.0
    assert metrics["perf/tokens_per_sec"] == 50.0
    assert metrics["perf/data_wait_s"] == 0.25
    assert metrics["perf/checkpoint_stall_s"] == 5.0
    assert metrics["perf/overhead_share"] == 0.25
    assert metrics["run/goodput"] == 8 / 20


def test_a_window_starts_empty_after_the_one_before(clock):
    m = Meter(started=0.0, _mark=0.0)
    for loss, seconds in ((9.0, 8.0), (1.0, 2.0)):
        clock(seconds)
        m.lap("compute")
        m.add([loss])
        metrics = m.flush(100)
    assert (metrics["train/loss"], metrics["train/loss_max"], metrics["perf/step_time_s"]) == (
        1.0,
        1.0,
        2.0,
    )
    assert metrics["run/goodput"] == 1.0
    assert m.losses == []


def test_losses_of_an_earlier_attempt_count_for_the_mean_and_not_for_the_speed(clock):
    m = Meter(started=0.0, _mark=0.0)
    m.losses = [3.0, 3.0]  # restored from a checkpoint
    clock(2.0)
    m.lap("compute")
    m.add([1.0, 1.0])
    metrics = m.flush(100)
    assert metrics["train/loss"] == 2.0
    assert metrics["perf/step_time_s"] == 2.0


def test_the_mean_does_not_depend_on_where_the_window_was_cut_by_a_resume(clock):
    steps = [[0.1 * i, 0.7 / (i + 1)] for i in range(6)]
    whole = window(clock, ("compute", 1.0), losses=steps)["train/loss"]
    for cut in range(1, 6):
        m = Meter()
        m.losses = list(itertools.chain.from_iterable(steps[:cut]))
        clock(1.0)
        m.lap("compute")
        for step in steps[cut:]:
            m.add(step)
        assert m.flush(1)["train/loss"] == whole


def test_memory_is_in_gib():
    (value,) = memory_metrics("cpu").values()
    assert 0.05 < value < 64
