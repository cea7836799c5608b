"""Comparison of single values and tensors."""

import math

import pytest
import torch

from orchestrator.replay.compare import (
    FLOAT32,
    FLOAT64,
    compare_lines,
    compare_tensors,
    ulps,
)


@pytest.mark.parametrize(
    ("then", "now", "formats", "distance"),
    [
        (1.0, math.nextafter(1.0, 2.0), FLOAT64, 1),
        (0.0, -0.0, FLOAT64, 0),
        (-5e-324, 5e-324, FLOAT64, 2),
        (1.0, 2.0, FLOAT64, 2**52),
        (1.0, 2.0, FLOAT32, 2**23),
        (-1.0, -2.0, FLOAT32, 2**23),
        (math.nan, 1.0, FLOAT64, None),
        (None, 1.0, FLOAT64, None),
    ],
)
def test_distance_in_ulps(then, now, formats, distance):
    assert ulps(then, now, formats) == distance
    assert ulps(now, then, formats) == distance


def test_zeros_of_different_sign_differ_and_nan_equals_itself():
    assert compare_lines(1, {"val/loss": math.nan}, {"val/loss": math.nan}) == []
    assert len(compare_lines(1, {"val/loss": 0.0}, {"val/loss": -0.0})) == 1
    tensor = torch.tensor([1.0, math.nan])
    assert compare_tensors(1, "model", {"w": tensor}, {"w": tensor.clone()}) == []
    assert len(compare_tensors(1, "model", {"w": tensor}, {"w": torch.tensor([1.0, 2.0])})) == 1


def test_metrics_that_are_not_exact_are_ignored():
    assert compare_lines(1, {"perf/mfu": 0.3}, {"perf/mfu": 0.4}) == []


def test_tensors_of_different_shape_differ():
    [found] = compare_tensors(1, "model", {"w": torch.zeros(2)}, {"w": torch.zeros(3)})
    assert str(found) == "step 1, model w: float32 (2,) then, float32 (3,) now"
