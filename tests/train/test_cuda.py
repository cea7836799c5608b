"""On a GPU: a resumed run has the same bits; out of memory names a micro-batch that fits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.data import shards
from orchestrator.data.dataset import write_manifest
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.files import file_sha256
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from tests.helpers.curves import exact_part

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = [
    "data.tokenizer=byte",
    "model.n_layer=4",
    "model.n_head=4",
    "model.n_embd=256",
    "model.block_size=256",
    "model.dropout=0.1",
    "train.micro_batch_size=4",
    "train.global_batch_size=16",
    "train.max_steps=30",
    "train.log_interval=1",
    "train.eval_interval=10",
    "train.eval_tokens=20000",
    "train.checkpoint_interval=10",
    "train.keep=9",
    "schedule.max_lr=1e-3",
]
GPU = Worker(device="cuda:0")
RESUME = """
import sys
from pathlib import Path
from orchestrator.config.experiment import load_experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker

experiment = load_experiment(None, sys.argv[3:])
train(experiment, RunFolder(sys.argv[1]), Path(sys.argv[2]), Worker(device="cuda:0"))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Dataset of the bytes of this repository's sources, prepared without Ray."""
    folder, root = tmp_path_factory.mktemp("bytes"), Path(__file__).resolve().parents[2]
    text = b"".join(p.read_bytes() for p in sorted(root.glob("orchestrator/**/*.py")))
    splits = {}
    for name, part in {"train": text[:-40000], "val": text[-40000:]}.items():
        ids = np.frombuffer(part, np.uint8).astype(np.uint16)
        padded = np.concatenate([ids, np.zeros(-len(ids) % 1024, np.uint16)])
        path = folder / f"{name}-00000.parquet"
        rows = shards.write_shard(path, padded.dtype, [padded])
        entry = {"name": path.name, "rows": rows, "tokens": len(ids), "sha256": file_sha256(path)}
        splits[name] = {
            "tokens": len(ids),
            "documents": 1,
            "bytes": len(ids),
            "stream_sha256": name,
            "shards": [entry],
        }
    tokenizer = load_tokenizer("byte")
    tokenizer.save(folder)
    write_manifest(
        folder,
        {
            "dtype": "uint16",
            "settings": {},
            "sources": [],
            "splits": splits,
            "tokenizer": {"name": "byte", "n_vocab": tokenizer.n_vocab},
        },
    )
    return folder


def outcome(folder: RunFolder) -> tuple:
    last = store.latest_valid(folder.checkpoints)
    parts = [(last / f"{part}.safetensors").read_bytes() for part in ("model", "optimizer")]
    return last.name, parts, [exact_part(line) for line in journal.read(folder)]


@pytest.mark.parametrize(
    "words",
    [
        ["train.dtype=float32"],
        ["train.dtype=bfloat16"],
        ["train.dtype=float16"],
        ["train.dtype=bfloat16", "train.compile=true"],
    ],
    ids=" ".join,
)
def test_run_resumed_in_another_process_equals_uninterrupted_run(data, tmp_path, words):
    experiment = load_experiment(None, [*SMALL, *words])
    whole = RunFolder(tmp_path / "whole")
    cut = RunFolder(tmp_path / "cut")
    for folder in (whole, cut):
        folder.path.mkdir()
    train(experiment, whole, data, GPU)
    asked = iter([False] * 13 + [True] * 100)
    for _ in Trainer(experiment, cut, data, GPU, stop_requested=lambda: next(asked)).run():
        pass
    assert cut.read_ending().kind == "again"
    subprocess.run(
        [sys.executable, "-c", RESUME, cut, data, *SMALL, *words],
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert outcome(cut) == outcome(whole)


def test_out_of_memory_names_a_micro_batch_that_fits(data, tmp_path):
    from orchestrator.cluster.layout import Layout
    from orchestrator.workers import fitting, memory

    # 64 MiB of logits per sequence, and their gradients: 4096 sequences fit no GPU.
    words = [
        "model.block_size=1024",
        "model.pad_vocab_to=16384",
        "train.max_steps=1",
        "train.eval_interval=null",
    ]
    huge = load_experiment(
        None, [*SMALL, *words, "train.micro_batch_size=4096", "train.global_batch_size=4096"]
    )
    trainer = Trainer(huge, RunFolder(tmp_path), data, GPU)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        list(trainer.run())
    fault = memory.allocation_failed(str(caught.value), "here", 1)
    assert fault.of_gpu
    del trainer, caught
    torch.cuda.empty_cache()
    text = fitting.advice(fault, huge, 65, Layout(1, 1, True))
    size = int(text.partition(" fits in ")[0].rpartition("train.micro_batch_size=")[2])
    assert 1 <= size < 4096
    smaller = huge.replace(train__micro_batch_size=size)
    assert train(smaller, RunFolder(tmp_path), data, GPU) == 1
