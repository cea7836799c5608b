"""The estimate of memory holds for each kind of model and optimizer, also for a user's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.layout import WORKER_ENVIRONMENT, Layout
from orchestrator.config.experiment import load_experiment
from orchestrator.cost.bench import RAY_GIB
from orchestrator.cost.measure import time_worker
from orchestrator.cost.timing import Timing
from orchestrator.data.dataset import load_manifest

REPO = Path(__file__).resolve().parents[2]
FILES = REPO / "tests" / "own"
SHAPE = ["model.n_layer=4", "model.n_head=4", "model.n_embd=512"]
KINDS = {
    "gpt2 and adamw": SHAPE,
    "modern and muon": ["model.kind=modern", "optim.kind=muon", *SHAPE],
    "own": [
        f"model.kind={FILES}/conv.py:GatedConv",
        f"optim.kind={FILES}/lion.py:lion",
        "model.width=1024",
        "model.n_layer=6",
    ],
}
WORDS = [
    "data.tokenizer=char",
    "model.block_size=64",
    "train.dtype=float32",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "train.max_steps=2",
    "train.eval_interval=2",
    "train.eval_tokens=500",
    "train.sample_tokens=2",
    "train.checkpoint_interval=1",
]
RUN = """
import json, sys
from pathlib import Path
from orchestrator.config.experiment import load_experiment
from orchestrator.cost.bench import peak_gib
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
folder, tokens, words = json.loads(sys.argv[1])
train(load_experiment(None, words), RunFolder(folder), Path(tokens), Worker(cpus=1))
print(peak_gib("cpu"))
"""


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "own" else pytest.mark.slow) for k in KINDS]
)
def test_expected_memory_is_within_a_fifth_of_that_of_a_run(kind, tiny_dataset, tmp_path):
    words = [*WORDS, *KINDS[kind]]
    n_vocab = load_manifest(tiny_dataset).tokenizer["n_vocab"]
    layout = Layout(num_workers=1, cpus_per_worker=1, use_gpu=False)
    expected = time_worker(load_experiment(None, words), n_vocab, layout, 300.0, timed_s=0)
    assert isinstance(expected, Timing), expected
    job = json.dumps([str(tmp_path), str(tiny_dataset), words])
    run = subprocess.run(
        [sys.executable, "-c", RUN, job],
        cwd=REPO,
        env={**os.environ, **WORKER_ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    seen = float(run.stdout.split()[-1])
    assert seen > RAY_GIB + 0.25 + 0.2  # the state and the activations, not only the libraries
    assert expected.memory_gib == pytest.approx(seen, rel=0.2)
