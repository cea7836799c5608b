"""A run made in stretches, in folders and processes of their own, is the run: weights, moments and every logged loss."""

import dataclasses

import pytest

from model.schedule import learning_rate
from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.runs import journal, metrics
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker

SMALL = [
    "name=small",
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.max_steps=20",
    "train.log_interval=3",
    "train.eval_interval=5",
    "train.eval_tokens=400",
    "train.checkpoint_interval=100",
    "schedule.max_lr=1e-2",
    "schedule.kind=constant",
    "schedule.warmup_steps=4",
]


def curve(lines) -> list[dict]:
    return [metrics.exact_part(r) for r in lines]


def outcome(run_dir) -> tuple:
    last = checkpoint.latest_valid(run_dir / "checkpoints")
    parts = [
        (last / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    ]
    return last.name, parts, curve(journal.read(RunFolder(run_dir)))


def lone(run_dir, data_dir, *words):
    """The run by itself, to the end."""
    run_dir.mkdir(exist_ok=True)
    train(load_experiment(None, [*SMALL, *words]), RunFolder(run_dir), data_dir)
    return outcome(run_dir)


def stretch(run_dir, data_dir, stop, parent=None, words=(), **how):
    """One stretch in a folder of its own; its checkpoint."""
    run_dir.mkdir(exist_ok=True)
    trainer = Trainer(
        load_experiment(None, [*SMALL, *words]),
        RunFolder(run_dir),
        data_dir,
        Worker(),
        parent=parent,
        end_step=stop,
        **how,
    )
    for _ in trainer.run():
        pass
    return checkpoint.path_of(run_dir / "checkpoints", stop)


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory):
    return lone(tmp_path_factory.mktemp("whole") / "run", tiny_dataset)


@pytest.mark.parametrize("cut", [1, 5, 6, 7, 15, 19])
def test_two_stretches_are_the_run(whole, tiny_dataset, tmp_path, cut):
    parent = stretch(tmp_path / "first", tiny_dataset, cut)
    stretch(tmp_path / "second", tiny_dataset, 20, parent)
    first, second = (journal.read(RunFolder(tmp_path / name)) for name in ("first", "second"))
    assert [r["step"] for r in first] == sorted({0, *range(3, cut + 1, 3), *range(5, cut + 1, 5)})
    assert (*outcome(tmp_path / "second")[:2], curve(first + second)) == whole


@pytest.mark.parametrize("end", [5, 6, 7, 15])
def test_a_run_that_grows_is_the_one_that_never_ended(whole, tiny_dataset, tmp_path, end):
    ended = lone(tmp_path / "run", tiny_dataset, f"train.max_steps={end}")
    assert {"train/loss", "val/loss"} <= ended[2][-1].keys()
    assert lone(tmp_path / "run", tiny_dataset) == whole


@pytest.mark.parametrize("end", [5, 6, 7, 15])
def test_an_end_found_late_has_the_line_of_one_known_before(tiny_dataset, tmp_path, end):
    """The trunk of a tree is there; then a trial is added that ends where the trunk's stage did."""
    stretch(tmp_path / "trunk", tiny_dataset, end)
    stretch(tmp_path / "trunk", tiny_dataset, end, words=[f"train.max_steps={end}"])
    alone = lone(tmp_path / "alone", tiny_dataset, f"train.max_steps={end}")
    assert (outcome(tmp_path / "trunk")[0], outcome(tmp_path / "trunk")[2]) == (alone[0], alone[2])
    assert outcome(tmp_path / "trunk")[1] == alone[1]


def test_rates_of_ones_own_are_used_and_logged(tiny_dataset, tmp_path):
    schedule = load_experiment(None, SMALL).lr_schedule()
    other = dataclasses.replace(schedule, max_lr=5e-3)
    lone(tmp_path / "given", tiny_dataset, "schedule.max_lr=5e-3")
    stretch(tmp_path / "rates", tiny_dataset, 20, lr_at=lambda step: learning_rate(other, step))
    assert outcome(tmp_path / "rates")[1:] == outcome(tmp_path / "given")[1:]


def test_a_damaged_parent_is_refused_by_name(tiny_dataset, tmp_path):
    parent = stretch(tmp_path / "first", tiny_dataset, 6)
    data = bytearray((parent / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (parent / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors.*SHA-256 differs"):
        stretch(tmp_path / "second", tiny_dataset, 20, parent)


def test_every_line_is_yielded_as_it_is_written(tiny_dataset, tmp_path):
    (tmp_path / "run").mkdir()
    run = Trainer(load_experiment(None, SMALL), RunFolder(tmp_path / "run"), tiny_dataset, Worker())
    for line in run.run():
        assert journal.read(RunFolder(tmp_path / "run"))[-1] == line
    assert line["step"] == 20
