"""Alerts to a real server on loopback: what is sent, and that nothing of it harms a run."""

import http.server
import json
import os
import threading
from pathlib import Path

import pytest

from orchestrator.errors import HeldError, UserError
from orchestrator.jobs import alerts
from orchestrator.jobs.alerts import Alerts
from orchestrator.redact import redact_text
from orchestrator.runs import events
from orchestrator.runs.ending import Ending
from tests.helpers import small_run
from tests.helpers.wait import wait_until

SECRET = "T0123/B4567/xoxsecretpath"


class Server(http.server.ThreadingHTTPServer):
    """Keeps what it gets. `status`: its answer; `open`: it answers only when this is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[dict] = []
        self.status = 200
        self.open = threading.Event()
        self.open.set()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == f"/{SECRET}"
        assert self.headers["Content-Type"] == "application/json"
        self.server.got.append(json.loads(body))
        self.server.open.wait(60)
        self.send_response(self.server.status)
        self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/{SECRET}")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{SECRET}"
        monkeypatch.setenv("ESPALIER_ALERT_URL", address)
        monkeypatch.setattr(alerts, "POLL_S", 0.05)
        yield server
        server.open.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("ending", "which", "sent"),
    [
        (Ending("done"), "all", ["finished"]),
        (Ending("done"), "problems", []),
        (Ending("done"), "never", []),
        (Ending("failed", "out of luck"), "problems", ["failed"]),
        (Ending("user", "too large"), "all", ["failed"]),
        (Ending("diverged", "loss is nan"), "all", ["diverged"]),
        (Ending("again", "SIGTERM"), "all", []),
        (Ending("interrupted"), "all", []),
    ],
)
def test_ending_is_sent_once(folder, server, ending, which, sent):
    with Alerts(folder, which) as block:
        block.ended(ending)
    assert [body["event"] for body in server.got] == sent
    for body in server.got:
        assert body.keys() == {"text", "name", "event", "time"}
        assert body["name"] == folder.name
        assert (ending.reason or "") in body["text"]


def test_hang_and_wait_are_sent_while_the_job_runs(folder, server):
    events.note(folder, "hang", "of an earlier attempt")
    with Alerts(folder, "problems"):
        events.note(folder, "hang", "rank 1 hangs in the backward pass\nstack …")
        events.note(folder, "sample", "not an alert")
        for _ in range(3):  # noted each minute, sent once
            events.note(folder, "waiting", "waits for node7")
        wait_until(lambda: len(server.got) == 2)
    assert [body["event"] for body in server.got] == ["hung", "waiting"]
    assert server.got[0]["text"].endswith(": hung: rank 1 hangs in the backward pass")


def test_each_trial_that_is_lost_is_sent_once_also_in_later_starts(folder, server):
    for names in (["hot", "hot", "hotter"], ["hot", "cold"]):
        with Alerts(folder, "problems"):
            for name in names:
                events.note(folder, "trial_diverged", f"trial {name}: loss is nan", trial=name)
            events.note(folder, "trial_failed", "trial lost: out of luck", trial="lost")
            events.note(folder, "hang", "the end")
            wait_until(lambda: server.got and server.got[-1]["event"] == "hung")
            server.got[-1]["event"] = "the end"
    texts = [body["text"] for body in server.got if body["event"] != "the end"]
    assert texts == [
        f"{folder.name}: diverged: trial hot: loss is nan",
        f"{folder.name}: diverged: trial hotter: loss is nan",
        f"{folder.name}: failed: trial lost: out of luck",
        f"{folder.name}: diverged: trial cold: loss is nan",
    ]


@pytest.mark.parametrize(
    ("error", "sent"),
    [(OSError("no route"), ["failed"]), (HeldError("another job"), []), (KeyboardInterrupt(), [])],
)
def test_error_before_the_work_is_sent_but_not_that_another_job_works(folder, server, error, sent):
    with pytest.raises(type(error)), Alerts(folder, "all"):
        raise error
    assert [body["event"] for body in server.got] == sent


def test_secrets_are_not_sent(folder, server, monkeypatch):
    monkeypatch.setenv("API_KEY", "verysecretvalue")
    with Alerts(folder, "all") as block:
        block.ended(Ending("failed", "https://me:hidden@host refused verysecretvalue"))
    assert "hidden" not in str(server.got) and "verysecretvalue" not in str(server.got)


@pytest.mark.parametrize("status", [302, 307, 404, 500])
def test_refusal_is_one_line_without_the_address(folder, server, status, capfd):
    server.status = status
    with Alerts(folder, "all") as block:
        events.note(folder, "hang", "it hangs")
        block.ended(Ending("done"))
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        f"ESPALIER_ALERT_URL: its server did not take the alert 'hung' (HTTP status {status})"
    ]
    assert err == ""
    assert len(server.got) == 2, "a redirect was followed"


def test_server_that_does_not_answer_ends_no_run(folder, server, monkeypatch, capfd):
    monkeypatch.setattr(alerts, "TIMEOUT_S", 0.2)
    server.open.clear()
    with Alerts(folder, "all") as block:
        block.ended(Ending("done"))
    assert "'finished' (no answer)" in capfd.readouterr().out


@pytest.mark.parametrize(
    "address",
    [
        "https://h:99999/secret",
        "https://h:secret/x",
        "http://a b/secret",
        "ftp://host/x",
        "file:///etc/passwd",
        "host/x",
        "http://",
        "http://[",
        "https://a\n",
    ],
)
def test_other_address_is_refused_and_not_quoted(folder, monkeypatch, address):
    monkeypatch.setenv("ESPALIER_ALERT_URL", address)
    with pytest.raises(UserError) as refused:
        Alerts(folder, "all")
    assert str(refused.value) == (
        "ESPALIER_ALERT_URL is not an http:// or https:// address; correct or unset it"
    )
    assert Alerts(folder, "never") is not None


def test_run_sends_its_end_and_stores_the_address_nowhere(
    tiny_corpus, tiny_dataset, tmp_path, server, capfd
):
    assert (
        small_run.run_here(tmp_path, tiny_corpus, f"data.dir={tiny_dataset}", "train.max_steps=20")
        == 0
    )
    assert [(body["name"], body["event"]) for body in server.got] == [("small", "finished")]
    stored = [file for file in Path(tmp_path).rglob("*") if file.is_file()]
    assert not [file for file in stored if SECRET.encode() in file.read_bytes()]
    assert SECRET not in str(capfd.readouterr())


def test_address_is_hidden_in_texts(server):
    address = os.environ["ESPALIER_ALERT_URL"]
    assert SECRET not in redact_text(f"cannot reach {address} now")
