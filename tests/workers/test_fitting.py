"""A micro-batch that fits: measured in a process of its own."""

import socket
from collections.abc import Callable

import pytest

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.cost.timing import Timing
from orchestrator.workers import fitting
from orchestrator.workers.fitting import GIB, Fit
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
            "train.dtype=float32",
            "model.block_size=64",
            "model.pad_vocab_to=32768",
            f"train.micro_batch_size={size}",
            f"train.global_batch_size={size}",
            *words,
        ],
    )


def worker_with(needed: Callable[[int], float], measured: list[int]) -> Callable[..., Timing]:
    """Return a replacement of `time_worker`: a micro-batch of B sequences takes needed(B) GiB."""

    def time_worker(experiment: Experiment, *_: object, **__: object) -> Timing:
        size = experiment.train.micro_batch_size
        measured.append(size)
        return Timing(1, 1, 1, 1, 1, needed(size), 1)

    return time_worker


@pytest.mark.parametrize(
    ("limit_gib", "expected"), [(9, 64), (7.4, 64), (7.3, 32), (4.3, 32), (1.15, 1), (1, None)]
)
def test_largest_micro_batch_is_computed_from_two_and_checked(monkeypatch, limit_gib, expected):
    measured = []
    time_worker = worker_with(lambda size: 1 + 0.1 * size, measured)
    monkeypatch.setattr(fitting, "time_worker", time_worker)
    fit = fitting.largest_fitting(wide(64), 40, ONE_WORKER, limit_gib * GIB)
    assert fit.micro_batch_size == expected
    assert fit.needed_bytes <= limit_gib * GIB
    assert len(measured) <= 3


def test_answer_fits_if_small_micro_batches_mislead(monkeypatch):
    measured = []
    time_worker = worker_with(lambda size: max(2.0, 1 + 0.1 * size), measured)  # flat up to 10
    monkeypatch.setattr(fitting, "time_worker", time_worker)
    assert fitting.largest_fitting(wide(64), 40, ONE_WORKER, 5 * GIB) == Fit(2, 2 * GIB)
    assert measured == [1, 2, 64]


@pytest.mark.parametrize(("largest", "expected"), [(0, None), (1, 1), (2, 2), (32, 2)])
def test_measurement_that_runs_out_of_memory_does_not_fit(monkeypatch, largest, expected):
    def needed(size: int) -> float:
        if size > largest:
            raise MemoryError
        return 1 + 0.001 * size

    monkeypatch.setattr(fitting, "time_worker", worker_with(needed, []))
    fit = fitting.largest_fitting(wide(64), 40, ONE_WORKER, 2 * GIB)
    assert fit.micro_batch_size == expected


def test_real_measurement_fits_under_its_limit():
    fit = fitting.largest_fitting(wide(16), 40, ONE_WORKER, GIB)
    assert 1 < fit.micro_batch_size < 16
    assert fit.needed_bytes <= GIB
    impossible = wide(16, f"model.pad_vocab_to={2**42}")  # beyond any address space
    assert fitting.largest_fitting(impossible, 40, ONE_WORKER, 2**40) == Fit(None)


def test_unknown_memory_gives_no_answer(monkeypatch):
    monkeypatch.setattr(fitting, "time_worker", lambda *_, **__: None)
    assert fitting.largest_fitting(wide(64), 40, ONE_WORKER, GIB) is None


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
