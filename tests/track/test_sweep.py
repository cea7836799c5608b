"""Tracking of a sweep: a parent run and a child run per trial, every value exactly once.

The tests use a real MLflow and compare the rows of its database.
"""

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from orchestrator.errors import UserError
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.track import outbox
from orchestrator.track.server import sweep_url
from orchestrator.track.tracker import Tracker, resend_metrics
from pipelines import replay_metrics
from tests.helpers.tracked import client, expected, rows, sent_step
from tests.helpers.wait import wait_until

EXPERIMENT = "sweeps"
PARENT = "mlflow.parentRunId"


def put(path, text):
    """Replace a file as a sweep does: a new file under the old name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    os.replace(temporary, path)


def put_run(folder, key, **facts):
    facts = {
        "params": {"schedule.kind": "wsd"},
        "tags": {"mlflow.source.name": "pipelines/sweep.py"},
        "dataset": {},
        "attempts": [{"started": "2026-01-02T03:04:05+00:00"}],
        **facts,
    }
    put(folder / "run.json", json.dumps({"name": folder.name, "key": key, **facts}))


def put_curve(folder, steps, loss=4.0):
    """Write the curve up to step `steps`. The line of a step is always the same."""
    lines = []
    for step in range(0, steps + 1, 10):
        value = loss - step / 1000
        timestamp = 1_767_323_045_000 + step
        lines.append({"step": step, "timestamp": timestamp, "train/loss": value, "val/loss": value})
    put(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def put_stage(sweep, stage, step, trial):
    """Write a stage with a checkpoint, and link the trial's checkpoints to those of the stage."""
    checkpoint = sweep / "stages" / stage / "checkpoints" / f"step-{step:08d}"
    put(checkpoint / "MANIFEST.json", json.dumps({"stage": stage}))
    link = sweep / "trials" / trial / "checkpoints"
    link.unlink(missing_ok=True)
    link.symlink_to(f"../../stages/{stage}/checkpoints")


def put_trial(sweep, name, steps=100, loss=4.0, status="FINISHED"):
    """Write a trial with `steps` steps. Without a status, its last stage has not begun."""
    folder = sweep / "trials" / name
    put_run(folder, f"{sweep.name}/{name}")
    put_curve(folder, steps, loss)
    put(folder / "experiment.yaml", "name: x\ntracking: {uri: https://me:hunter2@host}\n")
    if status:
        put_stage(sweep, f"leaf-{name}", steps, name)
        put(folder / "samples" / "step-00000050.txt", "early")
        put(folder / "samples" / f"step-{steps:08d}.txt", "late")
        put(folder / "summary.json", json.dumps({"status": status}))
    return folder


@pytest.fixture
def sweep(tmp_path, request):
    """A sweep with two finished trials."""
    folder = tmp_path / "runs" / request.node.name.replace("[", "-").replace("]", "")
    put_run(folder, folder.name)
    put(
        folder / "sweep.yaml",
        "sweep: {grid: {schedule.kind: [wsd]}}\ntracking: {uri: https://me:hunter2@host}\n",
    )
    put_trial(folder, "a")
    put_trial(folder, "b", loss=3.5)
    return folder


def start(sweep, uri):
    tracker = Tracker(SweepFolder(sweep), uri, EXPERIMENT)
    tracker.start()
    return tracker


def send(sweep, uri, status="FINISHED"):
    tracker = start(sweep, uri)
    assert tracker.finish(status, 60)
    return tracker


def children(uri, tracker):
    """Return {trial: MLflow's run} of the sweep."""
    mlflow = client(uri)
    experiment_id = mlflow.get_experiment_by_name(EXPERIMENT).experiment_id
    runs = mlflow.search_runs([experiment_id], f"tags.`{PARENT}` = '{tracker.run_id}'")
    assert len({run.info.run_name for run in runs}) == len(runs), "a trial has two runs"
    return {run.info.run_name: run for run in runs}


