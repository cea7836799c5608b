"""Tracking of a run: MLflow gets everything in the run folder exactly once.

The tests use a real MLflow and compare the rows of its database.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from orchestrator.errors import UserError
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.track.mlflow import Projection
from orchestrator.track.outbox import BATCH, MetricQueue, Sent
from orchestrator.track.server import resolve_uri, run_url
from orchestrator.track.tracker import Tracker, resend_metrics
from tests.helpers.gate import locked
from tests.helpers.tracked import client, curve, expected, log, rows, sent_step
from tests.helpers.wait import wait_until

EXPERIMENT = "tests"


def make_run(folder, key, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "params": {"model.n_layer": 2, "schedule.kind": "cosine"},
        "tags": {"mlflow.source.name": "pipelines/train.py"},
        "dataset": {
            "name": "byte tokens",
            "digest": "d" * 64,
            "source": "data/x",
            "train_tokens": 900,
            "val_tokens": 100,
        },
        "attempts": [{"started": "2026-01-02T03:04:05+00:00", "workers": 1}],
        **facts,
    }
    (folder / "run.json").write_text(json.dumps({"name": "demo", "key": key, **facts}))
    return folder


@pytest.fixture
def run_dir(tmp_path, request):
    return make_run(tmp_path / "runs" / "demo", request.node.name)


def commit(run_dir, step, content="{}"):
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MANIFEST.json").write_text(content)
    return folder


def send(run_dir, uri, status="FINISHED"):
    tracker = Tracker(RunFolder(run_dir), uri, EXPERIMENT)
    tracker.start()
    assert tracker.finish(status, 60)
    return tracker


def test_projection_is_complete(run_dir, store, uri):
    log(run_dir, range(0, 101, 10), **{"val/loss": 4.0})
    commit(run_dir, 100)
    (run_dir / "samples").mkdir()
    (run_dir / "samples" / "step-00000100.txt").write_text("To be")
    (run_dir / "code").mkdir()
    (run_dir / "code" / "conv-0123.py").write_text('token = "hf_0123456789012345678"\n')
    (run_dir / "summary.json").write_text('{"status": "FINISHED"}')
    (run_dir / "experiment.yaml").write_text(
        "name: demo\ntracking: {uri: https://me:hunter2@host}\n"
    )
    tracker = send(run_dir, uri)
    run = client(uri).get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.info.start_time == 1767323045000
    assert run.data.params == {"model.n_layer": "2", "schedule.kind": "cosine"}
    assert run.data.tags["mlflow.source.name"] == "pipelines/train.py"
    assert run.data.tags["attempt.1.workers"] == "1"
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("byte tokens", "d" * 36)
    assert rows(store, tracker.run_id) == expected(run_dir)
    artifacts = store.parent / "artifacts" / tracker.run_id / "artifacts"
    assert {p.relative_to(artifacts).as_posix() for p in artifacts.rglob("*.*")} == {
        "experiment.yaml",
        "summary.json",
        "samples/step-00000100.txt",
        "code/conv-0123.py",
    }
    assert "hf_" in (artifacts / "code" / "conv-0123.py").read_text()  # its hash is the run's
    assert "hunter2" not in (artifacts / "experiment.yaml").read_text()
    assert tracker.url.endswith(
        f"/runs/{tracker.run_id}/model-metrics?workflowType=machine_learning"
    )


def test_nothing_that_is_sent_has_a_secret(run_dir, store, uri):
    """Also if run.json has some: another version may have written it, or the user."""
    address = "https://me:hunter2@host/data"
    make_run(
        run_dir,
        "secrets",
        params={"data.corpus": address, "nested": [{"api_key": "hunter2"}]},
        tags={"mlflow.source.name": address},
        dataset={"name": "tokens", "digest": "d" * 64, "source": address, "password": "hunter2"},
        attempts=[{"started": "2026-01-02T03:04:05+00:00", "layout": {"token": "hunter2"}}],
    )
    events.note(RunFolder(run_dir), "restart", f"cannot read {address}")
    (run_dir / "experiment.yaml").write_text(f"data: {{corpus: {address}}}\n")
    (run_dir / "samples").mkdir()
    log(run_dir, [1])
    run_id = send(run_dir, uri).run_id
    assert client(uri).get_run(run_id).data.params["data.corpus"] == "https://[redacted]@host/data"
    sent = [store, *(store.parent / "artifacts" / run_id).rglob("*.*")]
    assert len(sent) > 2
    assert [file.name for file in sent if b"hunter2" in file.read_bytes()] == []


def test_sending_twice_changes_nothing(run_dir, store, uri):
    log(run_dir, range(50), **{"val/loss": 4.0})
    commit(run_dir, 49)
    run_id = send(run_dir, uri).run_id
    everything = "SELECT (SELECT count(*) FROM {0}) FROM runs WHERE run_uuid = ?"
    tables = [
        "metrics",
        "params",
        "tags",
        "inputs",
        "datasets",
        "logged_models",
        "logged_model_metrics",
        "runs",
    ]
    before = [rows(store, run_id, everything.format(t)) for t in tables]
    for is_lost in (False, True):  # also if tracking.json is lost
        if is_lost:
            (run_dir / "tracking.json").unlink()
        assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT)
        assert json.loads((run_dir / "tracking.json").read_text())["run_id"] == run_id
        assert [rows(store, run_id, everything.format(t)) for t in tables] == before


def test_resume_adds_one_value_per_step(run_dir, store, uri):
    log(run_dir, range(0, 101, 10))
    first = send(run_dir, uri, "KILLED")
    log(run_dir, range(110, 131, 10))  # moved into an aside before they are sent
    Journal(RunFolder(run_dir)).rewind(50)
    make_run(
        run_dir,
        "test_resume_adds_one_value_per_step",
        attempts=[{"workers": 1}, {"workers": 2, "layout": {"use_gpu": False}, "model.n_layer": 2}],
        params={"model.n_layer": 2, "schedule.kind": "wsd"},
    )
    second = Tracker(RunFolder(run_dir), uri, EXPERIMENT)
    second.start()
    wait_until(lambda: client(uri).get_run(first.run_id).info.status == "RUNNING")
    log(run_dir, range(60, 201, 10))
    assert second.finish("FINISHED", 60)
    assert second.run_id == first.run_id
    sent = rows(store, first.run_id)
    assert sent == expected(run_dir)
    assert [step for key, step, *_ in sent if key == "train/loss"] == list(range(0, 201, 10))
    run = client(uri).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["schedule.kind"] == "cosine"
    assert {k: v for k, v in run.data.tags.items() if k.startswith("attempt.2")} == {
        "attempt.2.schedule.kind": "wsd",
        "attempt.2.workers": "2",
        "attempt.2.layout.use_gpu": "false",
    }


def test_resume_while_the_tracker_runs(run_dir, store, uri):
    tracker = Tracker(RunFolder(run_dir), uri, EXPERIMENT)
    tracker.start()
    log(run_dir, range(0, 101, 10))
    wait_until(lambda: tracker.run_id and len(rows(store, tracker.run_id)) == 22)
    Journal(RunFolder(run_dir)).rewind(50)
    log(run_dir, range(60, 121, 10))
    assert tracker.finish("FAILED", 60)
    assert rows(store, tracker.run_id) == expected(run_dir)
    assert client(uri).get_run(tracker.run_id).info.status == "FAILED"


def test_metrics_that_only_a_repeated_step_logs_are_sent(run_dir, store, uri):
    """After a resume with other intervals, and if a step is evaluated because it is the last."""
    log(run_dir, range(0, 101, 10))
    commit(run_dir, 100)
    tracker = Tracker(RunFolder(run_dir), uri, EXPERIMENT)
    tracker.start()
    wait_until(lambda: sent_step(run_dir) == 100)
    Journal(RunFolder(run_dir)).rewind(50)
    # The running tracker sends step 65, although later steps were sent before.
    log(run_dir, [65])
    query = "SELECT step FROM metrics WHERE run_uuid = ? AND key = 'train/loss'"
    wait_until(lambda: (65,) in rows(store, tracker.run_id, query))
    log(run_dir, [80])
    assert tracker.finish("KILLED", 60)
    log(run_dir, [95])
    log(run_dir, [100], **{"val/loss": 4.0})
    # Another process sends step 95 and the new metric of step 100.
    assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT)
    sent = rows(store, run_dir)
    assert sent == expected(run_dir)
    assert set(curve(run_dir)) <= {(key, step, value) for key, step, value, _ in sent}


def test_events_are_sent_as_file_and_as_counts(run_dir, store, uri):
    def seen(run_id):
        tags = client(uri).get_run(run_id).data.tags
        file = store.parent / "artifacts" / run_id / "artifacts" / "events.jsonl"
        counts = {name: text for name, text in tags.items() if name.startswith("events.")}
        return counts, file.read_text() if file.exists() else ""

    log(run_dir, range(5))
    tracker = Tracker(RunFolder(run_dir), uri, EXPERIMENT)
    tracker.start()
    wait_until(lambda: sent_step(run_dir) == 4)
    assert seen(tracker.run_id) == ({}, "")
    events.note(RunFolder(run_dir), "hang", "rank 1 hangs", rank=1)
    events.note(RunFolder(run_dir), "disk_full", "no room at https://me:hunter2@host/bucket")
    wait_until(lambda: seen(tracker.run_id)[0] == {"events.hang": "1", "events.disk_full": "1"})
    wait_until(lambda: "no room" in seen(tracker.run_id)[1])
    assert tracker.finish("KILLED", 60)
    events.note(RunFolder(run_dir), "hang", "rank 0 hangs", rank=0)
    assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT)
    tags, text = seen(tracker.run_id)
    assert tags == {"events.hang": "2", "events.disk_full": "1"}
    assert [json.loads(line)["kind"] for line in text.splitlines()] == ["hang", "disk_full", "hang"]
    assert "hunter2" not in text


def test_links_and_damaged_files_do_not_stop_the_others(run_dir, store, uri, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"verdict": "secret"}')
    log(run_dir, range(16), **{"val/loss": 4.0})
    shutil.copytree(commit(run_dir, 15), run_dir / "checkpoints" / "step-00000015.bak")
    (commit(run_dir, 16) / "MANIFEST.json").unlink()
    for name in (
        "samples/step-00000001.txt",
        "replays/2026-01-02.json",
        "experiment.yaml",
        "checkpoints/step-00000016/MANIFEST.json",
    ):
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).symlink_to(secret)
    os.mkfifo(run_dir / "samples" / "step-00000002.txt")
    (run_dir / "samples" / "step-00000015.txt").write_bytes(b"To be\xff")
    events.note(RunFolder(run_dir), "hang", "rank 1 hangs")
    with open(run_dir / "events.jsonl", "ab") as file:
        file.write(b'{"kind": "torn \xff\n')
    (tmp_path / "elsewhere").symlink_to(run_dir, target_is_directory=True)
    tracker = send(tmp_path / "elsewhere", uri)
    artifacts = store.parent / "artifacts" / tracker.run_id / "artifacts"
    assert {p.name for p in artifacts.rglob("*.*")} == {
        "step-00000015.txt",
        "events.jsonl",
    }
    assert (artifacts / "samples" / "step-00000015.txt").read_text() == "To be\ufffd"
    run = client(uri).get_run(tracker.run_id)
    assert [output.step for output in run.outputs.model_outputs] == [15]
    assert "replay.verdict" not in run.data.tags
    assert run.data.tags["events.hang"] == "1"


def test_two_senders_of_a_new_run_create_one(run_dir, uri, monkeypatch, caplog):
    """The first one waits before it creates the run, until the second one waits for its lock."""
    log(run_dir, range(10))
    second_waits = threading.Event()
    create = Projection._create
    creators = []

    def slow_create(projection):
        creators.append(projection)
        assert second_waits.wait(30)
        return create(projection)

    monkeypatch.setattr(Projection, "_create", slow_create)
    tracker = Tracker(RunFolder(run_dir), uri, EXPERIMENT)
    tracker.start()
    wait_until(lambda: creators)
    with ThreadPoolExecutor() as pool:
        second = pool.submit(resend_metrics, RunFolder(run_dir), uri, EXPERIMENT)
        try:
            message = f"held by process {os.getpid()} on "
            wait_until(lambda: message in caplog.text or len(creators) > 1)
        finally:
            second_waits.set()
        assert second.result()
    assert tracker.finish("FINISHED", 60)
    assert len(creators) == 1


def test_locked_store_is_retried(run_dir, store, uri):
    """MLflow waits 20 s for the lock. After that, the sender would retry."""
    log(run_dir, range(50))
    tracker = Tracker(RunFolder(run_dir), uri, EXPERIMENT)
    tracker.start()
    wait_until(lambda: sent_step(run_dir) == 49)
    with locked(store):
        log(run_dir, range(50, 100))
        assert not resend_metrics(RunFolder(run_dir), uri, EXPERIMENT, deadline_s=2)
        assert sent_step(run_dir) == 49
        log(run_dir, range(100, 150))
    assert tracker.finish("FINISHED", 60)
    assert rows(store, run_dir) == expected(run_dir)
    assert len(curve(run_dir)) == 300


def test_checkpoints_are_registered_and_marked_when_they_are_removed(run_dir, uri):
    for step in (100, 200, 300):
        log(run_dir, [step])
        commit(run_dir, step)
    tracker = send(run_dir, uri, "KILLED")
    mlflow = client(uri)
    experiment_id = json.loads((run_dir / "tracking.json").read_text())["experiment_id"]

    def tags():
        query = f"source_run_id = '{tracker.run_id}'"
        found = mlflow.search_logged_models([experiment_id], query)
        return {model.params["step"]: model.tags for model in found}

    assert tags().keys() == {"100", "200", "300"}
    assert tags()["200"]["checkpoint.uri"] == str(run_dir / "checkpoints" / "step-00000200")
    outputs = mlflow.get_run(tracker.run_id).outputs.model_outputs
    assert {output.step for output in outputs} == {100, 200, 300}
    before = tags()["300"]["checkpoint.sha256"]
    (commit(run_dir, 200) / "MANIFEST.json").unlink()
    commit(run_dir, 300, '{"is": "repeated"}')
    assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT)
    assert tags()["200"]["checkpoint.removed"] == "true"
    assert tags()["300"]["checkpoint.removed"] == "false"
    assert tags()["300"]["checkpoint.sha256"] != before


def test_run_that_a_user_deleted_is_sent_as_a_new_one(run_dir, store, uri, caplog):
    log(run_dir, range(5))
    deleted = send(run_dir, uri).run_id
    client(uri).delete_run(deleted)
    log(run_dir, range(5, 9))
    with caplog.at_level(logging.WARNING):
        assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT, 30)
    assert [record.message.count("no longer has the run") for record in caplog.records] == [1]
    assert json.loads((run_dir / "tracking.json").read_text())["run_id"] != deleted
    assert rows(store, run_dir) == expected(run_dir)


def test_another_store_gets_everything(run_dir, store, uri, tmp_path):
    log(run_dir, range(5))
    send(run_dir, uri)
    other = tmp_path / "other" / "mlflow.db"
    assert resend_metrics(RunFolder(run_dir), f"sqlite:///{other}", EXPERIMENT)
    assert rows(other, run_dir) == expected(run_dir)


def test_values_that_are_not_finite_are_not_sent(run_dir, store, uri):
    log(run_dir, range(3), **{"optim/grad_norm": float("inf"), "val/loss": float("nan")})
    assert {key for key, *_ in rows(store, send(run_dir, uri).run_id)} == {"train/loss", "optim/lr"}


def test_batches_have_whole_lines_and_stay_until_accepted(run_dir):
    log(run_dir, range(1200))
    queue = MetricQueue(RunFolder(run_dir))
    nothing_sent = Sent("", None)
    queue.refresh(nothing_sent)
    batch = next(queue.batches())
    assert (batch.sent_step, len(batch.rows)) == (BATCH // 2 - 1, BATCH)
    assert next(queue.batches()) == batch
    queue.refresh(nothing_sent)
    assert [batch.sent_step for batch in queue.batches()] == [499, 999, 1199]
    log(run_dir, [1200])
    queue.refresh(Sent("", None, sent_step=1199))
    assert [batch.sent_step for batch in queue.batches()] == [1200]


def take(queue: MetricQueue, sent: Sent) -> list:
    """Return the rows that are due, as if the server accepted all of them."""
    rows = []
    queue.refresh(sent)
    for batch in queue.batches():
        rows += [(row.key, row.step) for row in batch.rows]
        sent.sent_step = batch.sent_step
        sent.asides = batch.asides
    return rows


def test_lines_that_were_accepted_are_not_sent_by_the_next_process(run_dir):
    log(run_dir, range(5))
    sent = Sent("", None)
    assert len(take(MetricQueue(RunFolder(run_dir)), sent)) == 2 * 5
    log(run_dir, [5])
    assert take(MetricQueue(RunFolder(run_dir)), sent) == [("train/loss", 5), ("optim/lr", 5)]


def test_new_metrics_of_repeated_steps_are_sent_after_a_resume_that_was_killed(run_dir):
    """The resume was killed after it wrote the aside, before it cut the journal."""
    folder = RunFolder(run_dir)
    log(run_dir, range(5))
    sent = Sent("", None)
    take(MetricQueue(folder), sent)
    lines = folder.journal_file.read_bytes().splitlines(keepends=True)
    folder.aside_file(0, 3).write_bytes(b"".join(lines[3:]))
    take(MetricQueue(folder), sent)  # the lines of the aside again, which changes nothing
    folder.journal_file.write_bytes(b"".join(lines[:3]))
    log(run_dir, [3], **{"val/loss": 4.0})
    assert take(MetricQueue(folder), sent) == [("val/loss", 3)]


def test_tracking_uri_and_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment = SimpleNamespace(tracking=SimpleNamespace(uri=None))
    assert resolve_uri(experiment, "runs") == f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    assert resolve_uri(experiment, "runs") == f"sqlite:///{tmp_path}/here.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///a%20b.db?timeout=3")
    assert resolve_uri(experiment, "runs") == f"sqlite:///{tmp_path}/a b.db?timeout=3"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match="./mlruns"):
        resolve_uri(experiment, "runs")
    experiment.tracking.uri = "http://host:5000/"
    assert resolve_uri(experiment, "runs") == "http://host:5000"
    experiment.tracking.uri = "sqlite:///[redacted]/t.db"  # stored by an earlier version
    with pytest.raises(UserError, match="./mlruns"):
        resolve_uri(experiment, "runs")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        resolve_uri(experiment, "runs")
    assert run_url("https://me:pw@host/x", "7", "r") == (
        "https://host/x/#/experiments/7/runs/r/model-metrics?workflowType=machine_learning"
    )


def test_tracking_module_does_not_import_mlflow_matplotlib_or_torch():
    code = (
        "import sys, orchestrator.track.tracker; "
        "sys.exit(bool({'matplotlib', 'mlflow', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_experiment_that_another_run_creates_meanwhile_is_used(run_dir, store, uri, monkeypatch):
    from mlflow import MlflowClient

    name = "created meanwhile"
    other = client(uri).create_experiment(name)
    find = MlflowClient.get_experiment_by_name
    answers = [None]  # the first one is from before
    monkeypatch.setattr(
        MlflowClient,
        "get_experiment_by_name",
        lambda self, name: answers.pop() if answers else find(self, name),
    )
    log(run_dir, [1])
    tracker = Tracker(RunFolder(run_dir), uri, name)
    tracker.start()
    assert tracker.finish("FINISHED", 60)
    assert answers == []
    assert client(uri).get_run(tracker.run_id).info.experiment_id == other
