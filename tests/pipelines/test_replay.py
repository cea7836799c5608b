"""replay.py: output, exit status, and its report in the run folder, in the events and in MLflow."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from orchestrator.errors import HeldError, UserError
from orchestrator.runs import events, journal, lock
from orchestrator.runs.folder import RunFolder
from pipelines.replay import main

FLOAT = r"0x1\.\w+p\+1 \([\d.]+\)"  # as hexadecimal and decimal number


@pytest.fixture
def run(trained_run, tmp_path) -> RunFolder:
    """A copy of the run that a test may change."""
    return RunFolder(shutil.copytree(trained_run, tmp_path / "storage" / "tiny"))


def nudge(run, step):
    """Change one logged loss by one unit in the last place."""
    lines = journal.read(run)
    for line in lines:
        if line["step"] == step:
            line["train/loss"] = math.nextafter(line["train/loss"], 9.0)
    run.journal_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def track(run):
    """Write the files that a driver writes before a run is tracked. Return the experiment."""
    stored = RunFolder(run.checkpoint(12)).read_experiment()
    run.experiment_file.write_text(stored.to_yaml())
    record = {"name": "tiny", "key": "a" * 32, "attempts": [{"from_step": 0}]}
    run.run_file.write_text(json.dumps(record))
    return stored


def protected_files(run):
    """Return the content of all files that a replay must not change."""
    files = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    return {
        path: content
        for path, content in files.items()
        if path != run.events_file and run.replays not in path.parents
    }


def test_equal_replay_is_reported_and_removed(run, capsys):
    before = protected_files(run)
    assert main([str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "4 logged lines of steps 8..12 equal, weights equal (step 12)" in out
    steps = re.findall(r"^step +(\d+)/12", out, re.MULTILINE)
    assert steps == ["9", "10", "11", "12"]
    [file] = run.replays.iterdir()  # the new checkpoints were removed
    report = json.loads(file.read_text("utf-8"))
    assert (report["equal"], report["steps"], report["lines"]) == (True, [8, 12], 4)
    assert report["causes"] == []
    [event] = events.read(run)
    assert (event["kind"], event["equal"]) == ("replay", True)
    assert event["verdict"] == f"replays/{file.name}"
    assert protected_files(run) == before


def test_different_replay_is_reported_and_kept(run, capsys):
    nudge(run, 10)
    assert main([str(run.path), "--steps", "9:"]) == 1
    out = capsys.readouterr().out
    first = f"differ, first at step 10, train/loss: {FLOAT} then, {FLOAT} now"
    assert re.search(first, out)
    assert re.search(r"cause +unknown: .*a journal that was edited", out)
    scratch, file = sorted(run.replays.iterdir(), key=lambda path: path.suffix)
    assert RunFolder(scratch).checkpoint_steps() == [12]
    assert json.loads(file.read_text("utf-8"))["first"]["step"] == 10


def test_keep_option_keeps_equal_replay(run):
    assert main([str(run.path), "--steps", "5:6", "--keep"]) == 0
    scratch, _ = sorted(run.replays.iterdir(), key=lambda path: path.suffix)
    assert [line["step"] for line in journal.read(RunFolder(scratch))] == [5, 6]


def test_reports_are_sent_to_mlflow(run, tmp_path, type_command, monkeypatch):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    experiment = track(run).tracking.experiment
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("ESPALIER_STORAGE", str(run.path.parent))
    nudge(run, 3)
    assert main(["tiny", "--steps", "4:12"]) == 0
    client = MlflowClient(uri)
    experiments = [client.get_experiment_by_name(experiment).experiment_id]
    [found] = client.search_runs(experiments, "tags.`replay.equal` = 'true'")
    sentence = found.data.tags["replay.verdict"]
    assert sentence.startswith("8 logged lines of steps 4..12 equal")

    done = type_command("replay.py", "tiny", "--steps", ":")
    assert (done.returncode, done.stderr) == (1, "")
    [found] = client.search_runs(experiments, "tags.`replay.equal` = 'false'")
    sentence = found.data.tags["replay.verdict"]
    assert sentence.startswith("steps 0..12 differ, first at step 3, train/loss: 0x")
    assert found.data.tags["events.replay"] == "2"
    names = [file.path for file in client.list_artifacts(found.info.run_id, "replays")]
    assert names == [f"replays/{path.name}" for path in sorted(run.replays.glob("*.json"))]
    sent = Path(client.download_artifacts(found.info.run_id, names[1]))
    report = json.loads(sent.read_text("utf-8"))
    assert [cause["kind"] for cause in report["causes"]] == ["unknown"]


def test_unreachable_server_does_not_change_the_exit_status(run, monkeypatch, capsys):
    track(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main([str(run.path), "--deadline", "1"]) == 0
    assert f"pipelines/replay_metrics.py {run.path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "8"], "'8' is not A:B"),
        (["--steps", "8:12:2"], "'8:12:2' is not A:B"),
        (["--steps", "-1:4"], "expected one argument"),
        (["--steps", "8:13"], "8:13 is not within this run, which has steps 0:12"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_arguments_are_refused(trained_run, words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        main([str(trained_run), *words])


def test_missing_run_and_run_without_checkpoints_are_refused(run):
    with pytest.raises(UserError, match="'no-such-run': there is no run"):
        main(["no-such-run"])
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UserError, match="this run has lost its checkpoints"):
        main([str(run.path)])
    assert not run.replays.exists()


def test_run_in_progress_is_refused(run):
    with lock.held(run.driver_lock), pytest.raises(HeldError, match="held by process"):
        main([str(run.path)])
