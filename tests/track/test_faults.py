"""Tracking with a real MLflow server behind a gate that refuses, hangs, resets or truncates.

The server is started by `pipelines/ui.py`, in an environment that is not activated.
"""

import contextlib
import json
import os
import random
import signal
import sqlite3
import threading
from itertools import pairwise

import pytest

from orchestrator.errors import UserError
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.track.mlflow import Tracker, resend_metrics
from pipelines import replay_metrics, ui
from tests.helpers.gate import Gate, Server, free_port, locked
from tests.helpers.tracked import curve, expected, log, rows, sent_step, wait_for

EXPERIMENT = "behind the gate"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    storage, cwd = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("cwd")
    assert resend_metrics(
        RunFolder(make_run(storage / "first", "first")),
        f"sqlite:///{storage}/mlflow/mlflow.db",
        "embedded",
    )
    server = Server(storage, cwd, free_port())
    server.start()
    yield server
    server.kill()
    assert os.listdir(cwd) == []


@pytest.fixture
def gate(server, impatient):
    gate = Gate(server.port, free_port())
    gate.set("open")
    yield gate
    gate.set("refuse")


def make_run(folder, key):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(
        json.dumps({"name": folder.name, "key": key, "params": {"a": 1}, "attempts": [{}]})
    )
    return folder


@pytest.fixture
def run_dir(tmp_path, request):
    run_dir = make_run(tmp_path / "runs" / "demo", request.node.name)
    (run_dir / "samples").mkdir()
    (run_dir / "samples" / "step-00000000.txt").write_text("To be")
    (run_dir / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000010" / "MANIFEST.json").write_text("{}")
    return run_dir


def check(server, run_dir, status):
    """The database says what the folder says, and the artifacts went through the server."""
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    assert rows(server.database, run_dir) == expected(run_dir)
    assert set(curve(run_dir)) <= {(key, step, value) for key, step, value, _ in expected(run_dir)}
    with sqlite3.connect(server.database) as db:
        models = db.execute(
            "SELECT count(*) FROM logged_models WHERE source_run_id = ?", (run_id,)
        ).fetchone()[0]
        outputs = db.execute(
            "SELECT count(*) FROM inputs WHERE source_id = ?", (run_id,)
        ).fetchone()[0]
        info = db.execute(
            "SELECT status, artifact_uri FROM runs WHERE run_uuid = ?", (run_id,)
        ).fetchone()
    assert (models, outputs, info[0]) == (1, 1, status)
    assert info[1].startswith("mlflow-artifacts:/")
    assert list(
        (server.storage / "mlflow" / "artifacts").rglob(
            f"{run_id}/artifacts/samples/step-00000000.txt"
        )
    )


@pytest.mark.parametrize("fault", ["refuse", "hang", "cut", "403 Invalid Host"])
def test_unreachable_server_gets_everything_later(server, gate, run_dir, fault, caplog):
    log(run_dir, range(0, 31, 10))
    uri = f"http://127.0.0.1:{gate.port}"
    gate.set(fault)
    tracker = Tracker(RunFolder(run_dir), uri, EXPERIMENT)
    tracker.start()
    assert tracker.url is None
    assert not tracker.finish("FINISHED", deadline_s=1)
    assert len(caplog.records) == (fault != "hang"), (
        caplog.text
    )  # a request that hangs is not yet an answer
    (run_dir / "summary.json").write_text('{"status": "FINISHED"}')
    gate.set("open")
    assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT)
    check(server, run_dir, "FINISHED")


