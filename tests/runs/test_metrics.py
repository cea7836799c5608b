"""The table of metrics."""

import pytest

from orchestrator.runs import metrics
from orchestrator.runs.metrics import METRICS
from tests.helpers.curves import exact_part


@pytest.mark.parametrize("name", METRICS)
def test_losses_rates_and_counts_are_exact_and_measurements_are_not(name):
    assert METRICS[name].exact == name.startswith(("train/", "val/", "optim/"))


def test_metrics_of_an_evaluation_follow_the_eval_interval():
    evaluated = {name for name, metric in METRICS.items() if metric.interval == "eval"}
    assert evaluated == {
        "val/loss",
        "val/bits_per_byte",
        "val/best_loss",
        "train/eval_loss",
        "val/ema_loss",
    }


def test_unknown_metric_is_not_exact():
    line = {"step": 3, "timestamp": 7, "train/loss": 2.0, "perf/mfu": 0.4, "other": 1.0}
    assert exact_part(line) == {"step": 3, "train/loss": 2.0}


def test_peak_memory_is_the_largest_of_all_lines():
    lines = [{"memory/max_resident_gib": 1.5}, {"memory/max_allocated_gib": 2.5}, {"step": 9}]
    assert metrics.peak_memory_gib(lines) == 2.5
    assert metrics.peak_memory_gib([{"step": 9}]) is None
