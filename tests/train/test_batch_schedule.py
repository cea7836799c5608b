"""Runs whose batch size changes from step to step."""

import pytest

from orchestrator.config.experiment import load_experiment
from orchestrator.data.batches import TokenStream
from orchestrator.data.order import windows_per_epoch
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train import step as step_module
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from tests.helpers import train_rank
from tests.helpers.curves import final_outcome as outcome
from tests.helpers.tiny import TINY

SMALL = [
    *TINY,
    "train.max_steps=12",
    "train.log_interval=2",
    "train.eval_interval=6",
    "train.eval_tokens=400",
    "train.checkpoint_interval=1",
    "train.keep=12",
    "schedule.max_lr=1e-2",
    "train.micro_batch_size=2",
]
RISING = [*SMALL, "train.global_batch_size=null", "train.batch_schedule={0: 8, 4: 16, 9: 24}"]


def train_run(folder: RunFolder, dataset, words) -> dict:
    folder.path.mkdir(exist_ok=True)
    train(load_experiment(None, words), folder, dataset, Worker(cpus=1))
    return outcome(folder)


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("rising") / "run")
    return folder, train_run(folder, tiny_dataset, RISING)


def test_schedule_of_one_entry_has_the_bits_of_a_constant_batch(tiny_dataset, tmp_path):
    constant = [*SMALL, "train.global_batch_size=16"]
    one = [*SMALL, "train.global_batch_size=null", "train.batch_schedule={0: 16}"]
    same = train_run(RunFolder(tmp_path / "constant"), tiny_dataset, constant)
    assert train_run(RunFolder(tmp_path / "one"), tiny_dataset, one) == same


def test_lines_have_the_tokens_and_sequences_of_all_batches(tiny_dataset, whole):
    lines = {line["step"]: line for line in journal.read(whole[0]) if "train/tokens" in line}
    length = load_experiment(None, RISING).model.block_size
    sequences = {2: 16, 4: 32, 6: 64, 8: 96, 10: 136, 12: 184}
    assert {step: line["train/tokens"] // length for step, line in lines.items()} == sequences
    sizes = {step: line.get("train/batch_size") for step, line in lines.items()}
    assert sizes == {2: None, 4: None, 6: 16, 8: 16, 10: 24, 12: 24}
    windows = windows_per_epoch(TokenStream(tiny_dataset, "train").tokens, length)
    assert lines[12]["train/epoch"] == 184 / windows


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_workers_have_the_same_bits_as_one(tiny_dataset, folder, whole, world_size):
    processes = train_rank.start(folder, tiny_dataset, RISING, world_size)
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * world_size
    assert outcome(folder) == whole[1]


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [2, 3, 4, 6, 9, 10])
def test_run_that_dies_in_any_stretch_or_between_two_resumes_to_the_same_bits(
    tiny_dataset, folder, whole, step, monkeypatch
):
    """Step n dies in its update: the checkpoint after n steps is the last one."""

    def die(self, settings):
        if self.state.step == step:
            raise Killed
        update(self, settings)

    update = step_module.Step.update
    monkeypatch.setattr(step_module.Step, "update", die)
    folder.path.mkdir(exist_ok=True)
    trainer = Trainer(load_experiment(None, RISING), folder, tiny_dataset, Worker(cpus=1))
    with pytest.raises(Killed):
        list(trainer.run())
    monkeypatch.undo()
    assert folder.checkpoint_steps()[-1] == step
    assert train_run(folder, tiny_dataset, RISING) == whole[1]
    assert "drift" not in {event["kind"] for event in events.read(folder)}
