"""The moving average of the weights: its values, its loss, and its bits however it was trained."""

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.data.batches import EvalBatches, TokenStream
from orchestrator.errors import UserError
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.evaluate import EvalSet
from orchestrator.train.init_from import initial_model
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker, autocast
from orchestrator.train.state import load_model
from orchestrator.train.trained import open_checkpoint
from pipelines import evaluate, export, sample
from tests.helpers import train_rank
from tests.helpers.checkpoints import written_by_one
from tests.helpers.curves import final_outcome as outcome
from tests.helpers.tiny import TINY

SMALL = [
    *TINY,
    "train.max_steps=8",
    "train.log_interval=2",
    "train.eval_interval=4",
    "train.eval_tokens=400",
    "train.checkpoint_interval=1",
    "train.keep=8",
    "schedule.max_lr=1e-2",
]
EMA = [*SMALL, "train.ema=0.9"]


def train_run(folder: RunFolder, dataset, words) -> dict:
    folder.path.mkdir(exist_ok=True)
    train(load_experiment(None, words), folder, dataset, Worker(cpus=1))
    return outcome(folder) | {"ema": ema_of(folder)}


def ema_of(folder: RunFolder) -> bytes:
    has_ema = any(folder.checkpoint(8).glob("ema*"))
    return written_by_one(folder.checkpoint(8), "ema.safetensors") if has_ema else b""


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("ema") / "run")
    return folder, train_run(folder, tiny_dataset, EMA)


def test_average_is_that_of_the_weights_after_each_update(whole, tiny_dataset, tmp_path):
    trainer = Trainer(load_experiment(None, EMA), RunFolder(tmp_path), tiny_dataset, Worker(cpus=1))
    average = {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}
    for step in range(1, 9):
        weights = store.load_tensors(whole[0].checkpoint(step), "model")
        for name in average:
            average[name] = 0.9 * average[name] + 0.1 * weights[name]
        stored = store.load_tensors(whole[0].checkpoint(step), "ema")
        for name, expected in average.items():
            torch.testing.assert_close(stored[name], expected, rtol=1e-5, atol=1e-7)


def test_training_does_not_depend_on_the_average(whole, tiny_dataset, tmp_path):
    without = train_run(RunFolder(tmp_path / "run"), tiny_dataset, SMALL)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert without[name] == whole[1][name]
    assert without["ema"] == b""


def test_logged_loss_is_that_of_the_stored_average(whole, tiny_dataset):
    lines = {line["step"]: line for line in journal.read(whole[0])}
    assert [step for step, line in lines.items() if "val/ema_loss" in line] == [0, 4, 8]
    assert lines[0]["val/ema_loss"] == lines[0]["val/loss"]
    trained = open_checkpoint(whole[0].checkpoint(8), "cpu", ema=True)
    batches = EvalBatches(TokenStream(tiny_dataset, "val"), 16, 2, 400)
    eval_set = EvalSet(batches, trained.tokenizer.byte_lengths)
    context = autocast(trained.experiment, "cpu")
    result = eval_set.evaluate(trained.model, torch.device("cpu"), context)
    assert result.loss == lines[8]["val/ema_loss"] != lines[8]["val/loss"]


def test_two_workers_have_the_same_average(whole, tiny_dataset, folder):
    processes = train_rank.start(folder, tiny_dataset, EMA, 2)
    for process in processes:
        process.join(300)
    assert outcome(folder) | {"ema": ema_of(folder)} == whole[1]


def test_resumed_run_has_the_same_average(whole, tiny_dataset, folder):
    trainer = Trainer(load_experiment(None, EMA), folder, tiny_dataset, Worker(cpus=1), end_step=5)
    list(trainer.run())
    assert train_run(folder, tiny_dataset, EMA) == whole[1]


def test_commands_use_the_average_on_request(whole, tiny_dataset, tmp_path, capsys):
    place = str(whole[0].checkpoint(8))
    export.main([place, str(tmp_path / "model"), "--ema"])
    exported = load_file(tmp_path / "model" / "model.safetensors")
    average = store.load_tensors(whole[0].checkpoint(8), "ema")
    assert all(torch.equal(exported[name], value) for name, value in average.items())
    evaluate.main([place, f"data.dir={tiny_dataset}", "--tokens=400", "--ema"])
    assert "(the same bits)" in capsys.readouterr().out
    sample.main([place, "--max-new-tokens=2", "--ema"])
    assert "averaged weights" in capsys.readouterr().out


def test_weights_without_average_are_refused(tiny_dataset, tmp_path):
    folder = RunFolder(tmp_path / "run")
    train_run(folder, tiny_dataset, [*SMALL, "train.max_steps=8"])
    with pytest.raises(UserError, match="--ema: .* has no average of the weights"):
        open_checkpoint(folder.checkpoint(8), "cpu", ema=True)


def test_initial_weights_from_a_run_are_its_weights_and_not_their_average(whole):
    experiment = load_experiment(None, [*EMA, f"train.init_from={whole[0].path}"])
    n_vocab = load_model(store.Content(whole[0].checkpoint(8))).config.vocab_size
    found = initial_model(experiment, n_vocab).state_dict()
    weights = store.load_tensors(whole[0].checkpoint(8), "model")
    assert all(torch.equal(found[name], value) for name, value in weights.items())
