"""A word that names no model is refused before torch is imported, with what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.train.find import has_checkpoint, is_model
from pipelines import replay_metrics
from pipelines.evaluate import options

REPO = Path(__file__).resolve().parents[2]
REFUSED = """
import contextlib, io, json, runpy, sys
ends = []
for command, *words in json.loads(sys.argv[1]):
    sys.argv = [f"pipelines/{command}.py", *words]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        ends.append([end.code, "torch" in sys.modules, errors.getvalue()])
print(json.dumps(ends))
"""
MODELS = {"sample": [], "evaluate": [], "export": ["exported"], "replay": []}


@pytest.fixture
def storage(tmp_path) -> Path:
    """A storage with a folder that is no run, a sweep, and a run without a checkpoint."""
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    sweep = SweepFolder(tmp_path / "sweep")
    for name in ("b", "a"):
        sweep.trial(name).path.mkdir(parents=True)
    sweep.sweep_file.touch()
    early = RunFolder(tmp_path / "early")
    early.path.mkdir()
    early.run_file.touch()
    return tmp_path


def test_word_that_names_no_model_is_refused_before_torch_is_imported(storage):
    no_run = "the folder of a run, or its name in the storage ($ESPALIER_STORAGE)"
    nowhere = f"'absent': there is no run at {REPO}/absent or {storage}/absent; give {no_run}"
    said = {
        "absent": nowhere,
        "other": f"'other': {storage}/other is not the folder of a run; give {no_run}",
        "file": f"'file': {storage}/file is not the folder of a run; give {no_run}",
        "sweep": f"{storage}/sweep: is a sweep; give one of its trials, such as "
        f"{storage}/sweep/trials/a",
        "early": f"{storage}/early: this run has no checkpoint yet; continue it until its first "
        "one (train.checkpoint_interval)",
    }
    expected = {
        (command, word, *more): line
        for command, more in MODELS.items()
        for word, line in said.items()
    }
    for word in ("sweep", "early"):
        field = f"train.init_from={storage}/{word}"
        expected["inspect_batch", field] = f"train.init_from: {said[word]}"
    expected["inspect_batch", "absent.yaml"] = "absent.yaml: cannot be read as an experiment"
    ended = subprocess.run(
        [sys.executable, "-c", REFUSED, json.dumps(list(expected))],
        cwd=REPO,
        env={"ESPALIER_STORAGE": str(storage)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    for words, (status, has_torch, error) in zip(expected, json.loads(ended.stdout), strict=True):
        assert (status, has_torch, error.count("\n")) == (2, False, 1), words
        assert error.startswith(f"error: {expected[words]}"), words


def test_folder_that_is_no_run_is_not_sent(storage, monkeypatch):
    monkeypatch.setenv("ESPALIER_STORAGE", str(storage))
    with pytest.raises(UserError, match="'other': .* is not the folder of a run"):
        replay_metrics.main(["other"])


def test_checkpoint_and_run_are_told_apart(trained_run, storage):
    run = RunFolder(trained_run)
    checkpoint = RunFolder(run.checkpoint(12))
    assert [is_model(run), is_model(checkpoint)] == [True, True]
    assert [has_checkpoint(run), has_checkpoint(checkpoint)] == [True, False]
    assert not is_model(RunFolder(storage / "other"))
    early = RunFolder(storage / "early")
    early.checkpointed_file.touch()
    with pytest.raises(UserError, match="early: this run has lost its checkpoints; restore them"):
        is_model(early)
    with pytest.raises(UserError, match="is a sweep"):
        is_model(RunFolder(storage / "sweep"))


def test_override_may_follow_an_option(trained_run):
    args = options().parse_intermixed_args(["tiny", "--best", "data.dir=x"])
    assert (args.model, args.overrides) == ("tiny", ["data.dir=x"])
