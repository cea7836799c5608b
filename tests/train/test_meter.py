"""The log window: exact means, times that add up, and an empty window after each line."""

import itertools

import pytest

from model import optim
from orchestrator.config.experiment import load_experiment
from orchestrator.train import meter
from orchestrator.train.meter import Meter, memory_metrics


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock; the test moves it."""
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
    return m.flush(100 * len(losses))


def test_loss_is_the_exact_mean_over_all_micro_batches(clock):
    losses = [[1e16, 1.0], [-1e16, 1.0]]  # added from left to right, the mean would be 0.25
    metrics = window(clock, ("compute", 1.0), losses=losses)
    assert metrics["train/loss"] == 0.5
    assert metrics["train/loss_max"] == 1e16


def test_times_are_added_to_their_phase(clock):
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


def test_flush_empties_the_window(clock):
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


def test_restored_losses_count_for_the_mean_and_not_for_the_speed(clock):
    m = Meter(started=0.0, _mark=0.0)
    m.losses = [3.0, 3.0]  # restored from a checkpoint
    clock(2.0)
    m.lap("compute")
    m.add([1.0, 1.0])
    metrics = m.flush(100)
    assert metrics["train/loss"] == 2.0
    assert metrics["perf/step_time_s"] == 2.0


def test_mean_does_not_depend_on_where_a_resume_cut_the_window(clock):
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


def test_window_of_a_run_that_logs_only_at_its_end_has_the_losses_of_one_step():
    m = Meter(last_step_only=True)
    for losses in ([3.0, 3.0], [1.0, 1.0]):
        m.add(losses)
    assert m.losses == [1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "scales", "expected"),
    [
        ("adamw", {}, {}),
        # One list of the optimizer has the matrices and the head.
        ("adamw", {"embedding": 3}, {"matrix": 1, "embedding": 3, "head": 1, "scalar": 1}),
        (
            "adamw",
            {"embedding": 3, "head": 3},
            {"matrix": 1, "embedding": 3, "head": 3, "scalar": 1},
        ),
        ("muon", {"head": 2}, {"matrix": 1, "embedding": 5, "head": 2, "scalar": 2.5}),
    ],
)
def test_each_group_has_its_learning_rate(kind, scales, expected):
    words = [f"optim.groups.{name}.lr_scale={scale}" for name, scale in scales.items()]
    experiment = load_experiment(
        None,
        [
            "model.kind=modern",
            "model.norm_gains=true",
            "model.n_embd=64",
            "model.n_head=2",
            f"optim.kind={kind}",
            *words,
        ],
    )
    optimizer = optim.build(kind, experiment.new_model(65), experiment.optimizer_settings())
    assert meter._rates_of_groups(optimizer, 0.5) == {
        f"optim/lr.{name}": 0.5 * scale for name, scale in expected.items()
    }


def test_memory_is_in_gib():
    (value,) = memory_metrics("cpu").values()
    assert 0.05 < value < 64
