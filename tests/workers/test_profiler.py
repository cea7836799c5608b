"""A profile has the steps after the warm-up, and changes nothing of what is computed."""

import gzip
import json
from types import SimpleNamespace

import pytest
from torch.profiler import record_function

from orchestrator.config.experiment import load_experiment
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker
from orchestrator.workers.profiler import ROWS, Profiler
from tests.helpers.curves import final_outcome
from tests.helpers.fixtures import SMALL


def train(folder, data_dir, steps: int, profiled: int) -> None:
    folder.mkdir()
    words = [*SMALL, f"train.max_steps={steps}", "schedule.warmup_steps=0"]
    experiment = load_experiment(None, words)
    run = RunFolder(folder)
    if not profiled:
        list(Trainer(experiment, run, data_dir, Worker()).run())
        return
    with Profiler(run, profiled, lambda phase, step: None) as profiler:
        report = profiler.report_phase
        list(Trainer(experiment, run, data_dir, Worker(), report_phase=report).run())


@pytest.mark.parametrize(("asked", "found"), [(2, 2), (9, 5)])
def test_profile_has_the_steps_after_the_warm_up_and_changes_no_bit(
    tiny_dataset, tmp_path, asked, found
):
    train(tmp_path / "plain", tiny_dataset, 8, 0)
    train(tmp_path / "profiled", tiny_dataset, 8, asked)
    folder = RunFolder(tmp_path / "profiled")
    assert final_outcome(folder) == final_outcome(RunFolder(tmp_path / "plain"))

    (event,) = events.read(folder)
    first, heads, *rows = event["message"].splitlines()
    assert first.startswith(f"profile of {found} steps of rank 0: {folder.trace_file} ")
    assert heads.split() == ["operation", "calls", "CPU", "ms", "share"]
    shares = [float(row.split()[-1].rstrip("%")) for row in rows]
    assert len(rows) == ROWS
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 101  # how much ten operations have depends on the machine

    with gzip.open(folder.trace_file, "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == found
    assert any(name.startswith("Optimizer.step") for name in names)
    assert [file.name for file in folder.trace_file.parent.iterdir()] == ["trace.json.gz"]


def test_step_in_two_rounds_is_one_step(tmp_path):
    folder = RunFolder(tmp_path)
    with Profiler(folder, 2, lambda phase, step: None) as profiler:
        for step in range(6):  # as `Step` reports them
            for phase in ("gradient", "exchange", "gradient", "exchange", "update"):
                profiler.report_phase(phase, step)
                with record_function(f"{phase} of {step}"):
                    pass
    with gzip.open(folder.trace_file, "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert sorted(name for name in names if name.startswith("update of")) == [
        "update of 3",
        "update of 4",
    ]


def test_run_that_ends_in_the_warm_up_has_no_profile(tiny_dataset, tmp_path):
    train(tmp_path / "short", tiny_dataset, 3, 5)
    folder = RunFolder(tmp_path / "short")
    (event,) = events.read(folder)
    assert event["message"].startswith("nothing was profiled: there were only 3 steps")
    assert not folder.trace_file.exists()


@pytest.mark.parametrize("error", [RuntimeError("no trace"), OSError(28, "no trace")])
def test_trace_that_cannot_be_written_is_an_event(tmp_path, error):
    def fail(file: str) -> None:
        raise error

    recorded = SimpleNamespace(activities=[], key_averages=list, export_chrome_trace=fail)
    folder = RunFolder(tmp_path)
    Profiler(folder, 5, lambda phase, step: None)._write(recorded, 5)
    (event,) = events.read(folder)
    assert event["message"].startswith(f"{folder.trace_file}: not written: no trace\n")
