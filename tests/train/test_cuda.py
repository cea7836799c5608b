"""On a GPU: the same bits after a stop, and an answer to memory that runs out. Skipped, and counted, where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data import shards
from orchestrator.data.dataset import write_manifest
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.files import file_sha256
from orchestrator.runs import journal, metrics
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker

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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Bytes of this repository's sources as a dataset, without Ray."""
    folder, root = tmp_path_factory.mktemp("bytes"), Path(__file__).resolve().parents[2]
    text = b"".join(p.read_bytes() for p in sorted(root.glob("orchestrator/**/*.py")))
    splits = {}
    for name, part in {"train": text[:-40000], "val": text[-40000:]}.items():
        ids = np.frombuffer(part, np.uint8).astype(np.uint16)
        padded = np.concatenate([ids, np.zeros(-len(ids) % 1024, np.uint16)])
        path = folder / f"{name}-00000.parquet"
        rows = shards.write_shard(path, np.uint16, [padded])
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


def outcome(run_dir: Path) -> tuple:
    last = checkpoint.latest_valid(run_dir / "checkpoints")
    losses = [metrics.exact_part(r) for r in journal.read(RunFolder(run_dir))]
    return (
        last.name,
        [(last / f"{part}.safetensors").read_bytes() for part in ("model", "optimizer")],
        losses,
    )


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
def test_stopped_and_resumed_in_another_process_equals_never_stopped(data, tmp_path, words):
    experiment = load_experiment(None, [*SMALL, *words])
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    train(experiment, RunFolder(tmp_path / "whole"), data, GPU)
    asked = iter([False] * 13 + [True] * 100)
    cut = RunFolder(tmp_path / "cut")
    for _ in Trainer(experiment, cut, data, GPU, stop_requested=lambda: next(asked)).run():
        pass
    assert json.loads((tmp_path / "cut" / "stopped.json").read_text())["again"]
    code = (
        "import sys; from pathlib import Path; from orchestrator.config.experiment import load_experiment\n"
        "from orchestrator.runs.folder import RunFolder; from orchestrator.train.numerics import Worker; from orchestrator.train.loop import train\n"
        "train(load_experiment(None, sys.argv[3:]), RunFolder(sys.argv[1]), Path(sys.argv[2]), Worker(device='cuda:0'))"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cut", data, *SMALL, *words],
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_memory_that_runs_out_is_answered_with_a_micro_batch_that_trains(data, tmp_path):
    from orchestrator.cluster.layout import Layout
    from orchestrator.workers import fitting, memory

    # 64 MiB of logits a sequence and their gradients: thousands of sequences fit no card.
    words = [
        "model.block_size=1024",
        "model.pad_vocab_to=16384",
        "train.max_steps=1",
        "train.eval_interval=null",
    ]
    huge = load_experiment(
        None, [*SMALL, *words, "train.micro_batch_size=4096", "train.global_batch_size=4096"]
    )
    run = Trainer(huge, RunFolder(tmp_path), data, GPU)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        list(run.run())
    fault = memory.allocation_failed(str(caught.value), "here", 1)
    assert fault.of_gpu
    del run, caught
    torch.cuda.empty_cache()
    text = fitting.advice(fault, huge, 65, Layout(1, 1, True))
    size = int(text.partition(" fits in ")[0].rpartition("train.micro_batch_size=")[2])
    assert 1 <= size < 4096
    fitting = load_experiment(
        None, [*SMALL, *words, f"train.micro_batch_size={size}", "train.global_batch_size=4096"]
    )
    assert train(fitting, RunFolder(tmp_path), data, GPU) == 1
