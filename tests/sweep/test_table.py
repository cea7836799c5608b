"""The live table: what it says of a sweep as it goes on, in a terminal that redraws and where nobody can redraw."""

import io
import os
import pty

import pytest

from orchestrator.sweep.table import Table

WORDS = [
    "sweep.trials.a.train.max_steps=20",
    "sweep.trials.b={train.max_steps: 20, schedule.decay_shape: cosine}",
]


@pytest.fixture
def books(sweeps):
    study = sweeps.open(*WORDS)
    return study.keeper(lambda: None), study


def test_the_line_counts_stages_trials_and_steps_and_says_when_it_ends(books):
    keeper, study = books
    table = Table(2, study.best, seconds_per_step=0.5, out=io.StringIO())
    table.books = keeper
    # 17 steps of trunk and 2 × 3 of decay: the trunk and one branch are the longest path, 20 steps.
    assert table.status() == "stages 0/3 | trials 0/2 | 0 of 23 steps run, 17 saved | ETA 10s"


def test_what_ran_corrects_what_was_expected(sweeps):
    study = sweeps.open(*WORDS)
    sweeps.run(study, limit=1)
    table = Table(1, study.best, seconds_per_step=1000.0, out=io.StringIO())
    table.books = study.books
    assert "stages 1/3 | trials 0/2 | 17 of 23 steps run" in table.status()
    assert table.seconds_left() < 60


def test_where_nobody_can_redraw_lines_are_steady(books):
    keeper, study = books
    out = io.StringIO()
    table = Table(1, study.best, out=out)
    table.books = keeper
    stage = keeper.plan.by_id[keeper.next()]
    table.tick()
    assert out.getvalue() == ""  # nothing has happened, and half a minute has not passed
    table.stage_ended(stage)
    assert "\x1b" not in out.getvalue() and out.getvalue().count("\n") == 2


def test_a_terminal_shows_one_table_that_is_drawn_over(books):
    keeper, study = books
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as out:
        table = Table(1, study.best, out=out)
        table.books = keeper
        keeper.next()
        for _ in range(2):
            table.last = -1e9
            table.tick()
        shown = ""
        while shown.count("\n") < 4:  # a terminal gives what it has, not all of it
            shown += os.read(ours, 10_000).decode()
    os.close(ours)
    assert shown.count("stages 0/3") == 2
    assert shown.count("at 0") == 2, "the running stage has a line"
    assert shown.count("\x1b[2F\x1b[J") == 1, "the second drawing erases the first"


def test_a_stage_that_failed_is_told_with_its_reason(sweeps):
    def fail(stage):
        raise RuntimeError("no room")

    study = sweeps.open(*WORDS)
    sweeps.run(study, fail=fail)
    out = io.StringIO()
    table = Table(1, study.best, out=out)
    table.books = study.books
    table.stage_ended(study.plan.stages[0])
    assert "steps 0–17 of a and 1 more: failed: RuntimeError: no room" in out.getvalue()
