"""Weights, moments and logged losses have the same bits after resumes and with more workers."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from tests.helpers import train_rank
from tests.helpers.checkpoints import damage
from tests.helpers.curves import final_outcome as outcome
from tests.helpers.datasets import change_in_place

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


def new_folder(path: Path) -> RunFolder:
    path.mkdir()
    return RunFolder(path)


def exit_codes(processes) -> list[int | None]:
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def train_here(folder: RunFolder, data_dir: Path, *overrides: str) -> int:
    return train(load_experiment(None, [*SMALL, *overrides]), folder, data_dir, Worker(cpus=1))


@pytest.fixture(scope="module")
def golden(tiny_dataset, tmp_path_factory) -> dict:
    """Outcome of the uninterrupted run on one worker."""
    folder = new_folder(tmp_path_factory.mktemp("golden") / "small")
    train_here(folder, tiny_dataset)
    return outcome(folder)


def test_training_lowers_the_loss_and_logs_at_every_interval(golden):
    losses = [line["train/loss"] for line in golden["curve"] if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert [line["step"] for line in golden["curve"]] == [0, 5, 8, 10, 15, 16, 20, 24]


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_workers_have_the_same_bits_as_one(golden, tiny_dataset, folder, world_size):
    processes = train_rank.start(folder, tiny_dataset, SMALL, world_size)
    assert exit_codes(processes) == [0] * world_size
    assert outcome(folder) == golden


def test_run_killed_on_two_workers_and_resumed_on_one_equals_uninterrupted_run(
    golden, tiny_dataset, folder
):
    processes = train_rank.start(folder, tiny_dataset, SMALL, 2, killed_after=8)
    while max(folder.checkpoint_steps(), default=0) < 8:
        assert all(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
    assert exit_codes(processes) == [-signal.SIGKILL] * 2
    assert train_here(folder, tiny_dataset) == 24
    assert outcome(folder) == golden


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_run_killed_between_checkpoints_and_resumed_equals_uninterrupted_run(
    tiny_dataset, tmp_path, dtype
):
    words = [f"train.dtype={dtype}", "schedule.decay_steps=24"]
    whole = new_folder(tmp_path / "whole")
    cut = new_folder(tmp_path / "cut")
    train_here(whole, tiny_dataset, *words)
    train_here(cut, tiny_dataset, *words, "train.max_steps=10")
    # As if the run was killed between the checkpoints of the steps 8 and 10.
    store.remove(cut.checkpoint(10))
    train_here(cut, tiny_dataset, *words)
    assert outcome(cut) == outcome(whole)


def test_checkpoint_with_a_flipped_bit_is_skipped(golden, tiny_dataset, folder, capsys):
    train_here(folder, tiny_dataset, "schedule.decay_steps=24", "train.max_steps=12")
    damage(folder.checkpoint(12))
    train_here(folder, tiny_dataset)
    assert "skipped: " in capsys.readouterr().out
    assert outcome(folder) == golden


def test_weights_do_not_depend_on_logging_and_evaluation(golden, tiny_dataset, folder):
    train_here(folder, tiny_dataset, "train.eval_interval=null", "train.log_interval=null")
    weights = folder.checkpoint(24) / "model.safetensors"
    assert weights.read_bytes() == golden["model.safetensors"]


def test_best_loss_is_the_lowest_so_far(tiny_dataset, folder):
    train_here(
        folder, tiny_dataset, "schedule.max_lr=1", "train.eval_interval=2", "train.max_steps=8"
    )
    lines = [line for line in journal.read(folder) if "val/loss" in line]
    losses = [line["val/loss"] for line in lines]
    assert losses[-1] > min(losses), "the loss must also rise"
    lowest = [min(losses[: i + 1]) for i in range(len(losses))]
    assert [line["val/best_loss"] for line in lines] == lowest


def test_loss_that_is_not_finite_stops_before_the_update(tiny_dataset, folder):
    words = ["train.log_interval=1", "schedule.max_lr=1e38", "optim.max_grad_norm=null"]
    done = train_here(folder, tiny_dataset, *words)
    ending = folder.read_ending()
    assert done == ending.facts["step"] < 24
    assert f"step {done + 1}" in ending.reason
    assert ending.facts["windows"]
    assert journal.read(folder)[-1]["step"] == done


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train-00000.parquet", []),
        ("val-00000.parquet", []),
        ("train-00000.parquet", ["train.log_interval=null", "train.eval_interval=null"]),
    ],
)
def test_shard_changed_in_place_ends_the_run_before_its_next_line_and_checkpoint(
    tiny_dataset, tmp_path, name, words
):
    dataset = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    experiment = load_experiment(None, [*SMALL, *words])
    folder = new_folder(tmp_path / "run")
    asked = []

    def change_at_step_6() -> bool:
        asked.append(trainer.state.step)
        if asked[-1] == 6 and asked.count(6) == 1:
            change_in_place(dataset / name)
        return False

    trainer = Trainer(experiment, folder, dataset, Worker(cpus=1), stop_requested=change_at_step_6)
    with pytest.raises(UserError, match=f"{name}: was changed while it was read"):
        for _ in trainer.run():
            pass
    assert folder.checkpoint_steps() == [4]
    assert all(line["step"] <= 5 for line in journal.read(folder))
    with pytest.raises(UserError, match=f"{name}: its content has changed"):
        train(experiment, folder, dataset, Worker(cpus=1))


def test_tokens_outside_of_the_vocabulary_in_a_changed_shard_are_no_traceback(
    tiny_dataset, tmp_path
):
    dataset = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    folder = new_folder(tmp_path / "run")
    experiment = load_experiment(None, [*SMALL, "train.log_interval=null"])
    lines = Trainer(experiment, folder, dataset, Worker(cpus=1)).run()
    next(lines)
    shard = dataset / "train-00000.parquet"
    with open(shard, "r+b") as file:
        file.seek(100)
        file.write(b"\xff" * (shard.stat().st_size // 2))
    with pytest.raises(UserError, match="was changed while it was read"):
        for _ in lines:
            pass


def test_loss_that_is_not_finite_because_of_a_changed_shard_is_not_a_divergence(
    tiny_dataset, tmp_path
):
    dataset = Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))
    folder = new_folder(tmp_path / "run")
    words = ["train.log_interval=null", "schedule.max_lr=1e38", "optim.max_grad_norm=null"]
    experiment = load_experiment(None, [*SMALL, *words])
    trainer = Trainer(experiment, folder, dataset, Worker(cpus=1))
    lines = trainer.run()
    next(lines)  # the evaluation before training
    change_in_place(dataset / "val-00000.parquet")
    change_in_place(dataset / "train-00000.parquet")
    with pytest.raises(UserError, match="was changed while it was read"):
        for _ in lines:
            pass
    assert folder.read_ending() is None


def test_finished_run_makes_no_step(golden, tiny_dataset, folder):
    train_here(folder, tiny_dataset)
    before = journal.read(folder)
    assert train_here(folder, tiny_dataset) == 24
    assert journal.read(folder) == before
    assert outcome(folder) == golden
    samples = sorted(file.name for file in folder.samples.iterdir())
    assert samples == [f"step-{step:08d}.txt" for step in (0, 8, 16, 24)]


def test_accumulated_micro_batches_equal_the_whole_batch(tiny_dataset, tmp_path):
    words = ["model.dropout=0", "train.max_steps=3", "train.eval_interval=null"]
    accumulated = new_folder(tmp_path / "accumulated")
    whole = new_folder(tmp_path / "whole")
    train_here(accumulated, tiny_dataset, *words)
    train_here(whole, tiny_dataset, *words, "train.micro_batch_size=16")
    expected = store.load_tensors(whole.checkpoint(3), "optimizer")
    for name, value in store.load_tensors(accumulated.checkpoint(3), "optimizer").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
