"""Runs `pipelines/train.py` on a small experiment, and reads its files."""

import atexit
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from tests.helpers import warm
from tests.helpers.curves import exact_part
from tests.helpers.local_job import LocalTrainJob, without_ray
from tests.helpers.wait import wait_until

REPO = Path(__file__).resolve().parent.parent.parent
STEPS = 60


def command(storage: Path, corpus: Path, *overrides: str) -> list[str]:
    """Return the command of a run of some seconds, long enough to kill it before its end."""
    return [
        sys.executable,
        str(REPO / "pipelines" / "train.py"),
        str(REPO / "tests" / "helpers" / "small.yaml"),
        f"storage={storage}",
        f"data.corpus={corpus}",
        "data.tokenizer=char",
        "name=small",
        "model.n_layer=2",
        "model.n_head=2",
        "model.n_embd=64",
        "model.block_size=64",
        "model.dropout=0.1",
        "model.pad_vocab_to=1",
        "train.micro_batch_size=4",
        "train.global_batch_size=16",
        f"train.max_steps={STEPS}",
        "train.log_interval=5",
        "schedule.warmup_steps=10",
        "train.eval_interval=30",
        "train.checkpoint_interval=10",
        "train.eval_tokens=2000",
        "compute.cpus_per_worker=1",
        *overrides,
    ]


@functools.cache
def misleading_folder() -> Path:
    """Return a folder, such as a checkout of nanoGPT, with modules that no command may import."""
    folder = Path(tempfile.mkdtemp(prefix="espalier-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("model", "train", "orchestrator", "pipelines", "numpy", "torch", "ray", "random"):
        (folder / f"{name}.py").write_text("raise SystemExit('a module of the current folder')")
    return folder


def begin(ray_head, storage: Path, corpus: Path, *overrides: str, **env: str) -> warm.Process:
    """Start the command, on a head of `cluster.head`."""
    words = command(storage, corpus, *overrides)[1:]
    return warm.Process(words, {**ray_head.env, **env}, misleading_folder())


def run(
    ray_head, storage: Path, corpus: Path, *overrides: str, status: int = 0
) -> subprocess.CompletedProcess:
    process = begin(ray_head, storage, corpus, *overrides)
    out, err = process.communicate(240)
    assert process.returncode == status, out + err
    return subprocess.CompletedProcess(process.words, status, out, err)


def run_here(storage: Path, corpus: Path, *overrides: str) -> int:
    """Do the run of `command` in this process, without Ray. Return the exit status."""
    file, *words = command(storage, corpus, *overrides)[2:]
    with without_ray():
        return LocalTrainJob(load_experiment(file, words)).run()


def curve(run_dir: Path) -> list[dict]:
    return [exact_part(r) for r in journal.read(RunFolder(run_dir))]


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def logged(run_dir: Path) -> int:
    """Return the last step of the journal; -1 if it has none."""
    return (journal.last(RunFolder(run_dir)) or {"step": -1})["step"]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Wait for a checkpoint of that step or a later one."""
    wait_until(lambda: max(checkpoint.steps(run_dir / "checkpoints"), default=0) >= step, process)
