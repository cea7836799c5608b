"""MLflow's database is lost, restored from a backup or replaced: afterwards, no value is missing.

Each value is in the database once, whether a new attempt or `replay_metrics.py` sends the rest.
"""

import json
import os
import shutil
import sqlite3

import pytest

from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.runs.journal import Journal
from orchestrator.track.server import sqlite_uri, store_path
from orchestrator.track.tracker import Tracker, resend_metrics
from tests.helpers import stores
from tests.helpers.tracked import client, expected, log, rows, sent_step
from tests.helpers.wait import wait_until

EXPERIMENT = "lost"


@pytest.fixture
def database(tmp_path, impatient):
    """A database of one test."""
    stores.copy_empty(tmp_path / "mlflow" / "mlflow.db")
    return tmp_path / "mlflow" / "mlflow.db"


def make_run(folder, key):
    folder.mkdir(parents=True)
    record = {"name": folder.name, "key": key, "params": {"a": 1}, "attempts": [{"workers": 1}]}
    (folder / "run.json").write_text(json.dumps(record))
    checkpoint = folder / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text("{}")
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", "key")


def put_back(database, backup, *, in_place):
    """Restore a backup; None: remove the database."""
    if backup is None:
        database.unlink()
    elif in_place:
        shutil.copyfile(backup, database)
    else:
        os.replace(backup, database)


def back_up(database, tmp_path):
    with sqlite3.connect(database) as source, sqlite3.connect(tmp_path / "backup.db") as copy:
        source.backup(copy)
    return tmp_path / "backup.db"


def attempt(run_dir, uri, steps=()):
    """Let another attempt of the run log some steps."""
    tracker = Tracker(RunFolder(run_dir), uri, EXPERIMENT)
    tracker.start()
    log(run_dir, steps)
    return tracker.finish("FINISHED", 60)


def check(database, run_dir):
    assert rows(database, run_dir) == expected(run_dir)
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    run = client(f"sqlite:////.{database}").get_run(run_id)
    assert run.data.params == {"a": "1"}
    assert [output.step for output in run.outputs.model_outputs] == [5]


def test_storage_of_any_name_has_its_own_database(run_dir, tmp_path, impatient):
    database = store_path(tmp_path / "100%25 of #1, why?")
    stores.copy_empty(database)
    assert attempt(run_dir, sqlite_uri(database), range(3))
    assert rows(database, run_dir) == expected(run_dir)
    assert sorted(path.name for path in database.parent.iterdir()) == ["artifacts", "mlflow.db"]


@pytest.mark.parametrize(
    ("is_kept", "in_place", "sends"),
    [
        (True, True, "an attempt"),
        (True, False, "replay_metrics"),
        (False, True, "replay_metrics"),
        (False, False, "an attempt"),
        pytest.param(True, True, "replay_metrics", marks=pytest.mark.slow),
        pytest.param(True, False, "an attempt", marks=pytest.mark.slow),
    ],
)
def test_store_lost_between_attempts(run_dir, database, tmp_path, is_kept, in_place, sends):
    uri = f"sqlite:///{database}"
    assert attempt(run_dir, uri, range(8))
    before = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    backup = back_up(database, tmp_path) if is_kept else None
    Journal(RunFolder(run_dir)).rewind(5)  # lines in an aside are compared as well
    assert attempt(run_dir, uri, range(6, 20))
    put_back(database, backup, in_place=in_place)
    if sends == "an attempt":
        assert attempt(run_dir, uri, range(20, 25))
    else:
        assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT, compare_all=True)
    check(database, run_dir)
    after = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    assert (after == before) == is_kept
    recorded = json.loads((run_dir / "run.json").read_text())["attempts"][-1]
    assert recorded.get("mlflow_run_id") == (None if is_kept else after)


@pytest.mark.parametrize(
    ("is_kept", "in_place"),
    [
        (True, True),
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_store_lost_during_an_attempt(run_dir, database, tmp_path, is_kept, in_place, caplog):
    tracker = Tracker(RunFolder(run_dir), f"sqlite:///{database}", EXPERIMENT)
    tracker.start()
    log(run_dir, range(8))
    wait_until(lambda: sent_step(run_dir) == 7)
    wait_until(lambda: len(rows(database, run_dir, MODELS)) == 1)
    backup = back_up(database, tmp_path) if is_kept else None
    log(run_dir, range(8, 16))
    wait_until(lambda: sent_step(run_dir) == 15)
    put_back(database, backup, in_place=in_place)
    log(run_dir, range(16, 20))
    assert tracker.finish("FINISHED", 60)
    check(database, run_dir)
    assert "MLflow no longer has the run" in caplog.text or "MLflow has lost" in caplog.text


MODELS = "SELECT model_id FROM logged_models WHERE source_run_id = ?"


def test_hole_in_the_stored_curve_is_found_by_replay_metrics(run_dir, database, tmp_path):
    uri = f"sqlite:///{database}"
    assert attempt(run_dir, uri, range(20))
    with sqlite3.connect(database) as db:
        db.execute("DELETE FROM metrics WHERE step BETWEEN 5 AND 8 AND key = 'optim/lr'")
    assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT, compare_all=True)
    check(database, run_dir)


# ---- sweeps ----


@pytest.fixture
def sweep(tmp_path):
    """A sweep with two finished trials."""
    folder = make_run(tmp_path / "sweep", "sweep")
    for name in "ab":
        trial = make_run(folder / "trials" / name, name)
        log(trial, range(10))
        (trial / "summary.json").write_text('{"status": "FINISHED"}')
    log(folder, range(2))
    return folder


@pytest.mark.parametrize(
    ("is_kept", "sends"),
    [
        (True, "an attempt"),
        (False, "replay_metrics"),
        pytest.param(True, "replay_metrics", marks=pytest.mark.slow),
        pytest.param(False, "an attempt", marks=pytest.mark.slow),
    ],
)
def test_store_of_a_sweep_is_lost(sweep, database, tmp_path, is_kept, sends):
    uri = f"sqlite:///{database}"

    def send():
        tracker = Tracker(SweepFolder(sweep), uri, EXPERIMENT)
        tracker.start()
        assert tracker.finish("FINISHED", 60)

    send()
    backup = back_up(database, tmp_path) if is_kept else None
    log(sweep / "trials" / "b", range(10, 20))
    send()
    put_back(database, backup, in_place=True)
    if sends == "an attempt":
        send()
    else:
        assert resend_metrics(SweepFolder(sweep), uri, EXPERIMENT, compare_all=True)
    for folder in (sweep, sweep / "trials" / "a", sweep / "trials" / "b"):
        check(database, folder)
    parent = json.loads((sweep / "tracking.json").read_text())["run_id"]
    children = "SELECT value FROM tags WHERE run_uuid = ? AND key = 'mlflow.parentRunId'"
    for name in "ab":
        assert rows(database, sweep / "trials" / name, children) == [(parent,)]


def test_run_that_continues_from_an_older_copy_repeats_no_value(run_dir, database, tmp_path):
    """A machine was lost: MLflow has values that the copy of the run in a mirror has not."""
    uri = sqlite_uri(database)
    assert attempt(run_dir, uri, range(1, 31))
    older = make_run(tmp_path / "older" / "run", "key")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (older / "metrics.jsonl").write_text("".join(lines[:10]))
    tracker = Tracker(RunFolder(older), uri, EXPERIMENT, compare_all=True)
    tracker.start()
    log(older, range(11, 41))
    assert tracker.finish("FINISHED", 60)
    steps = sorted(row[1] for row in rows(database, older) if row[0] == "train/loss")
    assert steps == list(range(1, 41))