def statuses(uri, tracker):
    return {name: run.info.status for name, run in children(uri, tracker).items()}


def counts(store):
    """Return the number of rows of every table that tracking writes to."""
    tables = [
        "metrics",
        "params",
        "tags",
        "inputs",
        "datasets",
        "logged_models",
        "logged_model_metrics",
        "runs",
        "registered_models",
        "model_versions",
        "registered_model_aliases",
    ]
    found = {}
    with sqlite3.connect(store) as db:
        for table in tables:
            (found[table],) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
    return found


def test_sweep_is_a_parent_run_with_a_whole_curve_per_trial(sweep, store, uri):
    put(sweep / "plan.txt", "a\nb\n")
    put(sweep / "comparison.csv", "trial,final\nb,3.4\n")
    put(sweep / "figures" / "final.png", "picture")
    line = {"step": 1, "timestamp": 1767323045000, "sweep/steps_saved": 40}
    put(sweep / "metrics.jsonl", json.dumps(line) + "\n")
    put(sweep / "summary.json", '{"status": "FINISHED"}')
    events.note(RunFolder(sweep), "hang", "rank 0 hung", stage="leaf-a")
    tracker = send(sweep, uri)
    parent = client(uri).get_run(tracker.run_id)
    found = children(uri, tracker)
    assert (parent.info.run_name, parent.info.status) == (sweep.name, "FINISHED")
    assert parent.data.metrics == {"sweep/steps_saved": 40}
    assert set(found) == {"a", "b"}
    artifacts = store.parent / "artifacts"
    assert files(artifacts / tracker.run_id) == {
        "sweep.yaml",
        "plan.txt",
        "comparison.csv",
        "summary.json",
        "events.jsonl",
        "figures/final.png",
    }
    assert parent.data.tags["events.hang"] == "1"
    for name, run in found.items():
        folder = sweep / "trials" / name
        assert (run.info.status, run.info.start_time) == ("FINISHED", 1767323045000)
        assert rows(store, folder) == expected(folder)
        assert files(artifacts / run.info.run_id) == {
            "experiment.yaml",
            "summary.json",
            "samples/step-00000100.txt",
        }
        model = client(uri).get_logged_model(run.outputs.model_outputs[0].model_id)
        stage = sweep / "stages" / f"leaf-{name}" / "checkpoints" / "step-00000100"
        assert model.tags["checkpoint.uri"] == str(stage)
    assert not [path for path in artifacts.rglob("*.yaml") if "hunter2" in path.read_text()]
    assert tracker.url == sweep_url(uri, parent.info.experiment_id, tracker.run_id)
    assert tracker.url.endswith(f"&viewStateShareKey={tracker.run_id}")
    experiment = client(uri).get_experiment(parent.info.experiment_id)
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{tracker.run_id}"])
    shown = client(uri).search_runs([experiment.experiment_id], view["searchFilter"])
    assert {run.info.run_name for run in shown} == {"a", "b"}


def files(folder):
    return {path.relative_to(folder / "artifacts").as_posix() for path in folder.rglob("*.*")}


def test_sending_twice_changes_nothing(sweep, store, uri):
    put(sweep / "summary.json", '{"status": "FINISHED", "best_trial": "b"}')
    run_id = send(sweep, uri).run_id
    before = counts(store)
    for is_lost in (False, True):  # also if the tracking.json files are lost
        if is_lost:
            for file in list(sweep.rglob("tracking.json")):
                file.unlink()
        assert resend_metrics(SweepFolder(sweep), uri, EXPERIMENT)
        assert json.loads((sweep / "tracking.json").read_text())["run_id"] == run_id
        assert counts(store) == before


