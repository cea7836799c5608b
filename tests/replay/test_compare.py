"""Comparison of single values and tensors."""

import math

import torch

from orchestrator.replay.compare import compare_lines, compare_tensors


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
