"""replay.py: verdict in the output, exit status, folder, events and MLflow."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.errors import HeldError, UserError
from orchestrator.runs import events, journal, lock
from orchestrator.runs.folder import RunFolder
from pipelines.replay import main

NUMBER = r"0x1\.\w+p\+1 \([\d.]+\)"


@pytest.fixture
def run_dir(trained_run, tmp_path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "storage" / "tiny"))


def nudge(run_dir: Path, step: int) -> None:
    """Change one logged loss by one unit in the last place."""
    lines = journal.read(RunFolder(run_dir))
    for line in lines:
        if line["step"] == step:
            line["train/loss"] = math.nextafter(line["train/loss"], 9.0)
    RunFolder(run_dir).journal_file.write_text(
        "".join(json.dumps(line) + "\n" for line in lines), "utf-8"
    )


def track(run_dir: Path):
    """Write run.json and experiment.yaml, as a driver does; return the experiment."""
    stored = RunFolder(run_dir / "checkpoints" / "step-00000012").read_experiment()
    (run_dir / "experiment.yaml").write_text(stored.to_yaml(), "utf-8")
    (run_dir / "run.json").write_text(
        json.dumps({"name": "tiny", "key": "a" * 32, "attempts": [{"from_step": 0}]}), "utf-8"
    )
    return stored


def own_files(run_dir: Path) -> dict[str, bytes]:
    """Return the content of all files that a replay must not change."""
    files = (
        path
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and "replays" not in path.parts
    )
    return {str(path): path.read_bytes() for path in files if path.name != "events.jsonl"}


def test_equal_replay_is_reported_and_removed(run_dir, capsys):
    before = own_files(run_dir)
    assert main([str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "4 logged lines of steps 8..12 equal, weights equal (step 12)" in said
    assert [int(step) for step in re.findall(r"^step +(\d+)/12", said, re.MULTILINE)] == [
        9,
        10,
        11,
        12,
    ]
    [kept] = (run_dir / "replays").iterdir()  # the repeated steps were removed
    verdict = json.loads(kept.read_text("utf-8"))
    assert (verdict["equal"], verdict["steps"], verdict["lines"], verdict["causes"]) == (
        True,
        [8, 12],
        4,
        [],
    )
    [event] = events.read(RunFolder(run_dir))
    assert (event["kind"], event["equal"], event["verdict"]) == (
        "replay",
        True,
        f"replays/{kept.name}",
    )
    assert own_files(run_dir) == before


def test_different_replay_is_reported_and_kept(run_dir, capsys):
    nudge(run_dir, 10)
    assert main([str(run_dir), "--steps", "9:"]) == 1
    said = capsys.readouterr().out
    assert re.search(
        f"first difference +step 10, train/loss: {NUMBER} then, {NUMBER} now, 1 ulp apart", said
    )
    assert re.search(r"cause +journal: weights and moments of step 12 are the same bits", said)
    folder, kept = sorted((run_dir / "replays").iterdir(), key=lambda path: path.suffix)
    assert checkpoint.steps(folder / "checkpoints") == [12]
    assert json.loads(kept.read_text("utf-8"))["first"]["ulps"] == 1


def test_keep_option_keeps_equal_replay(run_dir):
    assert main([str(run_dir), "--steps", "5:6", "--keep"]) == 0
    folder, _ = sorted((run_dir / "replays").iterdir(), key=lambda path: path.suffix)
    assert [line["step"] for line in journal.read(RunFolder(folder))] == [5, 6]


def test_verdict_is_sent_to_mlflow(run_dir, tmp_path, type_command, monkeypatch):
    from mlflow import MlflowClient

    uri, experiment = f"sqlite:///{tmp_path / 'mlflow.db'}", track(run_dir).tracking.experiment
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("ESPALIER_STORAGE", str(run_dir.parent))
    nudge(run_dir, 3)
    assert main(["tiny", "--steps", "4:12"]) == 0
    client = MlflowClient(uri)
    experiments = [client.get_experiment_by_name(experiment).experiment_id]
    [run] = client.search_runs(experiments, "tags.`replay.equal` = 'true'")
    assert run.data.tags["replay.verdict"].startswith("8 logged lines of steps 4..12 equal")
    done = type_command("replay.py", "tiny", "--steps", ":")
    assert (done.returncode, done.stderr) == (1, "")
    [run] = client.search_runs(experiments, "tags.`replay.equal` = 'false'")
    assert run.data.tags["replay.verdict"].startswith(
        "steps 0..12 differ, first at step 3, train/loss: 0x"
    )
    assert run.data.tags["events.replay"] == "2"
    names = [file.path for file in client.list_artifacts(run.info.run_id, "replays")]
    assert names == [
        f"replays/{path.name}" for path in sorted((run_dir / "replays").glob("*.json"))
    ]
    verdict = json.loads(
        Path(client.download_artifacts(run.info.run_id, names[1])).read_text("utf-8")
    )
    assert [cause["kind"] for cause in verdict["causes"]] == ["journal"]


def test_unreachable_server_does_not_change_verdict(run_dir, monkeypatch, capsys):
    track(run_dir)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main([str(run_dir), "--deadline", "1"]) == 0
    assert f"pipelines/replay_metrics.py {run_dir} sends it later" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "8"], "'8' is not A:B"),
        (["--steps", "8:12:2"], "'8:12:2' is not A:B"),
        (["--steps", "-1:4"], "expected one argument"),
        (["--steps", "8:13"], "8:13 is no stretch of this run, which has steps 0:12"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_argument_is_named(trained_run, words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        main([str(trained_run), *words])


def test_missing_run_and_missing_checkpoint_are_refused(tmp_path, run_dir):
    with pytest.raises(UserError, match="'nobody': there is no run"):
        main(["nobody"])
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        main([str(run_dir)])
    assert not (run_dir / "replays").exists()


def test_running_run_is_refused(run_dir):
    with (
        lock.held(RunFolder(run_dir).driver_lock),
        pytest.raises(HeldError, match="held by process"),
    ):
        main([str(run_dir)])
