"""A user's model under train.compile."""

import pytest

from orchestrator.config.experiment import load_experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.workers import attempts
from tests.helpers import train_rank
from tests.helpers.curves import final_outcome
from tests.train.test_kinds import KINDS, OWN, SMALL

WORDS = [*SMALL, *KINDS[OWN], "train.compile=true", "train.max_steps=12"]


def run(folder: RunFolder, data_dir, *words: str) -> dict:
    folder.path.mkdir(exist_ok=True)
    train(load_experiment(None, [*WORDS, *words]), folder, data_dir, Worker(cpus=1))
    return final_outcome(folder)


@pytest.mark.slow
def test_compiled_run_that_was_killed_equals_the_whole(tiny_dataset, tmp_path):
    whole = run(RunFolder(tmp_path / "whole"), tiny_dataset)
    cut = RunFolder(tmp_path / "cut")
    [process] = train_rank.start(cut, tiny_dataset, WORDS, 1, killed_after=4)
    while max(cut.checkpoint_steps(), default=0) < 4:
        assert process.is_alive()
    process.kill()
    process.join()
    assert max(cut.checkpoint_steps()) < 12
    assert run(cut, tiny_dataset) == whole
    assert run(RunFolder(tmp_path / "eager"), tiny_dataset, "train.compile=false") != whole


@pytest.mark.slow
def test_model_that_cannot_be_compiled_ends_in_one_line(tiny_dataset, folder, monkeypatch):
    import torch._inductor.config as inductor
    from torch._dynamo.exc import TorchDynamoException

    monkeypatch.setattr(inductor.cpp, "cxx", ("/no/compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with pytest.raises(TorchDynamoException) as raised:
        run(folder, tiny_dataset, "model.width=40")
    attempts.record_failure(folder, Worker(), raised.value)
    ending = folder.read_ending()
    assert ending is not None
    assert ending.kind == "user"
    assert ending.reason.startswith("train.compile: torch cannot compile the model: ")
    assert ending.reason.endswith("; set train.compile=false")
    assert "\n" not in ending.reason
