"""The largest micro-batch that fits: measured in a process of its own."""

import socket

import pytest

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.workers import fitting
from orchestrator.workers.fitting import Fit
from orchestrator.workers.memory import OutOfMemory

HOST = socket.gethostname()
ONE_WORKER = Layout(1, 1, False)
KILLED = OutOfMemory("the kernel ended a worker", HOST, 2, 0)


def wide(size: int, *words: str) -> Experiment:
    """Return a small model with a large vocabulary: 8 MiB of logits a sequence, three times."""
    return load_experiment(
        None,
        [
            "model.n_layer=2",
            "model.n_head=2",
            "model.n_embd=32",
            "model.block_size=64",
            "model.pad_vocab_to=32768",
            f"train.micro_batch_size={size}",
            f"train.global_batch_size={size}",
            *words,
        ],
    )


@pytest.fixture(scope="module")
def whole() -> Fit:
    """Measurement without a limit."""
    return fitting.largest_fitting(wide(64), 40, ONE_WORKER, 2**40)


@pytest.mark.parametrize(("share", "expected"), [(1.1, 64), (0.7, 32), (0.5, 16)])
def test_largest_micro_batch_under_a_limit(whole, share, expected):
    limit = int(share * whole.needed_bytes)
    fit = fitting.largest_fitting(wide(64), 40, ONE_WORKER, limit)
    assert fit.micro_batch_size == expected
    assert fit.needed_bytes <= limit


def test_no_micro_batch_fits(whole):
    assert fitting.largest_fitting(wide(64), 40, ONE_WORKER, 2**20) == Fit(None)
    impossible = wide(64, f"model.pad_vocab_to={2**42}")  # beyond any address space
    assert fitting.largest_fitting(impossible, 40, ONE_WORKER, 2**40) == Fit(None)


def test_advised_micro_batches_make_the_same_steps():
    experiment = wide(12, "train.global_batch_size=48")  # 4 micro-batches in 4 slots
    assert fitting.sizes_of_same_steps(experiment, 1) == [1, 2, 3, 4, 6, 12]
    assert fitting.sizes_of_same_steps(wide(12), 2) == [1, 2, 3, 6], "12 is one slot"


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (Fit(8, 1), "train.micro_batch_size=8 fits in the "),
        (Fit(None), "No smaller micro-batch fits in the "),
        (Fit(64, 2**29), "It needs 0.50 GiB and would fit in the "),
        (None, "Use a smaller train.micro_batch_size"),
    ],
)
def test_advice_says_what_was_measured(monkeypatch, fit, words):
    monkeypatch.setattr(fitting, "largest_fitting", lambda *_: fit)
    advice = fitting.advice(KILLED, wide(64), 40, ONE_WORKER)
    problem = f"out of memory on {HOST} with train.micro_batch_size=64: the kernel ended a worker. "
    assert advice.startswith(problem + words)


def test_advice_without_a_measurement():
    on_gpus = Layout(2, 1, True)
    assert "not the GPU's" in fitting.advice(KILLED, wide(4), 40, on_gpus)
    elsewhere = OutOfMemory("the kernel ended a worker", "elsewhere", 1, 0)
    assert "Use a smaller" in fitting.advice(elsewhere, wide(4), 40, ONE_WORKER)
