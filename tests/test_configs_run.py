"""Every experiment in configs/ prepares its tokens and trains, shortened by overrides."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.gpt import GPT
from model.weights import config_to_huggingface, to_huggingface
from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
SWEEPS = [path for path in CONFIGS if path.name.startswith("sweep-")]
SMALL = [
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "train.max_steps=2",
    "train.log_interval=1",
    "train.eval_tokens=200",
    "schedule.warmup_steps=1",
    "compute.num_workers=1",
    "train.compile=false",
]  # torch.compile takes a minute on a CPU


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path not in SWEEPS], ids=lambda p: p.stem
)
def test_config_prepares_and_trains(path, ray_cluster, tiny_corpus, tmp_path, request):
    words = [*SMALL, f"storage={tmp_path}"]
    shipped = load_experiment(path)
    if shipped.data.corpus != "builtin:stdlib":
        words.append(f"data.corpus={tiny_corpus}")
    if shipped.data.split == "hash":
        words.append("data.val_fraction=0.5")
        words[-2] = f"data.corpus={_documents(tiny_corpus, tmp_path / 'documents')}"
    if shipped.data.tokenizer == "gpt2":
        request.getfixturevalue("gpt2_ranks")
    if shipped.train.init_from == "gpt2":
        folder = _hugging_face_folder(load_experiment(path, words), tmp_path / "weights")
        words.append(f"train.init_from={folder}")
    experiment = load_experiment(path, words)
    data_dir = dataset_dir(experiment.data, tmp_path)
    prepare(experiment.data, data_dir)
    (tmp_path / "run").mkdir()
    assert train(experiment, RunFolder(tmp_path / "run"), data_dir, Worker(cpus=1)) == 2
    assert [r["step"] for r in journal.read(RunFolder(tmp_path / "run"))] == [0, 1, 2]
    assert checkpoint.latest_valid(tmp_path / "run" / "checkpoints") is not None


def _documents(corpus: Path, folder: Path) -> Path:
    """Write the corpus as twenty files, for a split by documents."""
    folder.mkdir()
    text = corpus.read_text()
    for i in range(20):
        (folder / f"{i}.txt").write_text(text[i * 2000 : (i + 1) * 2000] + str(i))
    return folder


def _hugging_face_folder(experiment, folder: Path) -> Path:
    """Write random weights in place of OpenAI's, which would be downloaded."""
    folder.mkdir()
    torch.manual_seed(0)
    model = GPT(experiment.gpt_config(50257))
    save_file(
        {k: v.contiguous() for k, v in to_huggingface(model.state_dict()).items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(model.config)), "utf-8")
    assert asdict(model.config)["activation"] == "gelu_tanh"
    return folder
