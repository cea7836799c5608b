"""A loss or gradient that is not finite: the update is skipped, and the run stops or continues."""

import math
from pathlib import Path

import pytest

from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.config.steps import BatchSizes
from orchestrator.data.batches import Batches, TokenStream
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train import evaluate, nonfinite
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker
from tests.helpers.curves import exact_part

SKIP = "train.on_nonfinite=skip"
SMALL = [
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.max_steps=12",
    "train.log_interval=1",
    "train.eval_interval=null",
    "train.checkpoint_interval=1",
    "train.keep=20",
    "schedule.max_lr=1e-2",
]


def new_trainer(folder: RunFolder, data_dir: Path, *words: str, bad: set[int]) -> Trainer:
    """Return a trainer; the loss of the forward passes in `bad` is NaN. A step has four."""
    folder.path.mkdir(exist_ok=True)
    trainer = Trainer(load_experiment(None, [*SMALL, *words]), folder, data_dir, Worker())
    forward = trainer.state.forward
    count = 0

    def poisoned(*args, **options):
        nonlocal count
        loss = forward(*args, **options)
        if count in bad:
            loss = loss * math.nan
        count += 1
        return loss

    proof = trainer.step.proof

    def proof_of_sound_weights(batches):
        trainer.state.forward = forward  # a proof is no step, so it does not count
        try:
            return proof(batches)
        finally:
            trainer.state.forward = poisoned

    trainer.state.forward = poisoned
    trainer.step.proof = proof_of_sound_weights
    return trainer


def run(trainer: Trainer, until: int | None = None) -> None:
    for line in trainer.run():
        if line["step"] == until:
            return


def weights(folder: RunFolder, step: int) -> str:
    return store.weights_sha256(store.load_tensors(folder.checkpoint(step), "model"))


@pytest.fixture
def windows(tiny_dataset) -> list[int]:
    """Positions of the samples of micro-batch 2 in the update after step 5."""
    batches = Batches(TokenStream(tiny_dataset, "train"), 16, BatchSizes(((0, 8),)), 2, 1337)
    return batches.offsets(5)[4:6].tolist()


def test_run_stops_before_the_update_and_records_the_samples(tiny_dataset, folder, windows):
    run(new_trainer(folder, tiny_dataset, bad={5 * 4 + 2}))
    ending = folder.read_ending()
    assert ending.kind == "diverged"
    assert ending.facts == {"step": 5, "windows": {"2": windows}}
    assert "step 6: the loss is not finite" in ending.reason
    assert folder.checkpoint_steps()[-1] == 5


def test_only_the_update_is_skipped(tiny_dataset, folder, windows):
    run(new_trainer(folder, tiny_dataset, SKIP, bad={5 * 4 + 2}))
    assert weights(folder, 6) == weights(folder, 5) != weights(folder, 7)
    (event,) = events.read(folder)
    assert (event["kind"], event["step"]) == ("nonfinite", 5)
    assert event["windows"] == {"2": windows}
    lines = {line["step"]: line for line in journal.read(folder)}
    assert "train/loss" not in lines[6]
    assert all(math.isfinite(lines[step]["train/loss"]) for step in lines if step != 6)
    assert [lines[step].get("train/skipped_steps") for step in (5, 6, 12)] == [None, 1, 1]


def test_resumed_run_with_a_skipped_update_equals_uninterrupted_run(tiny_dataset, tmp_path):
    whole = RunFolder(tmp_path / "whole")
    cut = RunFolder(tmp_path / "cut")
    run(new_trainer(whole, tiny_dataset, SKIP, bad={5 * 4}))
    run(new_trainer(cut, tiny_dataset, SKIP, bad={5 * 4}), until=7)
    run(new_trainer(cut, tiny_dataset, SKIP, bad=set()))
    assert weights(cut, 12) == weights(whole, 12)
    curves = [[exact_part(line) for line in journal.read(f)] for f in (whole, cut)]
    assert curves[0] == curves[1]


def test_infinite_gradient_of_finite_losses_is_not_applied(tiny_dataset, folder):
    trainer = new_trainer(folder, tiny_dataset, SKIP, bad=set())
    trainer.state.model.transformer.wte.weight.register_hook(
        lambda grad: grad * math.inf if trainer.state.step == 3 else grad
    )
    run(trainer)
    assert weights(folder, 4) == weights(folder, 3) != weights(folder, 5)
    assert "gradient norm is not finite" in events.read(folder)[0]["message"]


def test_run_ends_after_too_many_skipped_updates_in_a_row(tiny_dataset, folder):
    trainer = new_trainer(folder, tiny_dataset, SKIP, "train.max_steps=30", bad=set(range(8, 200)))
    run(trainer)
    assert trainer.state.step == 2 + nonfinite.PATIENCE
    assert "as were the 10 before it" in folder.read_ending().reason


def test_skipped_updates_that_are_not_in_a_row_do_not_end_the_run(tiny_dataset, folder):
    bad = {4 * step for step in range(0, 30, 2)}
    trainer = new_trainer(folder, tiny_dataset, SKIP, "train.max_steps=30", bad=bad)
    run(trainer)
    assert trainer.state.step == 30
    assert trainer.state.skipped == 15 > nonfinite.PATIENCE


def test_resume_does_not_reset_the_count_of_skipped_updates(tiny_dataset, folder):
    words = [SKIP, "train.max_steps=30"]
    run(new_trainer(folder, tiny_dataset, *words, bad=set(range(8, 200))), until=7)
    trainer = new_trainer(folder, tiny_dataset, *words, bad=set(range(200)))
    run(trainer)
    assert trainer.state.step == 2 + nonfinite.PATIENCE


@pytest.mark.parametrize(
    ("rate", "words"),
    [(1e39, []), (1e39, ["train.eval_interval=4"]), (1e30, ["train.eval_interval=4"])],
    ids=["weights, never evaluated", "weights", "only the loss"],
)
def test_run_whose_last_update_overflows_has_diverged(tiny_dataset, folder, rate, words):
    """No sample is drawn from such a model, and no checkpoint of it is stored."""
    words += ["schedule.kind=piecewise", f"schedule.points={{10: 1, 11: {rate / 1e-2}}}"]
    trainer = Trainer(load_experiment(None, [*SMALL, *words]), folder, tiny_dataset, Worker())
    run(trainer)
    ending = folder.read_ending()
    assert (ending.kind, ending.facts) == ("diverged", {"step": 11})
    assert ending.reason.startswith("step 12: ") and "after the last update" in ending.reason
    assert folder.checkpoint_steps()[-1] == 11
    assert not folder.sample_file(12).exists()


def test_sample_that_cannot_be_drawn_does_not_end_the_run(tiny_dataset, folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    monkeypatch.setattr(evaluate, "generate", fail)
    experiment = load_experiment(None, [*SMALL, "train.eval_interval=12"])
    run(Trainer(experiment, folder, tiny_dataset, Worker()))
    assert folder.read_ending() is None
    assert folder.checkpoint_steps()[-1] == 12
    assert [event["kind"] for event in events.read(folder)] == ["sample", "sample"]
