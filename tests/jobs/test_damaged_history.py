"""A run whose journal or checkpoints were damaged between two attempts, as the user sees it."""

import json
import shutil
import sqlite3
import threading

import pytest

from orchestrator.errors import EXIT_DONE, UserError
from orchestrator.runs import events, journal, lock
from orchestrator.runs.folder import RunFolder
from orchestrator.track.tracker import resend_metrics
from tests.helpers.curves import exact_part
from tests.helpers.local_job import start
from tests.helpers.tracked import expected, rows

DAMAGES = {
    "deleted": lambda lines: [],
    "cut": lambda lines: lines[:1],
    "doubled": lambda lines: lines * 2,
    "garbage": lambda lines: [lines[0], b"garbage\n", *lines[1:]],
    "edited": lambda lines: [lines[0], lines[1].replace(b"train/loss", b"train/lost"), *lines[2:]],
}


def outcome(storage):
    folder = RunFolder(storage / "run")
    summary = json.loads(folder.summary_file.read_text())
    return summary["weights_sha256"], [exact_part(line) for line in journal.read(folder)]


@pytest.fixture(scope="module")
def runs(without_ray, tokens, tmp_path_factory):
    """Storages with a run that has made 8 of 20 steps, and with one that is finished."""
    begun, finished = (tmp_path_factory.mktemp(name) for name in ("begun", "finished"))
    assert start(begun, tokens, 8) == EXIT_DONE
    shutil.copytree(begun, finished, dirs_exist_ok=True)
    assert start(finished, tokens, 20) == EXIT_DONE
    return {"begun": begun, "finished": finished}


@pytest.mark.parametrize("state", ["begun", "finished"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_journal_is_complete_again_and_so_is_mlflow(runs, tokens, tmp_path, state, kind):
    storage = shutil.copytree(runs[state], tmp_path / "storage", symlinks=True)
    folder = RunFolder(storage / "run")
    lines = folder.journal_file.read_bytes().splitlines(keepends=True)
    folder.journal_file.write_bytes(b"".join(DAMAGES[kind](lines)))
    assert start(storage, tokens, 20) == EXIT_DONE
    assert outcome(storage) == outcome(runs["finished"])
    assert "journal_damaged" in [event["kind"] for event in events.read(folder)]
    database = storage / "mlflow" / "mlflow.db"
    assert resend_metrics(folder, f"sqlite:///{database}", "espalier")
    assert rows(database, folder.path) == expected(folder.path)


def test_run_without_a_checkpoint_left_starts_again_only_on_request(runs, tokens, tmp_path):
    storage = shutil.copytree(runs["begun"], tmp_path / "storage", symlinks=True)
    folder = RunFolder(storage / "run")
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(UserError, match="train.restart=true"):
        start(storage, tokens, 20)
    assert journal.read(folder) == journal.read(RunFolder(runs["begun"] / "run"))

    words = [*tokens, "train.restart=true"]
    assert start(storage, words, 20) == EXIT_DONE
    assert outcome(storage) == outcome(runs["finished"])
    assert start(storage, words, 20) == EXIT_DONE, "it is finished, and does not start again"
    [before] = folder.path.glob("before-*")
    assert journal.read(RunFolder(before)) == journal.read(RunFolder(runs["begun"] / "run"))
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (2,)


def test_checkpoints_are_read_when_the_worker_of_a_killed_driver_has_ended(
    runs, tokens, tmp_path, monkeypatch, capsys
):
    storage = shutil.copytree(runs["begun"], tmp_path / "storage", symlinks=True)
    folder = RunFolder(storage / "run")
    held, waits = threading.Event(), threading.Event()

    def remove_the_newest() -> None:
        with lock.held(folder.writer_lock):
            held.set()
            assert waits.wait(60)
            shutil.rmtree(folder.checkpoint(8))

    def wait_for_writer(run: RunFolder) -> None:
        waits.set()
        original(run)

    original = lock.wait_for_writer
    monkeypatch.setattr(lock, "wait_for_writer", wait_for_writer)
    worker = threading.Thread(target=remove_the_newest)
    worker.start()
    held.wait()
    assert start(storage, tokens, 20) == EXIT_DONE
    worker.join()
    assert "resuming run from step 4 " in capsys.readouterr().out
    assert outcome(storage) == outcome(runs["finished"])