class Training:
    """A run that goes on, and is resumed now and then, whatever its tracker meets."""

    def __init__(self, run_dir, seed):
        self.run_dir, self.draw, self.step = run_dir, random.Random(seed), 0
        self.farthest = 0

    def go_on(self):
        """To steps that were never made before: those made again are not sent again."""
        begin, self.step = self.step, max(self.step, self.farthest) + self.draw.randrange(10, 800)
        log(self.run_dir, range(begin, self.step))
        self.farthest = self.step

    def resume(self):
        """The last steps are lost, and will be made again."""
        self.step = self.draw.randrange(self.step // 2, self.step) + 1
        Journal(RunFolder(self.run_dir)).rewind(self.step - 1)

    def is_sent(self):
        return sent_step(self.run_dir) == self.step - 1


def test_no_value_is_lost_or_repeated_in_many_outages(server, gate, run_dir, caplog, monkeypatch):
    """Every fault in an order of its own, each in the middle of sending or before it."""
    monkeypatch.setenv(
        "MLFLOW_HTTP_REQUEST_TIMEOUT", "3"
    )  # less, and a busy machine's server is taken for one that is away
    training = Training(run_dir, seed=0)
    faults = [
        "refuse",
        "reset",
        "hang",
        "half",
        "cut",
        "lost",
        "lost",
        "500 Oops",
        "502 Bad Gateway",
        "locked",
        "killed",
    ]
    training.draw.shuffle(faults)
    tracker = Tracker(RunFolder(run_dir), f"http://127.0.0.1:{gate.port}", EXPERIMENT)
    tracker.start()
    for fault in faults:
        training.go_on()
        if training.draw.random() < 0.5:
            wait_for(training.is_sent)  # else its requests are under way
        caplog.clear()
        with away(server, gate, fault):
            training.go_on()
            # Where only the end of an answer is lost, a request that asks for nothing is answered all the same.
            wait_for(
                lambda cut=fault == "cut": (
                    "not reached" in caplog.text or cut and training.is_sent()
                )
            )
            if training.draw.random() < 0.5:
                training.resume()
        if "not reached" in caplog.text:
            wait_for(lambda: "reached again" in caplog.text)
        said = ["not reached" in record.message for record in caplog.records]
        assert all(a != b for a, b in pairwise(said)), (
            caplog.text
        )  # once per outage, and once at its end
    training.go_on()
    assert tracker.finish("KILLED", 60)
    check(server, run_dir, "KILLED")


@contextlib.contextmanager
def away(server, gate, fault):
    """The server with a fault, in the gate or of its own."""
    if fault == "locked":
        with locked(server.database):
            yield
    elif fault == "killed":
        server.kill()
        yield
        server.start()
    else:
        gate.set(fault)
        yield
        gate.set("open")


def test_ctrl_c_ends_only_the_wait_for_the_server(gate, run_dir, capsys):
    log(run_dir, range(3))
    gate.set("refuse")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert not resend_metrics(RunFolder(run_dir), f"http://127.0.0.1:{gate.port}", EXPERIMENT, 600)
    signal.signal(signal.SIGINT, before)
    assert "Ctrl-C ends the wait, and loses nothing" in capsys.readouterr().out


def test_short_wait_prints_nothing(gate, run_dir, capsys):
    gate.set("refuse")
    assert not resend_metrics(RunFolder(run_dir), f"http://127.0.0.1:{gate.port}", EXPERIMENT, 1)
    assert capsys.readouterr().out == ""


def test_rejection_is_logged_once(gate, run_dir, caplog):
    log(run_dir, range(3))
    gate.set("401 Unauthorized")
    tracker = Tracker(RunFolder(run_dir), f"http://me:hunter2@127.0.0.1:{gate.port}", EXPERIMENT)
    tracker.start()
    assert not tracker.finish("FINISHED", 600)
    assert len(caplog.records) == 1
    assert "replay_metrics" in caplog.text
    assert "hunter2" not in caplog.text + str([p.read_text() for p in run_dir.glob("*.json")])


def test_ui_and_replay_metrics_explain_errors(server, tmp_path):
    with pytest.raises(UserError, match="has no tracked runs"):
        ui.main([str(tmp_path)])
    with pytest.raises(UserError, match="cannot be used"):
        ui.main([str(server.storage), "--port", str(server.port)])
    with pytest.raises(UserError, match="there is no run"):
        replay_metrics.main(["nobody"])
    first = (server.storage / "server.log").read_text().splitlines()[0]
    assert (
        first
        == f"embedded: http://127.0.0.1:{server.port}/#/experiments/1/runs?workflowType=machine_learning"
    )
