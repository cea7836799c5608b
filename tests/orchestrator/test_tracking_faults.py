"""Tracking against a real server behind a gate that refuses, hangs, answers nonsense or cuts: a run never waits for it.

The server is the one that `pipelines/ui.py` starts, from an environment that is not activated.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.journal import Journal
from orchestrator.outbox import history
from orchestrator.tracking import Tracker, replay
from pipelines import replay_metrics, ui

REPO = Path(__file__).resolve().parents[2]
EXPERIMENT = "behind the gate"


class Gate:
    """A port in front of the server. `mode`: open, refuse, hang, cut (each answer after 60 bytes) or a status."""

    def __init__(self, server_port):
        self.server_port, self.mode, self.listener, self.port, self.sockets = server_port, None, None, 0, set()

    def set(self, mode):
        self.mode = mode
        for s in list(self.sockets):  # connections that are kept alive feel it too
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        if (mode == "refuse") == bool(self.listener):
            self._listen(mode != "refuse")

    def _listen(self, on):
        if not on:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None
            return
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(listener.accept()[0],), daemon=True).start()

    def _serve(self, client):
        self.sockets.add(client)  # before the mode is read: `set` changes the mode, then shuts what it finds here
        with contextlib.suppress(OSError), client:
            if self.mode == "refuse":
                return  # accepted between the new mode and the end of the listener: served, it would be kept alive for ever
            if self.mode[0].isdigit():
                client.recv(65536)
                client.sendall(f"HTTP/1.1 {self.mode}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno".encode())
            elif self.mode == "hang":
                while client.recv(65536):
                    pass
            else:
                with socket.create_connection(("127.0.0.1", self.server_port)) as server:
                    self.sockets.add(server)
                    threading.Thread(target=self._copy, args=(client, server, None), daemon=True).start()
                    self._copy(server, client, 60 if self.mode == "cut" else None)

    def _copy(self, source, target, limit):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data[:limit])
                if limit:
                    break
            target.shutdown(socket.SHUT_RDWR)


class Server:
    """`pipelines/ui.py` over `storage`, in a working directory of its own."""

    def __init__(self, storage, cwd, port):
        self.storage, self.cwd, self.port, self.process = storage, cwd, port, None

    def start(self):
        command = [sys.executable, str(REPO / "pipelines" / "ui.py"), str(self.storage), "--port", str(self.port)]
        with open(self.storage / "server.log", "ab") as out:
            self.process = subprocess.Popen(
                command,
                cwd=self.cwd,
                env={**os.environ, "PATH": "/usr/bin:/bin"},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        wait_for(lambda: self.process.poll() is not None or self.healthy(), 60)
        assert self.process.poll() is None, (self.storage / "server.log").read_text()[-2000:]

    def healthy(self):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as r,
        ):
            return r.status == 200

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    storage, cwd = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("cwd")
    assert replay(make_run(storage / "first", "first"), f"sqlite:///{storage}/mlflow/mlflow.db", "embedded")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = Server(storage, cwd, port)
    server.start()
    yield server
    server.kill()
    assert os.listdir(cwd) == []


@pytest.fixture
def gate(server, monkeypatch):
    monkeypatch.setattr("orchestrator.sender.POLL_S", 0.1)
    monkeypatch.setattr("orchestrator.sender.PAUSES_S", (0.1, 0.5))
    gate = Gate(server.port)
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


def log(run_dir, steps):
    for step in steps:
        Journal(run_dir).append(step, {"train/loss": 5 - step / 1000, "val/loss": 5 - step / 1000})


def check(server, run_dir, status):
    """The database says what the folder says, and the artifacts went through the server."""
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    with sqlite3.connect(server.storage / "mlflow" / "mlflow.db") as db:
        sent = db.execute(
            "SELECT key, step, value, timestamp FROM metrics WHERE run_uuid = ? ORDER BY 1, 2", (run_id,)
        ).fetchall()
        models = db.execute("SELECT count(*) FROM logged_models WHERE source_run_id = ?", (run_id,)).fetchone()[0]
        outputs = db.execute("SELECT count(*) FROM inputs WHERE source_id = ?", (run_id,)).fetchone()[0]
        info = db.execute("SELECT status, artifact_uri FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
    assert sent == sorted(
        (k, r["step"], r[k], r["timestamp"]) for r in history(run_dir) for k in ("train/loss", "val/loss")
    )
    assert (models, outputs, info[0]) == (1, 1, status)
    assert info[1].startswith("mlflow-artifacts:/")
    assert list((server.storage / "mlflow" / "artifacts").rglob(f"{run_id}/artifacts/samples/step-00000000.txt"))


@pytest.mark.parametrize("fault", ["refuse", "hang", "cut", "500 Oops", "403 Invalid Host"])
def test_a_server_that_is_away_from_the_start(server, gate, run_dir, fault, caplog):
    log(run_dir, range(0, 31, 10))
    uri = f"http://127.0.0.1:{gate.port}"
    gate.set(fault)
    began = time.monotonic()
    tracker = Tracker(run_dir, uri, EXPERIMENT)
    tracker.start()
    assert time.monotonic() - began < 0.5  # 1 ms on an idle machine
    assert tracker.url is None
    began = time.monotonic()
    assert not tracker.finish("FINISHED", deadline_s=2)
    assert time.monotonic() - began < 4
    assert len(caplog.records) == (fault != "hang"), caplog.text  # a request that hangs is not yet an answer
    (run_dir / "summary.json").write_text('{"status": "FINISHED"}')
    gate.set("open")
    assert replay(run_dir, uri, EXPERIMENT)
    check(server, run_dir, "FINISHED")


@pytest.mark.parametrize("fault", ["refuse", "hang", "cut", "502 Bad Gateway"])
def test_an_outage_in_the_middle(server, gate, run_dir, fault, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")  # less, and a busy machine's server is taken for one that is away
    tracker = Tracker(run_dir, f"http://127.0.0.1:{gate.port}", EXPERIMENT)
    tracker.start()
    log(run_dir, range(10))
    wait_for(lambda: sent_step(run_dir) == 9)
    with caplog.at_level(logging.WARNING):
        gate.set(fault)
        log(run_dir, range(10, 20))
        wait_for(lambda: "not reached" in caplog.text)
        gate.set("open")
        log(run_dir, range(20, 30))
        assert tracker.finish("KILLED", 30)
    assert ["not reached" in r.message for r in caplog.records].count(True) == 1, caplog.text
    check(server, run_dir, "KILLED")


def test_refused_for_good_is_said_once_and_kept(gate, run_dir, caplog):
    log(run_dir, range(3))
    gate.set("401 Unauthorized")
    tracker = Tracker(run_dir, f"http://me:hunter2@127.0.0.1:{gate.port}", EXPERIMENT)
    tracker.start()
    began = time.monotonic()
    assert not tracker.finish("FINISHED", 60)
    assert time.monotonic() - began < 10
    assert len(caplog.records) == 1
    assert "replay_metrics" in caplog.text
    assert "hunter2" not in caplog.text + str([p.read_text() for p in run_dir.glob("*.json")])


def test_the_server_is_killed_and_started_again(server, gate, run_dir):
    tracker = Tracker(run_dir, f"http://127.0.0.1:{gate.port}", EXPERIMENT)
    tracker.start()
    log(run_dir, range(2000))
    wait_for(lambda: sent_step(run_dir) >= 0, pause=0.01)
    server.kill()
    log(run_dir, range(2000, 2100))
    server.start()
    assert tracker.finish("FAILED", 60)
    check(server, run_dir, "FAILED")


def test_ui_and_replay_explain_what_is_wrong(server, tmp_path):
    with pytest.raises(UserError, match="holds no tracked runs"):
        ui.main([str(tmp_path)])
    with pytest.raises(UserError, match="cannot be had"):
        ui.main([str(server.storage), "--port", str(server.port)])
    with pytest.raises(UserError, match="no run there"):
        replay_metrics.main(["nobody"])
    first = (server.storage / "server.log").read_text().splitlines()[0]
    assert first == f"embedded: http://127.0.0.1:{server.port}/#/experiments/1/runs?workflowType=machine_learning"


def sent_step(run_dir):
    try:
        return json.loads((run_dir / "tracking.json").read_text())["sent_step"]
    except FileNotFoundError:
        return -1


def wait_for(condition, seconds=30, pause=0.05):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)