def test_unchanged_trials_cost_no_request(sweep, uri, monkeypatch):
    from mlflow import MlflowClient

    put(sweep / "summary.json", '{"status": "FINISHED", "best_trial": "a"}')
    parent = send(sweep, uri).run_id
    requests = []

    def recorded(name, method):
        def call(self, first, *rest, **options):
            if first != parent:
                requests.append((name, first))
            return method(self, first, *rest, **options)

        return call

    for name in (
        "get_run",
        "log_batch",
        "log_text",
        "log_artifact",
        "search_runs",
        "set_terminated",
        "update_run",
        "create_run",
        "create_registered_model",
        "set_registered_model_alias",
        "set_logged_model_tags",
    ):
        monkeypatch.setattr(MlflowClient, name, recorded(name, getattr(MlflowClient, name)))
    assert resend_metrics(SweepFolder(sweep), uri, EXPERIMENT)
    experiment_id = json.loads((sweep / "tracking.json").read_text())["experiment_id"]
    all_trials = ("search_runs", [experiment_id])  # one request tells whether MLflow has them
    assert requests == [all_trials]
    put_curve(sweep / "trials" / "b", 120, 3.5)
    assert resend_metrics(SweepFolder(sweep), uri, EXPERIMENT)
    run_id = json.loads((sweep / "trials" / "b" / "tracking.json").read_text())["run_id"]
    assert requests == [all_trials, all_trials, ("get_run", run_id), ("log_batch", run_id)]


def test_trial_grows_while_its_sweep_runs(sweep, store, uri):
    folder = put_trial(sweep, "c", 50, status=None)
    (folder / "checkpoints").symlink_to("../../stages/leaf-c/checkpoints")  # not there yet
    tracker = start(sweep, uri)
    wait_until(lambda: sent_step(folder) == 50)
    assert statuses(uri, tracker) == {"a": "FINISHED", "b": "FINISHED", "c": "RUNNING"}
    put_curve(folder, 150)
    # Checkpoints of a stage that other trials share are not registered for this trial.
    put_stage(sweep, "trunk", 150, "c")
    wait_until(lambda: sent_step(folder) == 150)
    put_trial(sweep, "c", 200, status="FAILED")
    assert tracker.finish("FINISHED", 60)
    assert rows(store, folder) == expected(folder)
    steps = [step for key, step, *_ in rows(store, folder) if key == "val/loss"]
    assert steps == list(range(0, 201, 10))
    found = children(uri, tracker)["c"]
    assert found.info.status == "FAILED"
    assert [output.step for output in found.outputs.model_outputs] == [200]


def test_resumed_sweep_reopens_its_trials(sweep, store, uri):
    put_trial(sweep, "c", 50, status=None)
    stopped = send(sweep, uri, "KILLED")
    assert statuses(uri, stopped) == {"a": "FINISHED", "b": "FINISHED", "c": "KILLED"}
    (sweep / "trials" / "b" / "summary.json").unlink()  # its max_steps was raised
    put_curve(sweep / "trials" / "b", 300, 3.5)
    tracker = start(sweep, uri)
    reopened = {"a": "FINISHED", "b": "RUNNING", "c": "RUNNING"}
    wait_until(lambda: tracker.run_id and statuses(uri, tracker) == reopened)
    put_trial(sweep, "c", 100)
    put_trial(sweep, "b", 300, 3.5)
    put_trial(sweep, "d", 100)
    assert tracker.finish("FINISHED", 60)
    assert statuses(uri, tracker) == dict.fromkeys("abcd", "FINISHED")
    for name in "abcd":
        assert rows(store, sweep / "trials" / name) == expected(sweep / "trials" / name)


TRACK = """
import sys, time
from orchestrator.runs.folder import SweepFolder
from orchestrator.track.tracker import Tracker
folder, uri, experiment = sys.argv[1:]
Tracker(SweepFolder(folder), uri, experiment).start()
time.sleep(60)
"""


