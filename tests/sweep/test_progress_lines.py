"""The lines that a running sweep prints."""

import math

import pytest

from orchestrator.sweep.report.progress_lines import ProgressLines

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
    lines = ProgressLines(progress, 2, study.best, seconds_per_step=0.5)
    # A trunk of 17 steps and two branches of 3: the longest path has 20 steps.
    assert lines.status() == "stages 0/3 | trials 0/2 | 0 of 23 steps run, 17 saved | ETA 10s"


def test_estimate_follows_the_stages_that_ran(sweeps, study):
    sweeps.run(study, limit=1)
    lines = ProgressLines(study.progress, 1, study.best, seconds_per_step=1000.0)
    assert "stages 1/3 | trials 0/2 | 17 of 23 steps run" in lines.status()
    assert lines.seconds_left() < 6 * 1000.0


def test_line_is_printed_when_a_stage_ends_and_after_an_interval(progress, study, capsys):
    lines = ProgressLines(progress, 1, study.best)
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
    ProgressLines(study.progress, 1, study.best).stage_ended(study.tree.stages[0])
    assert "steps 0–17 of a and 1 more: failed: RuntimeError: no room" in capsys.readouterr().out
