"""The progress of a running sweep, in a terminal and in a log file."""

import io
import math
import os
import pty

import pytest

from orchestrator.sweep.report.table import Table

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
    table = Table(progress, 2, study.best, seconds_per_step=0.5, out=io.StringIO())
    # A trunk of 17 steps and two branches of 3: the longest path has 20 steps.
    assert table.status() == "stages 0/3 | trials 0/2 | 0 of 23 steps run, 17 saved | ETA 10s"


def test_estimate_follows_the_stages_that_ran(sweeps, study):
    sweeps.run(study, limit=1)
    table = Table(study.progress, 1, study.best, seconds_per_step=1000.0, out=io.StringIO())
    assert "stages 1/3 | trials 0/2 | 17 of 23 steps run" in table.status()
    assert table.seconds_left() < 6 * 1000.0


def test_log_file_gets_steady_lines(progress, study):
    out = io.StringIO()
    table = Table(progress, 1, study.best, out=out)
    stage = progress.tree.by_id[progress.next()]
    table.last = math.inf  # the last line was printed a moment ago
    table.tick()
    assert out.getvalue() == ""
    table.stage_ended(stage)
    assert "\x1b" not in out.getvalue() and out.getvalue().count("\n") == 2


def test_terminal_shows_one_table_that_is_redrawn(progress, study):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as out:
        table = Table(progress, 1, study.best, out=out)
        progress.next()
        for _ in range(2):
            table.last = -math.inf
            table.tick()
        shown = ""
        while shown.count("\n") < 4:  # a read returns what has arrived so far
            shown += os.read(ours, 10_000).decode()
    os.close(ours)
    assert shown.count("stages 0/3") == 2
    assert shown.count("at 0") == 2, "the running stage has a line"
    assert shown.count("\x1b[2F\x1b[J") == 1, "the second table erases the first"


def test_failed_stage_is_reported_with_its_reason(sweeps, study):
    def fail(stage):
        raise RuntimeError("no room")

    sweeps.run(study, fail=fail)
    out = io.StringIO()
    Table(study.progress, 1, study.best, out=out).stage_ended(study.tree.stages[0])
    assert "steps 0–17 of a and 1 more: failed: RuntimeError: no room" in out.getvalue()
