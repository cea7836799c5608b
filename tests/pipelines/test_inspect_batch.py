"""inspect_batch.py shows the batch of a training step and the loss that training logs for it."""

import dataclasses
import math

import numpy as np
import pytest

from orchestrator.config.experiment import Experiment
from orchestrator.config.steps import BatchSizes
from orchestrator.data.batches import Batches, TokenStream
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.inspect import batch_of, first_model, forward
from orchestrator.train.numerics import Worker
from pipelines.inspect_batch import main


@pytest.fixture
def stored(trained_run):
    """The experiment file in the last checkpoint of the run."""
    return trained_run / "checkpoints" / "step-00000012" / "experiment.yaml"


@pytest.fixture
def experiment(stored) -> Experiment:
    return RunFolder(stored.parent).read_experiment()


@pytest.mark.parametrize("step", [0, 7])
def test_batch_equals_that_of_training(stored, tiny_dataset, capsys, step):
    batches = Batches(TokenStream(tiny_dataset, "train"), 32, BatchSizes(((0, 4),)), 4, 1337)
    inputs, targets = batches.micro_batch(step, 0)
    assert main([str(stored), "--step", str(step), "--rows", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokenizer = load_tokenizer("char", tiny_dataset)
    for row in range(3):
        at = lines.index(next(line for line in lines if line.startswith(f"row {row}:")))
        first = int(batches.offsets(step)[row])
        assert lines[at].endswith(f"tokens {first:,} to {first + 31:,} of train")
        for name, ids, line in (
            ("inputs", inputs[row], lines[at + 1]),
            ("targets", targets[row], lines[at + 3]),
        ):
            assert line.split() == [name, "…", *map(str, ids[-8:])]
        assert tokenizer.decode(inputs[row, -8:]).replace("\n", "\\n") in lines[at + 2]
        assert "tiny.txt" in lines[at + 5]
    assert not any(line.startswith("row 3:") for line in lines)


def test_output_has_shapes_vocabulary_and_first_loss(stored, trained_run, capsys):
    main([str(stored)])
    output = capsys.readouterr().out
    n_vocab = load_tokenizer("char", stored.parent).n_vocab
    assert "targets are the inputs moved by one  True" in output
    assert f"n_vocab {n_vocab} ids of char, vocab_size 32 rows (padded)" in output
    assert "(4, 1, 32) (B, 1, V)" in output
    assert f"{math.log(32):.4f} = ln 32" in output
    logged = journal.read(RunFolder(trained_run))[1]
    assert f"loss at initialization  {logged['train/loss']:.4f} nats" in output


def test_first_loss_equals_logged_loss(experiment, trained_run, tiny_dataset):
    n_vocab = load_tokenizer("char", tiny_dataset).n_vocab
    model, batch = first_model(experiment, n_vocab, Worker()), batch_of(experiment, tiny_dataset, 0)
    result = forward(model, batch, experiment, "cpu", n_vocab, 5)
    assert result.loss == journal.read(RunFolder(trained_run))[1]["train/loss"]
    assert np.all(np.diff(result.probabilities, axis=1) <= 0)
    everything = forward(model, batch, experiment, "cpu", n_vocab, n_vocab)
    assert everything.probabilities.sum(axis=1) == pytest.approx(np.ones(4), abs=1e-6)


def test_moved_by_one_is_false_for_other_targets(experiment, tiny_dataset):
    batch = batch_of(experiment, tiny_dataset, 3)
    assert batch.moved_by_one
    for targets in (
        batch.inputs,
        np.roll(batch.targets, 1, axis=0),
        batch.targets * [*[1] * 31, 0],
    ):
        assert not dataclasses.replace(batch, targets=targets).moved_by_one


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "-1"], "expected one argument|'-1' is not a whole number"),
        (["--step", "x"], "'x' is not a whole number of at least 0"),
        (["--lines", "3"], "unrecognized arguments: --lines"),
        (["model.n_heads=3"], "did you mean model.n_head"),
        (["train.micro_batch_size=auto", "name=new"], "auto is only known to a run; give a number"),
        (["other.yaml"], "one experiment at a time"),
    ],
)
def test_wrong_argument_is_named(stored, words, said):
    with pytest.raises(UserError, match=said):
        main([str(stored), *words])


def test_command_prints_no_errors(stored, type_command):
    done = type_command("inspect_batch.py", stored, "--step", "2", "--rows", "1")
    assert (done.returncode, done.stderr) == (0, "")
