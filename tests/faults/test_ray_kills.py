"""Processes of a real Ray are killed and stopped during a run; see `ray_kills.py`."""

import sys

import pytest

from tests.faults import ray_kills


@pytest.mark.slow
def test_run_survives_each_fault_of_ray(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ray_kills", "-n", str(len(ray_kills.FAULTS))])
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert ray_kills.main() == 0