def test_killed_tracker_loses_and_repeats_nothing(sweep, store, uri):
    names = [f"t{n}" for n in range(16)]
    for name in names:
        put_trial(sweep, name, 2000)

    def count_begun():
        return len(list(sweep.glob("trials/*/tracking.json")))

    for count in (1, 6):  # killed twice, while it sends a trial
        command = [sys.executable, "-c", TRACK, str(sweep), uri, EXPERIMENT]
        process = subprocess.Popen(command)
        wait_until(lambda count=count: count_begun() >= count, pause_s=0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert count_begun() < len(names)
    tracker = send(sweep, uri)
    assert set(children(uri, tracker)) == {"a", "b", *names}
    for name in names:
        assert rows(store, sweep / "trials" / name) == expected(sweep / "trials" / name)


def test_run_created_by_a_killed_tracker_is_found_by_its_key(sweep, uri):
    """It was killed after MLflow created the run, before it wrote tracking.json."""
    before = children(uri, send(sweep, uri))
    (sweep / "trials" / "a" / "tracking.json").unlink()
    after = children(uri, send(sweep, uri))
    assert set(after) == {"a", "b"}
    for name, run in after.items():
        assert run.info.run_id == before[name].info.run_id


def test_alias_points_to_the_checkpoint_of_the_best_trial(sweep, uri):
    mlflow = client(uri)
    name = sweep.name

    def best():
        version = mlflow.get_model_version_by_alias(name, "best")
        return version.version, version.tags["trial"], version.tags["checkpoint.uri"]

    def uri_of(trial):
        return str(sweep / "stages" / f"leaf-{trial}" / "checkpoints" / "step-00000100")

    for trial, version in (("a", 1), ("b", 2), ("a", 1)):
        put(sweep / "summary.json", json.dumps({"status": "FINISHED", "best_trial": trial}))
        tracker = send(sweep, uri)
        assert best() == (version, trial, uri_of(trial))
    assert len(mlflow.search_model_versions(f"name = '{name}'")) == 2
    version = mlflow.get_model_version_by_alias(name, "best")
    run = children(uri, tracker)["a"]
    assert version.run_id == run.info.run_id
    model = mlflow.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": 1}]


def test_best_trial_without_a_checkpoint_is_not_registered(sweep, uri):
    put_trial(sweep, "c", status=None)
    put(sweep / "summary.json", '{"status": "FINISHED", "best_trial": "c"}')
    send(sweep, uri)
    assert not client(uri).search_registered_models(f"name = '{sweep.name}'")


def test_code_is_sent_as_it_is_and_a_trial_has_what_it_names(sweep, store, uri):
    hashes = {name: str(number) * 32 for number, name in enumerate(("conv", "lion", "other"))}
    codes = {f"code/{name}-{digest}.py": f"key=1 # {name}\r\n" for name, digest in hashes.items()}
    for name, code in codes.items():
        put(sweep / name, code)
    (sweep / "code" / "link.py").symlink_to(sweep / "run.json")
    kinds = {"model.kind": f"mine/conv.py:Conv@{hashes['conv']}", "optim.kind": "adamw"}
    put_run(sweep / "trials" / "a", f"{sweep.name}/a", params=kinds)
    kinds["optim.kind"] = f"/x/lion.py:lion@{hashes['lion']}"
    put_run(sweep / "trials" / "b", f"{sweep.name}/b", params=kinds)
    tracker = send(sweep, uri)
    runs = {name: run.info.run_id for name, run in children(uri, tracker).items()}
    runs["sweep"] = tracker.run_id
    sent = {}
    for name, run_id in runs.items():
        artifacts = store.parent / "artifacts" / run_id / "artifacts"
        for file in artifacts.rglob("*.py"):
            assert file.read_bytes().decode() == codes[f"code/{file.name}"]
        sent[name] = sorted(file.name.partition("-")[0] for file in artifacts.rglob("*.py"))
    assert sent == {
        "a": ["conv"],
        "b": ["conv", "lion"],
        "sweep": ["conv", "lion", "other"],
    }


def test_documents_are_sent_again_when_they_change(sweep, store, uri):
    put(sweep / "comparison.csv", "trial,final\n")
    tracker = start(sweep, uri)
    wait_until(lambda: tracker.run_id)
    artifact = store.parent / "artifacts" / tracker.run_id / "artifacts" / "comparison.csv"
    wait_until(artifact.exists)
    put(sweep / "comparison.csv", "trial,final\nb,3.4\n")
    assert tracker.finish("FINISHED", 60)
    assert artifact.read_text() == "trial,final\nb,3.4\n"


def test_trial_that_a_user_deleted_is_sent_as_a_new_run(sweep, store, uri, caplog):
    tracker = send(sweep, uri)
    client(uri).delete_run(children(uri, tracker)["a"].info.run_id)
    put_curve(sweep / "trials" / "a", 200)
    put_curve(sweep / "trials" / "b", 200, 3.5)
    with caplog.at_level(logging.WARNING):
        assert resend_metrics(SweepFolder(sweep), uri, EXPERIMENT, 30)
    assert caplog.text.count("no longer has the trial a") == 1
    for name in "ab":
        assert rows(store, sweep / "trials" / name) == expected(sweep / "trials" / name)


def test_unreachable_server_gets_everything_later(sweep, store, uri, monkeypatch, capsys):
    monkeypatch.setattr("orchestrator.track.sender.PAUSES_S", (0.2, 0.2))
    put(sweep / "summary.json", '{"status": "FINISHED", "best_trial": "b"}')
    tracker = start(sweep, "http://127.0.0.1:9")  # nothing listens there
    assert not tracker.finish("FINISHED", 2)
    assert (tracker.run_id, tracker.url) == (None, None)
    for name in "ab":
        put(
            sweep / "trials" / name / "experiment.yaml",
            f"name: {name}\ntracking: {{experiment: {EXPERIMENT}}}\n",
        )
    assert replay_metrics.main([str(sweep), "--uri", uri]) == 0
    assert "has everything" in capsys.readouterr().out
    state = json.loads((sweep / "tracking.json").read_text())
    run = client(uri).get_run(state["run_id"])
    assert run.info.status == "FINISHED"
    for name in "ab":
        assert rows(store, sweep / "trials" / name) == expected(sweep / "trials" / name)
    assert client(uri).get_model_version_by_alias(sweep.name, "best").tags["trial"] == "b"
    with pytest.raises(UserError, match="a trial is sent with its sweep"):
        replay_metrics.main([str(sweep / "trials" / "a")])


def test_resending_an_unfinished_sweep_keeps_its_statuses(sweep, uri):
    put_trial(sweep, "c", 50, status=None)
    first = send(sweep, uri, "KILLED")
    put_curve(sweep / "trials" / "c", 80)
    assert resend_metrics(SweepFolder(sweep), uri, EXPERIMENT)
    assert statuses(uri, first)["c"] == "KILLED"
    assert client(uri).get_run(first.run_id).info.status == "KILLED"


def test_another_store_gets_everything(sweep, uri, tmp_path):
    send(sweep, uri)
    other = tmp_path / "other" / "mlflow.db"
    assert resend_metrics(SweepFolder(sweep), f"sqlite:///{other}", EXPERIMENT)
    for name in "ab":
        assert rows(other, sweep / "trials" / name) == expected(sweep / "trials" / name)


def test_lines_of_a_rewritten_longer_curve_are_sent_once(sweep):
    folder = sweep / "trials" / "a"
    queue = outbox.MetricQueue(RunFolder(folder))
    queue.refresh(outbox.Sent("", None))
    assert [batch.sent_step for batch in queue.batches()] == [100]
    for steps in (100, 150, 150, 300):
        put_curve(folder, steps)
        queue.refresh(outbox.Sent("", None, sent_step=100))
    assert [line.sent_step for line in queue._waiting] == list(range(110, 301, 10))
