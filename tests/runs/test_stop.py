"""Asked to stop, a run leaves a checkpoint of the step that it is in, and goes on as if nobody had asked."""

import json
from pathlib import Path

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import events, journal, metrics, stop
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker

SMALL = [
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.max_steps=12",
    "train.log_interval=3",
    "train.eval_interval=4",
    "train.eval_tokens=400",
    "train.checkpoint_interval=100",
    "schedule.max_lr=1e-2",
]


def outcome(folder: Path) -> tuple:
    last = checkpoint.latest_valid(folder / "checkpoints")
    losses = [metrics.exact_part(r) for r in journal.read(RunFolder(folder))]
    parts = [
        (last / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    ]
    return last.name, parts, losses


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(load_experiment(None, SMALL), RunFolder(folder), tiny_dataset)
    return folder


@pytest.mark.parametrize("question", range(0, 150, 7))
def test_asked_at_any_question_it_stops_there_and_ends_as_if_nobody_had_asked(
    whole, tiny_dataset, tmp_path, question
):
    """Questions are asked in every slot of every step and before every batch of every evaluation."""
    asked = iter([False] * question + [True] * 10**6)
    trainer = Trainer(
        load_experiment(None, SMALL),
        RunFolder(tmp_path),
        tiny_dataset,
        Worker(),
        stop_requested=lambda: next(asked),
    )
    for _ in trainer.run():
        pass
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["again"]
    assert checkpoint.steps(tmp_path / "checkpoints") == (
        [stopped["step"]] if stopped["step"] else []
    )
    train(load_experiment(None, SMALL), RunFolder(tmp_path), tiny_dataset)
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("question", range(100, 185, 6))
def test_asked_in_an_evaluation_that_only_the_end_needs_its_window_is_not_lost(
    tiny_dataset, tmp_path, question
):
    experiment = load_experiment(
        None, [*SMALL, "train.eval_interval=5"]
    )  # step 12 is due for a loss and not for an evaluation
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    train(experiment, RunFolder(tmp_path / "whole"), tiny_dataset)
    asked = iter([False] * question + [True] * 10**6)
    cut = RunFolder(tmp_path / "cut")
    trainer = Trainer(experiment, cut, tiny_dataset, Worker(), stop_requested=lambda: next(asked))
    for _ in trainer.run():
        pass
    train(experiment, cut, tiny_dataset)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_asked_again_and_again_it_still_gets_there(whole, tiny_dataset, tmp_path):
    steps = []
    for _ in range(100):
        (tmp_path / "stopped.json").unlink(missing_ok=True)
        asked = iter([False] * 30 + [True] * 10**6)
        run = Trainer(
            load_experiment(None, SMALL),
            RunFolder(tmp_path),
            tiny_dataset,
            Worker(),
            stop_requested=lambda questions=asked: next(questions),
        )
        for _ in run.run():
            pass
        steps.append(run.state.step)
        if not (tmp_path / "stopped.json").exists():
            break
    assert len(steps) > 3
    assert outcome(tmp_path) == outcome(whole)


def test_a_bell_rings_once_somebody_asks(tmp_path):
    stop.clear(RunFolder(tmp_path))
    bell = stop.Listener(RunFolder(tmp_path))
    assert not bell()
    assert stop.requested(RunFolder(tmp_path)) is None
    stop.request(RunFolder(tmp_path), "SIGTERM")
    assert bell._requested.wait(5)
    assert stop.requested(RunFolder(tmp_path)) == "SIGTERM"


@pytest.mark.parametrize("text", ["1", "{}", "[]", "{", "[" * 100_000])
def test_whatever_stands_in_the_file_the_bell_rings(tmp_path, text):
    RunFolder(tmp_path).stop_request_file.write_text(text)
    assert stop.Listener(RunFolder(tmp_path))._requested.wait(5)
    assert stop.requested(RunFolder(tmp_path)) == "asked to stop"


# ---- what keeps a resume from the same bits ----
@pytest.mark.parametrize(
    ("words", "worker"),
    [
        ([], Worker(cpus=2)),
        (["train.micro_batch_size=4"], Worker()),
        (["train.reduction_slots=1"], Worker()),
    ],
    ids=["threads", "micro-batch", "slots"],
)
def test_a_drift_is_refused_until_it_is_allowed(tiny_dataset, tmp_path, words, worker):
    first = load_experiment(None, [*SMALL, "train.checkpoint_interval=2"])
    for line in Trainer(first, RunFolder(tmp_path), tiny_dataset, Worker()).run():
        if line["step"] == 6:
            break
    with pytest.raises(UserError, match="train.allow_drift=true"):
        train(load_experiment(None, [*SMALL, *words]), RunFolder(tmp_path), tiny_dataset, worker)
    assert events.read(RunFolder(tmp_path)) == []
    assert (
        train(
            load_experiment(None, [*SMALL, *words, "train.allow_drift=true"]),
            RunFolder(tmp_path),
            tiny_dataset,
            worker,
        )
        == 12
    )
    noted = events.read(RunFolder(tmp_path))
    assert noted
    assert {(e["kind"], e["step"]) for e in noted} == {("drift", 4)}
