"""A loss or gradient that is not finite: the update is not applied, its windows are known, the run stops or goes on."""

import json
import math

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data.batches import Batches, TokenStream
from orchestrator.runs import events, journal, metrics
from orchestrator.runs.folder import RunFolder
from orchestrator.train import nonfinite
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker

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


def poisoned(run: Trainer, calls: set[int], value: float = math.nan) -> Trainer:
    """The loss of those forward passes (counted from 0, four a step) is `value`."""
    forward, seen = run.state.forward, [0]

    def poison(*args, **options):
        logits, loss = forward(*args, **options)
        seen[0] += 1
        return logits, loss * value if seen[0] - 1 in calls else loss

    run.state.forward = poison
    return run


def start(folder, data, *words: str) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(load_experiment(None, [*SMALL, *words]), RunFolder(folder), data, Worker())


def weights(folder, step: int) -> str:
    return checkpoint.weights_sha256(
        checkpoint.load_tensors(checkpoint.path_of(folder / "checkpoints", step), "model")
    )


@pytest.fixture
def offsets(tiny_dataset):
    return Batches(TokenStream(tiny_dataset, "train"), 16, 8, 2, 1337).offsets


def test_stop_ends_before_the_update_and_names_the_windows(tiny_dataset, tmp_path, offsets):
    list(poisoned(start(tmp_path, tiny_dataset), {5 * 4 + 2}).run())
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["step"] == 5
    assert stopped["windows"] == {"2": offsets(5)[4:6].tolist()}
    assert "step 6: the loss is not finite" in stopped["reason"]
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 5


def test_skip_leaves_that_update_out_and_nothing_else(tiny_dataset, tmp_path, offsets):
    list(poisoned(start(tmp_path, tiny_dataset, "train.on_nonfinite=skip"), {5 * 4 + 2}).run())
    assert weights(tmp_path, 6) == weights(tmp_path, 5) != weights(tmp_path, 7)
    (event,) = events.read(RunFolder(tmp_path))
    assert (event["kind"], event["step"], event["windows"]) == (
        "nonfinite",
        5,
        {"2": offsets(5)[4:6].tolist()},
    )
    lines = {r["step"]: r for r in journal.read(RunFolder(tmp_path))}
    assert "train/loss" not in lines[6], "a loss of no update"
    assert all(math.isfinite(lines[n]["train/loss"]) for n in lines if n != 6)
    assert [lines[n].get("train/skipped_steps") for n in (5, 6, 12)] == [None, 1, 1]


def test_a_run_that_skipped_goes_on_after_a_stop_as_if_it_had_not_stopped(tiny_dataset, tmp_path):
    words = ["train.on_nonfinite=skip"]
    list(poisoned(start(tmp_path / "whole", tiny_dataset, *words), {5 * 4}).run())
    for line in poisoned(start(tmp_path / "cut", tiny_dataset, *words), {5 * 4}).run():
        if line["step"] == 7:
            break
    list(start(tmp_path / "cut", tiny_dataset, *words).run())
    assert weights(tmp_path / "cut", 12) == weights(tmp_path / "whole", 12)
    read = [
        [metrics.exact_part(r) for r in journal.read(RunFolder(tmp_path / name))]
        for name in ("whole", "cut")
    ]
    assert read[0] == read[1]


def test_an_infinite_gradient_of_finite_losses_is_not_applied_either(tiny_dataset, tmp_path):
    run = start(tmp_path, tiny_dataset, "train.on_nonfinite=skip")
    run.state.model.transformer.wte.weight.register_hook(
        lambda grad: grad * math.inf if run.state.step == 3 else grad
    )
    list(run.run())
    assert weights(tmp_path, 4) == weights(tmp_path, 3) != weights(tmp_path, 5)
    assert "gradient norm is not finite" in events.read(RunFolder(tmp_path))[0]["message"]


def test_skipping_without_end_is_no_way_to_go_on(tiny_dataset, tmp_path):
    run = start(tmp_path, tiny_dataset, "train.on_nonfinite=skip", "train.max_steps=30")
    list(poisoned(run, set(range(8, 200))).run())
    assert run.state.step == 2 + nonfinite.PATIENCE
    assert (
        "as were the 10 before it" in json.loads((tmp_path / "stopped.json").read_text())["reason"]
    )


def test_stopping_now_and_then_gives_no_more_patience(tiny_dataset, tmp_path):
    words = ["train.on_nonfinite=skip", "train.max_steps=30"]
    for line in poisoned(start(tmp_path, tiny_dataset, *words), set(range(8, 200))).run():
        if line["step"] == 7:
            break
    run = poisoned(start(tmp_path, tiny_dataset, *words), set(range(200)))
    list(run.run())
    assert run.state.step == 2 + nonfinite.PATIENCE
