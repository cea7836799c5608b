"""Every experiment in configs/ prepares its tokens and trains, shortened by overrides."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.gpt import GPT
from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from tests.helpers.here import here
from tests.helpers.huggingface import config_to_huggingface, to_huggingface

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
    "train.compile=false",  # it takes a minute on a CPU
]


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path not in SWEEPS], ids=lambda p: p.stem
)
def test_config_prepares_and_trains(path, tiny_corpus, tmp_path, request):
    shipped = load_experiment(path)
    # As many micro-batches as shipped, of one sequence each.
    batch = ["train.micro_batch_size=1", f"train.global_batch_size={shipped.micro_batches}"]
    words = [*SMALL, *batch, f"storage={tmp_path}"]
    if shipped.data.split == "hash":
        documents = _write_documents(tiny_corpus, tmp_path / "documents")
        words += [f"data.corpus={documents}", "data.val_fraction=0.5"]
    elif shipped.data.corpus == "builtin:stdlib":  # a part of it
        words.append(f"data.corpus={Path(argparse.__file__).parent}/a*.py")
    else:
        words.append(f"data.corpus={tiny_corpus}")
    if shipped.data.tokenizer == "gpt2":
        request.getfixturevalue("gpt2_ranks")
    if shipped.train.init_from == "gpt2":
        weights = tmp_path / "weights"
        _write_hugging_face_weights(load_experiment(path, words), weights)
        words.append(f"train.init_from={weights}")
    experiment = load_experiment(path, words)
    data_dir = dataset_dir(experiment.data, tmp_path)
    with here():
        prepare(experiment.data, data_dir)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    assert train(experiment, folder, data_dir, Worker(cpus=1)) == 2
    assert [line["step"] for line in journal.read(folder)] == [0, 1, 2]
    assert checkpoint.latest_valid(folder.checkpoints) is not None


def _write_documents(corpus: Path, folder: Path) -> Path:
    """Write the corpus as twenty files, for a split by documents."""
    folder.mkdir()
    text = corpus.read_text()
    for i in range(20):
        (folder / f"{i}.txt").write_text(text[i * 2000 : (i + 1) * 2000] + str(i))
    return folder


def _write_hugging_face_weights(experiment: Experiment, folder: Path) -> None:
    """Write random weights in place of OpenAI's, which would be downloaded."""
    folder.mkdir()
    torch.manual_seed(0)
    model = GPT(experiment.model_config_for(50257))
    tensors = to_huggingface(model.state_dict())
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(model.config)), "utf-8")
    assert model.config.activation == "gelu_tanh"
