"""The lines that a running sweep prints."""

import contextlib
import math

import pytest

from orchestrator.runs import journal
from orchestrator.sweep.report import pace
from orchestrator.sweep.report.files import SweepFiles
from orchestrator.sweep.report.pace import Pace
from orchestrator.sweep.report.progress_lines import ProgressLines
from orchestrator.sweep.stage import run_stage
from orchestrator.train.numerics import Worker

WORDS = [
    "sweep.trials.a.train.max_steps=20",
    "sweep.trials.b={train.max_steps: 20, schedule.decay_shape: cosine}",
]


@pytest.fixture
def study(sweeps):
    return sweeps.open(*WORDS)


@pytest.fixture
def progress(study):
    return study.progress


def test_status_counts_stages_trials_and_steps_and_estimates_the_end(progress, study):
    lines = ProgressLines(Pace(progress, 2, step_s=0.5), study.best)
    # A trunk of 17 steps and two branches of 3: the longest path has 20 steps.
    assert lines.status() == "stages 0/3 | trials 0/2 | 0 of 23 steps run, 17 saved | ETA 10s"


def test_estimate_follows_the_stages_that_ran(sweeps, study, monkeypatch):
    monkeypatch.setattr(pace, "LEAST_S", 0.0)
    sweeps.run(study, limit=1)
    seen = Pace(study.progress, 1, step_s=1000.0)
    assert "stages 1/3 | trials 0/2 | 17 of 23" in ProgressLines(seen, study.best).status()
    assert seen.look().left_s < 6 * 1000.0


@pytest.fixture
def half_way(progress, study):
    """The pace of a sweep while its trunk is trained, after 12 steps of 10 s each."""
    now = [0.0]
    seen = Pace(progress, 1, step_s=1000.0, planned_s=100.0, clock=lambda: now[0])
    assert seen.look().left_s == 23 * 1000.0
    folder = study.folder.stage(progress.next())
    with contextlib.closing(run_stage(folder, Worker())) as lines:
        for line in lines:
            now[0] = 10.0 * line["step"]
            seen.look()
            if line["step"] == 12:
                yield seen


def test_steps_of_a_running_stage_count_and_the_eta_follows_them(half_way, study):
    status = ProgressLines(half_way, study.best).status()
    assert "12 of 23 steps run, 17 saved | ETA 1m50s" in status


def test_steps_of_an_earlier_attempt_are_not_left(half_way, sweeps):
    again = sweeps.open(*WORDS).progress
    (first,) = again.begun[again.next()]
    assert first > 0  # the newest checkpoint
    assert Pace(again, 1, step_s=1.0).look().left_s == 23 - first


def test_time_is_given_again_after_the_first_minute(half_way, study, capsys):
    lines = ProgressLines(half_way, study.best)
    for _ in range(2):
        lines.last = -math.inf
        lines.tick()
    out = capsys.readouterr().out
    assert out.count("expected: 3m50s in all") == 1
    assert "not 1m40s" in out
    assert half_way.correction.corrected_s == 120.0 + 110.0


def test_long_stage_updates_the_journal_of_the_sweep_and_its_trials(half_way, study):
    files = SweepFiles(study, None, half_way)
    files.tick()
    assert journal.last(study.folder) is None  # too early
    files.last = -math.inf
    files.tick()
    last = journal.last(study.folder)
    assert (last["sweep/steps_run"], last["sweep/seconds_left"]) == (12, 110.0)
    for name in study.trials:
        assert journal.last(study.folder.trial(name))["step"] == 12


def test_line_is_printed_when_a_stage_ends_and_after_an_interval(progress, study, capsys):
    lines = ProgressLines(Pace(progress, 1), study.best)
    stage = progress.tree.by_id[progress.next()]
    lines.last = math.inf  # the last line was printed a moment ago
    lines.tick()
    assert capsys.readouterr().out == ""
    lines.last = -math.inf
    lines.tick()
    assert capsys.readouterr().out.count("stages 0/3") == 1
    lines.stage_ended(stage)
    assert capsys.readouterr().out.count("\n") == 2


def test_failed_stage_is_reported_with_its_reason(sweeps, study, capsys):
    def fail(stage):
        raise RuntimeError("no room")

    sweeps.run(study, fail=fail)
    ProgressLines(Pace(study.progress, 1), study.best).stage_ended(study.tree.stages[0])
    assert "steps 0–17 of a and 1 more: failed: RuntimeError: no room" in capsys.readouterr().out
