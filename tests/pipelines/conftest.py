"""Fixtures for tests of the commands: a small trained run, and a function that runs a command."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.config.experiment import load_experiment
from orchestrator.errors import EXIT_DONE
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from tests.helpers import small_run
from tests.helpers.threads import one_thread  # noqa: F401 - used by all tests here

REPO = Path(__file__).resolve().parent.parent.parent
SMALL = [
    "data.tokenizer=char",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "model.pad_vocab_to=16",
    "train.micro_batch_size=4",
    "train.global_batch_size=4",
    "train.max_steps=12",
    "train.log_interval=1",
    "train.eval_interval=4",
    "train.checkpoint_interval=4",
    "train.keep=3",
    "schedule.max_lr=3e-3",
    "compute.use_gpu=false",
]


@pytest.fixture(scope="session")
def trained_run(tiny_corpus, tiny_dataset, tmp_path_factory) -> Path:
    """A run of 12 steps in `<storage>/tiny`, with an evaluation and a checkpoint every 4 steps."""
    run_dir = tmp_path_factory.mktemp("storage") / "tiny"
    run_dir.mkdir()
    experiment = load_experiment(
        None, ["name=tiny", f"data.corpus={tiny_corpus}", f"data.dir={tiny_dataset}", *SMALL]
    )
    before = torch.get_num_threads()
    train(experiment, RunFolder(run_dir), tiny_dataset, Worker(cpus=1))
    torch.set_num_threads(before)
    return run_dir


@pytest.fixture(scope="session")
def golden(tiny_corpus, tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of an undisturbed run in this process, without Ray."""
    storage = tmp_path_factory.mktemp("golden")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert small_run.run_here(storage, tiny_corpus) == EXIT_DONE
    return storage / "small", out.getvalue()


@pytest.fixture
def damaged_run(trained_run, tmp_path) -> Path:
    """A copy of the run with one flipped bit in its last checkpoint."""
    copy = tmp_path / "damaged"
    shutil.copytree(trained_run, copy)
    part = copy / "checkpoints" / "step-00000012" / "model.safetensors"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    return copy


@pytest.fixture(scope="session")
def type_command():
    """Return a function that runs `pipelines/<script>` and returns the finished process."""

    def run(script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(REPO / "pipelines" / script), *map(str, args)],
            text=True,
            capture_output=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )

    return run
