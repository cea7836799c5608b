"""Files that a YAML file names: those of a stranger are refused, and the user's own are run."""

import shutil
from pathlib import Path

import pytest

from orchestrator import own_files
from orchestrator.config.experiment import load_experiment
from orchestrator.config.load import kind_of_model
from orchestrator.errors import UserError

HERE = Path(__file__).parent


@pytest.fixture
def folder(tmp_path, monkeypatch, stranger) -> Path:
    """A current folder with files and a run; no file has been run before."""
    current = tmp_path / "current"
    for place in ("mine", "archive/run/checkpoints/step-1", "../outside"):
        (current / place).mkdir(parents=True)
        shutil.copyfile(HERE / "conv.py", current / place / "conv.py")
    (current / "archive" / "run" / "experiment.yaml").touch()
    shutil.copyfile(HERE / "conv.py", current / "archive" / "conv.py")
    (current / "mine" / "link.py").symlink_to(tmp_path / "outside" / "conv.py")
    monkeypatch.chdir(current)
    stranger()
    return current


def written(yaml: str, file: str | Path) -> str:
    Path(yaml).write_text(f"model: {{kind: {file}:GatedConv}}\n")
    return yaml


@pytest.mark.parametrize(
    ("yaml", "file"),
    [
        ("archive/run/experiment.yaml", "archive/run/checkpoints/step-1/conv.py"),
        ("archive/run/experiment.yaml", "archive/conv.py"),
        ("archive/run/checkpoints/step-1/mine.yaml", "mine/conv.py"),
        ("mine.yaml", "archive/run/checkpoints/step-1/conv.py"),
        ("mine.yaml", "../outside/conv.py"),
        ("mine.yaml", "mine/link.py"),
    ],
)
def test_file_that_may_be_a_strangers_is_not_run(yaml, file, folder, stranger):
    written(yaml, file)
    for load in (load_experiment, kind_of_model):
        with pytest.raises(UserError, match="give --trust-code to run it") as refused:
            load(yaml, [])
        assert str(refused.value).startswith(f"{yaml}: model.kind=")
    assert load_experiment(yaml, ["model.kind=gpt2"]).model.kind == "gpt2"
    own_files.trust_copies()
    assert load_experiment(yaml, []).own_kinds
    stranger()
    assert load_experiment(None, [f"model.kind={file}:GatedConv"]).own_kinds
    assert load_experiment(yaml, []).own_kinds  # it was run before


@pytest.mark.parametrize("yaml", ["mine/my.yaml", "my.yaml", "../outside/my.yaml"])
def test_file_in_the_current_folder_is_run(yaml, folder):
    assert load_experiment(written(yaml, "mine/conv.py"), []).own_kinds


def test_file_on_the_command_line_is_run_also_with_a_strangers_yaml(folder):
    yaml = written("archive/run/experiment.yaml", "archive/conv.py")
    Path("mine/conv.py").write_text((HERE / "conv.py").read_text() + "# mine\n")
    assert load_experiment(yaml, ["model.kind=mine/conv.py:GatedConv"]).own_kinds
    with pytest.raises(UserError, match="--trust-code"):
        load_experiment(yaml, [])
