"""Killed = never killed, one worker = two = four: weights, moments and every logged loss, to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.runs import journal, metrics
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker

HELPER = Path(__file__).resolve().parent.parent / "helpers" / "train_rank.py"
SMALL = [
    "name=small",
    "data.tokenizer=char",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=16",
    "train.max_steps=24",
    "train.log_interval=5",
    "train.eval_interval=8",
    "train.eval_tokens=1500",
    "train.checkpoint_interval=4",
    "schedule.max_lr=1e-2",
]


def start(
    run_dir: Path, data_dir: Path, overrides: list[str], world_size: int = 1
) -> list[subprocess.Popen]:
    """Real processes, one per rank."""
    run_dir.mkdir(parents=True, exist_ok=True)
    store = run_dir.parent / f"store-{uuid.uuid4().hex}"
    jobs = [
        {
            "rank": r,
            "world_size": world_size,
            "store": str(store),
            "run_dir": str(run_dir),
            "data_dir": str(data_dir),
            "overrides": overrides,
        }
        for r in range(world_size)
    ]
    return [
        subprocess.Popen(
            [sys.executable, str(HELPER), json.dumps(job)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for job in jobs
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    assert [p.wait(120) for p in processes] == [0] * len(processes)


def run_here(run_dir: Path, data_dir: Path, overrides: list[str]) -> int:
    run_dir.mkdir(parents=True, exist_ok=True)
    return train(load_experiment(None, overrides), RunFolder(run_dir), data_dir, Worker(cpus=1))


def outcome(run_dir: Path) -> dict:
    """Everything of a run that must not depend on how it got there: every logged loss, and the final state."""
    curve = [metrics.exact_part(r) for r in journal.read(RunFolder(run_dir))]
    last = checkpoint.latest_valid(run_dir / "checkpoints")
    parts = {
        name: (last / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    }
    return {"curve": curve, "step": last.name, **parts}


@pytest.fixture(scope="module")
def golden(tiny_dataset, tmp_path_factory) -> dict:
    """The uninterrupted run on one worker."""
    run_dir = tmp_path_factory.mktemp("golden") / "small"
    run_here(run_dir, tiny_dataset, SMALL)
    return outcome(run_dir)


def test_training_lowers_the_loss_and_logs_every_interval(golden):
    losses = [r["train/loss"] for r in golden["curve"] if "train/loss" in r]
    assert losses[-1] < losses[0] - 0.3
    assert [r["step"] for r in golden["curve"]] == [0, 5, 8, 10, 15, 16, 20, 24]


@pytest.mark.parametrize("world_size", [2, 4])
def test_more_workers_make_the_same_bits(golden, tiny_dataset, tmp_path, world_size):
    finish(start(tmp_path / "small", tiny_dataset, SMALL, world_size))
    assert outcome(tmp_path / "small") == golden


def test_killed_on_two_workers_and_resumed_on_one_equals_never_killed(
    golden, tiny_dataset, tmp_path
):
    processes = start(tmp_path / "small", tiny_dataset, SMALL, 2)
    deadline = time.monotonic() + 60
    while (
        time.monotonic() < deadline
        and max(checkpoint.steps(tmp_path / "small" / "checkpoints"), default=0) < 8
    ):
        time.sleep(0.01)
    for p in processes:
        p.send_signal(signal.SIGKILL)
    assert {p.wait(30) for p in processes} == {-signal.SIGKILL}, (
        "the run ended before it could be killed"
    )
    assert run_here(tmp_path / "small", tiny_dataset, SMALL) == 24
    assert outcome(tmp_path / "small") == golden


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_cut_between_checkpoints_goes_on_to_the_same_bits(tiny_dataset, tmp_path, dtype):
    overrides = [*SMALL, f"train.dtype={dtype}", "schedule.decay_steps=24"]
    run_here(tmp_path / "whole", tiny_dataset, overrides)
    run_here(tmp_path / "cut", tiny_dataset, [*overrides, "train.max_steps=10"])
    last = checkpoint.path_of(tmp_path / "cut" / "checkpoints", 10)
    last.rename(
        last.with_name(".gone")
    )  # as if killed after step 8 was committed and step 10 was not
    run_here(tmp_path / "cut", tiny_dataset, overrides)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_checkpoint_with_a_flipped_bit_is_passed_over(golden, tiny_dataset, tmp_path, capsys):
    run_here(
        tmp_path / "small", tiny_dataset, [*SMALL, "schedule.decay_steps=24", "train.max_steps=12"]
    )
    file = checkpoint.path_of(tmp_path / "small" / "checkpoints", 12) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    run_here(tmp_path / "small", tiny_dataset, SMALL)
    assert "skipped: " in capsys.readouterr().out
    assert outcome(tmp_path / "small") == golden


def test_what_a_step_sees_does_not_depend_on_logging_or_evaluation(golden, tiny_dataset, tmp_path):
    run_here(
        tmp_path / "small",
        tiny_dataset,
        [*SMALL, "train.eval_interval=null", "train.log_interval=null"],
    )
    last = checkpoint.latest_valid(tmp_path / "small" / "checkpoints")
    assert (last / "model.safetensors").read_bytes() == golden["model.safetensors"]


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_dataset, tmp_path):
    overrides = [*SMALL, "train.log_interval=1", "schedule.max_lr=1e38", "optim.max_grad_norm=null"]
    done = run_here(tmp_path / "small", tiny_dataset, overrides)
    stopped = json.loads((tmp_path / "small" / "stopped.json").read_text())
    assert done == stopped["step"] < 24
    assert f"step {done + 1}" in stopped["reason"]
    assert stopped["windows"]
    assert journal.read(RunFolder(tmp_path / "small"))[-1]["step"] == done


def test_a_run_that_is_done_takes_no_step(golden, tiny_dataset, tmp_path):
    run_here(tmp_path / "small", tiny_dataset, SMALL)
    before = journal.read(RunFolder(tmp_path / "small"))
    assert run_here(tmp_path / "small", tiny_dataset, SMALL) == 24
    assert journal.read(RunFolder(tmp_path / "small")) == before
    assert outcome(tmp_path / "small") == golden


def test_accumulated_micro_batches_make_the_step_of_the_whole_batch(tiny_dataset, tmp_path):
    base = [
        *SMALL,
        "model.dropout=0",
        "train.max_steps=3",
        "train.log_interval=1",
        "train.eval_interval=null",
    ]
    run_here(tmp_path / "accumulated", tiny_dataset, base)
    run_here(tmp_path / "whole", tiny_dataset, [*base, "train.micro_batch_size=16"])
    ours, reference = (
        checkpoint.load_tensors(checkpoint.latest_valid(tmp_path / d / "checkpoints"), "optimizer")
        for d in ("accumulated", "whole")
    )
    for name in ours:
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-3, atol=1e-5)


def test_samples_are_written_at_every_evaluation(golden, tiny_dataset, tmp_path):
    run_here(tmp_path / "small", tiny_dataset, SMALL)
    names = sorted(p.name for p in (tmp_path / "small" / "samples").iterdir())
    assert names == [f"step-{s:08d}.txt" for s in (0, 8, 16, 24)]
