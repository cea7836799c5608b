"""Tracking with a real MLflow server behind a gate that refuses, hangs, resets or truncates.

The server is started by `pipelines/ui.py`, in an environment that is not activated.
"""

import contextlib
import http.server
import json
import os
import random
import re
import signal
import sqlite3
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from itertools import pairwise

import psutil
import pytest

from orchestrator.errors import UserError
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.track.sender import Sender
from orchestrator.track.tracker import Tracker, resend_metrics
from pipelines import replay_metrics, ui
from tests.helpers.gate import Gate, Server, locked
from tests.helpers.ports import free_port
from tests.helpers.tracked import curve, expected, log, rows, sent_step
from tests.helpers.wait import wait_until

EXPERIMENT = "behind the gate"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    storage = tmp_path_factory.mktemp("served")
    cwd = tmp_path_factory.mktemp("cwd")
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
    """Assert that the database equals the folder, and that the server stored the artifacts."""
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
    # After one second, a request that hangs has not failed yet.
    expected_messages = 0 if fault == "hang" else 1
    assert len(caplog.records) == expected_messages, caplog.text
    (run_dir / "summary.json").write_text('{"status": "FINISHED"}')
    gate.set("open")
    assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT)
    check(server, run_dir, "FINISHED")


class Training:
    """A run that writes its journal, independent of its tracker, and is sometimes resumed."""

    def __init__(self, run_dir, seed):
        self.run_dir = run_dir
        self.draw = random.Random(seed)
        self.step = 0
        self.farthest = 0

    def go_on(self):
        """Log at least ten new steps, because repeated steps are not sent again."""
        begin = self.step
        self.step = max(self.step, self.farthest) + self.draw.randrange(10, 800)
        log(self.run_dir, range(begin, self.step))
        self.farthest = self.step

    def resume(self):
        """Go back to an earlier step; the later steps will be repeated."""
        self.step = self.draw.randrange(self.step // 2, self.step) + 1
        Journal(RunFolder(self.run_dir)).rewind(self.step - 1)

    def is_sent(self):
        return sent_step(self.run_dir) == self.step - 1


def test_no_value_is_lost_or_repeated_in_many_outages(server, gate, run_dir, caplog, monkeypatch):
    """All faults in a random order; each begins before a request or in the middle of one."""
    # With a shorter timeout, the server on a busy machine would seem to be down.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    training = Training(run_dir, seed=0)
    faults = [
        "refuse",
        "reset",
        "hang",
        "half",
        "cut",
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
            wait_until(training.is_sent)  # otherwise the fault begins while requests are running
        caplog.clear()
        with faulty(server, gate, fault):
            training.go_on()

            def fault_has_effect(fault=fault):
                # With "cut", requests whose answer is not used succeed.
                return "not reached" in caplog.text or (fault == "cut" and training.is_sent())

            wait_until(fault_has_effect)
            if training.draw.random() < 0.5:
                training.resume()
        if "not reached" in caplog.text:
            wait_until(lambda: "reached again" in caplog.text)
        # One message at the start of an outage, and one at its end.
        outages = ["not reached" in record.message for record in caplog.records]
        assert all(a != b for a, b in pairwise(outages)), caplog.text
    training.go_on()
    assert tracker.finish("KILLED", 60)
    check(server, run_dir, "KILLED")


@contextlib.contextmanager
def faulty(server, gate, fault):
    """Let the gate or the server have a fault inside the block."""
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


def test_ctrl_c_ends_only_the_wait_for_the_server(gate, run_dir, capsys, monkeypatch):
    log(run_dir, range(3))
    gate.set("refuse")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = Sender._print_wait

    def begin_and_interrupt(sender, left_s):
        begin(sender, left_s)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Sender, "_print_wait", begin_and_interrupt)
    assert not resend_metrics(RunFolder(run_dir), f"http://127.0.0.1:{gate.port}", EXPERIMENT, 600)
    signal.signal(signal.SIGINT, before)
    assert "Ctrl-C ends the wait, and loses nothing" in capsys.readouterr().out


def test_short_wait_prints_only_its_end(gate, run_dir, capsys):
    gate.set("refuse")
    assert not resend_metrics(RunFolder(run_dir), f"http://127.0.0.1:{gate.port}", EXPERIMENT, 1)
    out = capsys.readouterr().out
    assert "did not accept everything" in out and out.count("\n") == 2


def test_rejection_is_logged_once(gate, run_dir, caplog):
    log(run_dir, range(3))
    gate.set("401 Unauthorized")
    tracker = Tracker(RunFolder(run_dir), f"http://me:hunter2@127.0.0.1:{gate.port}", EXPERIMENT)
    tracker.start()
    assert not tracker.finish("FINISHED", 600)
    assert len(caplog.records) == 1
    assert "replay_metrics" in caplog.text
    stored = [file.read_text() for file in run_dir.glob("*.json")]
    assert "hunter2" not in caplog.text + str(stored)


@pytest.mark.parametrize("answer", ["404 Not Found", "403 Forbidden"])
def test_lasting_rejection_ends_the_wait(gate, run_dir, caplog, monkeypatch, answer):
    monkeypatch.setattr("orchestrator.track.sender.DOUBT_S", 1.0)
    log(run_dir, range(3))
    gate.set(answer)
    assert not resend_metrics(RunFolder(run_dir), f"http://127.0.0.1:{gate.port}", EXPERIMENT, 600)
    first, last = caplog.messages
    assert "not reached, retrying" in first
    assert "rejected by the server, nothing more is sent" in last


@pytest.fixture
def tls_port(tmp_path):
    """Port of a server with a self-signed certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    try:
        subprocess.run(
            [*command, "-keyout", key, "-out", certificate], check=True, capture_output=True
        )
    except OSError:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as tls_server:
        port = tls_server.server_address[1]
        tls_server.socket = context.wrap_socket(tls_server.socket, server_side=True)
        threading.Thread(target=tls_server.serve_forever, daemon=True).start()
        yield port
        tls_server.shutdown()


class Silent(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_certificate_or_protocol_error_is_rejected_at_once(gate, tls_port, run_dir, caplog):
    log(run_dir, range(3))
    gate.set("404 Not Found")
    for uri, reason in (
        (f"https://127.0.0.1:{tls_port}", "certificate verify failed"),
        (f"http://127.0.0.1:{tls_port}", "the server expects https://"),
        (f"https://127.0.0.1:{gate.port}", "check that the address should begin with https://"),
    ):
        caplog.clear()
        assert not resend_metrics(RunFolder(run_dir), uri, EXPERIMENT, 600)
        [message] = caplog.messages
        assert "rejected by the server, nothing more is sent" in message
        assert reason in message


def test_database_that_cannot_be_used_is_rejected_at_once(run_dir, tmp_path, caplog):
    log(run_dir, range(3))
    for uri, reason in (
        (f"sqlite:///{tmp_path}", "is a folder"),
        ("sqlite:////dev/null/x.db", "/dev/null cannot be created"),
        ("mysql://host/x", "No module named .*; install it"),
        ("postgresql+nodriver://host/x", "Can't load plugin.*; install it"),
    ):
        caplog.clear()
        assert not resend_metrics(RunFolder(run_dir), uri, EXPERIMENT, 600)
        [message] = caplog.messages
        assert "rejected by the server, nothing more is sent" in message
        assert re.search(reason, message)


def test_ui_and_replay_metrics_explain_errors(server, tmp_path):
    with pytest.raises(UserError, match="has no tracked runs"):
        ui.main([str(tmp_path)])
    with pytest.raises(UserError, match="cannot be used"):
        ui.main([str(server.storage), "--port", str(server.port)])
    with pytest.raises(UserError, match="there is no run"):
        replay_metrics.main(["nobody"])
    first = (server.storage / "server.log").read_text().splitlines()[0]
    page = "#/experiments/1/runs?workflowType=machine_learning"
    assert first == f"embedded: http://127.0.0.1:{server.port}/{page}"


def test_server_listens_on_loopback_and_answers_only_to_its_own_names(server):
    main = psutil.Process(server.process.pid)
    listening = {
        connection.laddr
        for process in [main, *main.children(recursive=True)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", server.port)}
    foreign = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/api/2.0/mlflow/experiments/search?max_results=1",
        headers={"Host": "evil.example"},
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign, timeout=10)  # noqa: S310 - loopback
