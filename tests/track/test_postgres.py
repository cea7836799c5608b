"""MLflow on PostgreSQL, restarted while runs and a sweep are sent: each value is there once."""

import json
import time

import pytest

from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.track.tracker import Tracker
from tests.helpers import postgres
from tests.helpers.tracked import expected, log, sent_step
from tests.helpers.wait import wait_until
from tests.track.test_sweep import put, put_curve, put_run, put_trial

STEPS = 60


@pytest.fixture(scope="module")
def server():
    with postgres.postgres() as server:
        yield server


def make_run(folder):
    folder.mkdir()
    record = {"name": folder.name, "key": folder.name, "params": {}, "attempts": [{"workers": 1}]}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.mark.slow
def test_every_value_is_there_once_after_restarts_in_the_middle(
    server, tmp_path, impatient, monkeypatch
):
    monkeypatch.setenv("PGPASSWORD", postgres.PASSWORD)
    runs = [make_run(tmp_path / name) for name in ("one", "other")]
    sweep = tmp_path / "sweep"
    put_run(sweep, "sweep")
    put(sweep / "sweep.yaml", "sweep: {grid: {schedule.kind: [wsd]}}\n")
    trials = [put_trial(sweep, name, steps=0, status=None) for name in ("a", "b")]
    folders = [*map(RunFolder, runs), SweepFolder(sweep)]
    trackers = [Tracker(folder, server.uri, "restarted") for folder in folders]
    for tracker in trackers:
        tracker.start()
    for step in range(STEPS):
        for run in runs:
            log(run, [step])
        for trial in trials:
            put_curve(trial, 10 * step)
        if step == 1:  # MLflow has made its tables
            wait_until(lambda: min(map(sent_step, runs)) >= 1)
        if step % 20 == 10:
            server.stop("immediate" if step == 30 else "fast")
        if step % 20 == 15:
            server.start()
        time.sleep(0.1)
    for trial in trials:
        put_trial(sweep, trial.name, 10 * step)
    assert all(tracker.finish("FINISHED", 120) for tracker in trackers)
    for run in [*runs, *trials]:
        run_id = json.loads((run / "tracking.json").read_text())["run_id"]
        rows = server.query(
            f"SELECT key, step, value, timestamp FROM metrics WHERE run_uuid = '{run_id}'"
        )
        assert sorted(rows) == expected(run)
        assert len({step for _, step, _, _ in rows}) == STEPS
    assert server.query("SELECT status FROM runs") == [("FINISHED",)] * 5  # and the sweep itself
    stored = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(postgres.PASSWORD.encode() in text for text in stored)
