"""An exported model loads in ten lines without this project, and gives the same logits."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from orchestrator.checkpoint.store import Content
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.train.state import load_model
from pipelines.export import libraries_of, main, write_code, write_mlmodel
from tests.helpers.local_job import LocalTrainJob, without_ray
from tests.pipelines.conftest import SMALL

REPO = Path(__file__).resolve().parents[2]
OWN = REPO / "tests" / "own"
SIZE = ["model.n_layer=1", "model.block_size=16", "model.pad_vocab_to=16"]
KINDS = {
    "gpt2": [*SIZE, "model.n_head=2", "model.n_embd=16"],
    "modern": ["model.kind=modern", *SIZE, "model.n_head=2", "model.n_embd=16"],
    "own": [f"model.kind={OWN}/conv.py:GatedConv", *SIZE, "model.width=16"],
}
# A Python without this project: neither its path nor its editable installation.
ALONE = """
import sys
sys.path[:] = [p for p in sys.path if p not in ("", REPO)]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]
sys.path.insert(0, FOLDER)
import numpy
import torch
from load import load
tokens = torch.from_numpy(numpy.load(FOLDER + "/tokens.npy"))
numpy.save(FOLDER + "/logits.npy", load()(tokens).detach().numpy())
files = [str(getattr(module, "__file__", "")) for module in sys.modules.values()]
assert not [file for file in files if file.startswith(REPO) and ".venv" not in file]
"""


FACTORY = """
import numpy
import safetensors.numpy
import yaml
def make(number):
    class Inner(GatedConv):
        pass
    return Inner
Deep = make(3)
"""


def test_class_of_another_name_loads_alone_with_its_libraries(tmp_path):
    (tmp_path / "deep.py").write_text((OWN / "conv.py").read_text() + FACTORY)
    experiment = load_experiment(None, [f"model.kind={tmp_path}/deep.py:Deep", *SIZE])
    found = SimpleNamespace(experiment=experiment)
    folder = tmp_path / "exported" / "code"
    folder.parent.mkdir()
    load = write_code(found, folder)
    assert "import Deep\n" in load
    assert "Deep(Deep.Config(" in load
    libraries = libraries_of(found)
    assert libraries == ["PyYAML", "numpy"]
    write_mlmodel(folder.parent, libraries)
    lines = (folder.parent / "requirements.txt").read_text().split()
    assert f"PyYAML=={yaml.__version__}" in lines
    assert len(lines) == 5


def trained(name: str, data: Path, folder: Path) -> Path:
    train_words = [word for word in SMALL if not word.startswith("model.")]
    words = [
        "name=run",
        *train_words,
        *KINDS[name],
        "train.max_steps=4",
        "train.eval_interval=null",
    ]
    run = RunFolder(folder / "run")
    run.path.mkdir()
    train(load_experiment(None, words), run, data, Worker(cpus=1))
    return run.path


@pytest.mark.parametrize("name", ["gpt2", pytest.param("modern", marks=pytest.mark.slow), "own"])
def test_exported_model_gives_the_same_logits_alone(name, tiny_dataset, tmp_path, capsys):
    run = trained(name, tiny_dataset, tmp_path)
    folder = tmp_path / "exported"
    assert main([str(run), str(folder)]) == 0
    load = (folder / "load.py").read_text()
    assert len(load.splitlines()) == 10
    assert load in (folder / "README.md").read_text()

    tokens = torch.arange(20).view(2, 10) % 16
    np.save(folder / "tokens.npy", tokens.numpy())
    program = ALONE.replace("REPO", repr(str(REPO))).replace("FOLDER", repr(str(folder)))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load_model(Content(run / "checkpoints" / "step-00000004"))(tokens)
    assert np.array_equal(np.load(folder / "logits.npy"), expected.numpy())


def test_exported_model_is_a_model_of_mlflow(
    tiny_corpus, tiny_dataset, tmp_path, capsys, monkeypatch
):
    words = [word for word in SMALL if not word.startswith("model.")]
    words += [f"storage={tmp_path}", f"data.corpus={tiny_corpus}", f"data.dir={tiny_dataset}"]
    experiment = load_experiment(None, ["name=run", *words, *KINDS["own"], "train.max_steps=4"])
    with without_ray():
        assert LocalTrainJob(experiment).run() == 0
    folder = tmp_path / "exported"
    capsys.readouterr()
    assert main([str(tmp_path / "run"), str(folder), "--mlflow"]) == 0
    [model] = re.findall(r"models:/[\w-]+", capsys.readouterr().out)

    import mlflow

    tokens = torch.arange(20).view(2, 10) % 16
    with torch.no_grad():
        content = Content(tmp_path / "run" / "checkpoints" / "step-00000004")
        expected = load_model(content)(tokens)[:, 0]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    for uri in (str(folder), model):
        found = mlflow.pyfunc.load_model(uri).predict(tokens.numpy())
        assert np.array_equal(found, expected.numpy())


def test_folder_that_exists_is_refused_and_nothing_is_left_after_an_error(trained_run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists; name a folder that does not"):
        main([str(trained_run), str(tmp_path / "there")])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x: cannot be created"):
        main([str(trained_run), str(tmp_path / "file" / "x")])
    with pytest.raises(UserError, match="FOLDER: 's3://bucket/x' is an address"):
        main([str(trained_run), "s3://bucket/x"])
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    for file in run.glob("checkpoints/*/experiment.yaml"):
        file.unlink()
    with pytest.raises(UserError):
        main([str(run), str(tmp_path / "new")])
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file", "run"}
