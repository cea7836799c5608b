"""Symlinks, pipes and devices planted in a run folder are refused or replaced, never followed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import events, lock, stop
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.workers import attempts
from orchestrator.workers.watchdog import Watchdog

REPO = Path(__file__).resolve().parents[2]
SMALL = [
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=2",
    "train.max_steps=2",
    "train.eval_tokens=64",
    "train.eval_interval=1",
    "schedule.warmup_steps=0",
]


def hold(run_dir: Path) -> None:
    with lock.held(RunFolder(run_dir).driver_lock):
        pass


def watch(run_dir: Path) -> None:
    Watchdog(RunFolder(run_dir), Worker(), 30.0).close()


WRITES = {
    ".lock": hold,
    "stop.json": lambda run_dir: stop.clear(RunFolder(run_dir)),
    ".ranks/rank-0": watch,
    "hang-rank0.txt": watch,
    "metrics.jsonl": lambda run_dir: Journal(RunFolder(run_dir)).append(1, {"train/loss": 1.0}),
    "attempts.jsonl": lambda run_dir: attempts.start_workers_attempt(RunFolder(run_dir), "a", 1),
}


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file outside the run folder, which must not change."""
    file = tmp_path / "precious.txt"
    file.write_text("as it was")
    yield file
    assert file.read_text() == "as it was"


def plant(path: Path, kind: str, victim: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        missing = victim.with_name("not-yet")
        targets = {"link": victim, "dangling link": missing, "device": "/dev/null"}
        path.symlink_to(targets[kind])


@pytest.mark.parametrize("kind", ["link", "dangling link", "device", "pipe", "folder"])
@pytest.mark.parametrize("name", WRITES)
def test_planted_file_is_refused_and_not_followed(tmp_path, victim, name, kind):
    run_dir = tmp_path / "run"
    plant(run_dir / name, kind, victim)
    message = f"{name}: expected a plain file, found a symlink, folder or device"
    with pytest.raises(UserError, match=message):
        WRITES[name](run_dir)
    assert not victim.with_name("not-yet").exists()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_event_that_cannot_be_written_is_printed_and_does_not_end_the_run(
    tmp_path, victim, capsys, kind
):
    plant(tmp_path / "run" / "events.jsonl", kind, victim)
    events.note(RunFolder(tmp_path / "run"), "hang", "rank 1 hangs")
    assert "events.jsonl: expected a plain file" in capsys.readouterr().out


def test_run_folder_may_be_a_symlink_and_a_sample_replaces_a_planted_one(
    tmp_path, victim, tiny_dataset
):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk", target_is_directory=True)
    sample = tmp_path / "disk" / "samples" / "step-00000002.txt"
    plant(sample, "link", victim)
    for write in WRITES.values():
        write(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train(load_experiment(None, SMALL), RunFolder(tmp_path / "run"), tiny_dataset)
    assert not sample.is_symlink() and len(sample.read_text()) > 16


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_command_ends_with_one_line_and_does_not_wait(tmp_path, victim, kind):
    plant(tmp_path / "quickstart" / ".lock", kind, victim)
    done = subprocess.run(
        [sys.executable, str(REPO / "pipelines" / "train.py"), f"storage={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    lock_file = tmp_path / "quickstart" / ".lock"
    assert done.stderr.startswith(f"error: {lock_file}: expected a plain file")
    assert done.stderr.count("\n") == 1
