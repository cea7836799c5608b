"""The process that times steps, started before its job is known."""

import io
import json
import subprocess
import sys

import psutil
import pytest

from orchestrator.cost import bench, process
from orchestrator.cost.process import SOURCES
from tests.cost.test_measure import N_VOCAB, ONE_WORKER, small


def test_process_started_ahead_does_the_next_job(monkeypatch):
    monkeypatch.setattr(process, "_ahead", [])
    process.start_ahead()
    process.start_ahead()
    [ahead] = process._ahead
    # A job without an experiment: its error ends the process.
    done = process.run("{}", 60.0)
    assert done.returncode == ahead.returncode == 1 and "KeyError" in done.stderr
    assert process._ahead == []
    with pytest.raises(subprocess.TimeoutExpired):
        process.run("{}", 0.0)


def test_process_without_a_job_ends_with_its_command():
    code = "from orchestrator.cost import process as p; p.start_ahead(); print(p._ahead[0].pid)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCES, capture_output=True, text=True, check=True
    )
    assert not psutil.pid_exists(int(done.stdout)) and done.stderr == ""


def test_time_to_start_is_without_the_wait_for_a_job(monkeypatch, capsys):
    now = 1000.0

    class SlowInput(io.StringIO):
        def read(self, *_):
            nonlocal now
            now += 60.0
            return super().read()

    def prepare(*_):
        nonlocal now
        now += 2.0

    class NoBench:
        def __init__(self, *_):
            pass

        def run(self, startup_s):
            assert startup_s == pytest.approx(5.0)
            raise SystemExit(0)

    job = {
        "experiment": small().model_dump(),
        "code": [],
        "n_vocab": N_VOCAB,
        "cpus": 1,
        "device": ONE_WORKER.device,
        "limit_s": 1.0,
        "timed_s": 0.0,
    }
    monkeypatch.setattr(bench.time, "time", lambda: now)
    monkeypatch.setattr(bench, "prepare_process", prepare)
    monkeypatch.setattr(bench, "be_expendable", lambda: None)
    monkeypatch.setattr(bench, "Bench", NoBench)
    monkeypatch.setattr(sys, "argv", ["bench", "997.0"])
    monkeypatch.setattr(sys, "stdin", SlowInput(json.dumps(job)))
    with pytest.raises(SystemExit, match="0"):
        bench.main()
