"""A micro-batch that fits: measured in a process of its own."""

import socket
from collections.abc import Callable

import pytest

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.cost.timing import Timing
from orchestrator.errors import UserError
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


# ---- train.micro_batch_size=auto ----


def auto(*words: str) -> Experiment:
    return load_experiment(None, ["train.micro_batch_size=auto", "model.block_size=64", *words])


@pytest.mark.parametrize(
    ("words", "layout", "sizes"),
    [
        (["train.global_batch_size=12"], Layout(1, 1, False), [1, 2, 4]),
        (["train.global_batch_size=12"], Layout(2, 1, False), [1, 2]),
        (["train.global_batch_size=12"], Layout(3, 1, False), [1]),
        (["train.global_batch_size=12"], Layout(4, 1, False), [1]),
        (["train.global_batch_size=64"], Layout(2, 1, False), [1, 2, 4, 8, 16, 32]),
        (["train.global_batch_size=64", "train.reduction_slots=8"], ONE_WORKER, [1, 2, 4, 8]),
        (
            ["train.global_batch_size=null", "train.batch_schedule={0: 16, 9: 32}"],
            ONE_WORKER,
            [1, 2, 4, 8, 16],
        ),
        # At most 4,096 tokens on a CPU, but always one sequence.
        (["train.global_batch_size=64", "model.block_size=1024"], ONE_WORKER, [1, 2, 4]),
        (["train.global_batch_size=64", "model.block_size=8192"], ONE_WORKER, [1]),
        (
            ["train.global_batch_size=64", "model.block_size=1024"],
            Layout(1, 1, True),
            [1, 2, 4, 8, 16, 32, 64],
        ),
    ],
)
def test_sizes_of_auto_are_powers_of_two_that_the_workers_can_share(words, layout, sizes):
    experiment = auto(*words)
    assert fitting.auto_sizes([experiment], layout) == sizes
    for size in sizes:  # each is a valid experiment for these workers
        load_experiment(
            None,
            [*words, f"train.micro_batch_size={size}", f"compute.num_workers={layout.num_workers}"],
        )


@pytest.mark.parametrize(
    ("room_gib", "measured", "size"),
    [(9, [64], 64), (3, [64, 32, 16], 16), (1.1, [64, 32, 16, 8, 4, 2, 1], 1)],
)
@pytest.mark.parametrize("use_gpu", [False, True])
def test_auto_is_the_largest_size_that_fits(monkeypatch, capsys, room_gib, measured, size, use_gpu):
    """A stand-in for a GPU: memory that runs out raises MemoryError, as `time_worker` does."""
    tried = []

    def time_worker(experiment, n_vocab, layout, *_, **__):
        tried.append(experiment.train.micro_batch_size)
        assert (layout.use_gpu, experiment.train.dtype) == (use_gpu, "float32")
        if use_gpu and tried[-1] > size:
            raise MemoryError
        return Timing(1, 1, 1, 1, 1, 1 + 0.1 * tried[-1], 1)

    monkeypatch.setattr(fitting, "time_worker", time_worker)
    monkeypatch.setattr(fitting, "_room", lambda layout, stages: room_gib * GIB)
    monkeypatch.setattr("orchestrator.cluster.device.has_several_nodes", lambda: False)
    experiment = auto("train.global_batch_size=64", "train.dtype=auto")
    layout = fitting.with_auto_size(Layout(1, 1, use_gpu), [(experiment, 40)])
    assert layout.micro_batch_size == size
    assert tried == measured
    assert f"train.micro_batch_size=auto: {size}" in capsys.readouterr().out


def test_one_size_for_all_trials_is_that_of_the_largest_model(monkeypatch):
    tried = []
    monkeypatch.setattr(fitting, "time_worker", worker_with(lambda size: 1, tried))
    monkeypatch.setattr("orchestrator.cluster.device.has_several_nodes", lambda: False)
    small = auto("train.global_batch_size=64")
    large = auto("train.global_batch_size=48", "model.n_layer=8")
    fixed = wide(2)
    layout = fitting.with_auto_size(ONE_WORKER, [(small, 40), (large, 40), (fixed, 40)])
    assert (layout.micro_batch_size, tried) == (16, [16])  # the largest power of two in 48
    assert fitting.with_auto_size(layout, [(small, 40)]) is layout  # measured once
    assert fitting.with_auto_size(ONE_WORKER, [(fixed, 40)]) is ONE_WORKER


@pytest.mark.parametrize(
    ("timing", "n_vocab", "says"),
    [
        (Timing(1, 1, 1, 1, 1, 99, 1), 40, "one sequence needs more than the 9.00 GiB"),
        ("no GPU", 40, "cannot be measured on this machine; give a number"),
        ("", None, "the tokens are not prepared yet"),
    ],
)
def test_auto_that_cannot_be_found_is_one_line(monkeypatch, timing, n_vocab, says):
    monkeypatch.setattr(fitting, "time_worker", lambda *_, **__: timing)
    monkeypatch.setattr(fitting, "_room", lambda layout, stages: 9 * GIB)
    monkeypatch.setattr("orchestrator.cluster.device.has_several_nodes", lambda: False)
    with pytest.raises(UserError, match=f"^train.micro_batch_size: auto: .*{says}"):
        fitting.with_auto_size(ONE_WORKER, [(auto(), n_vocab)])


@pytest.mark.slow  # `test_real_measurement_fits_under_its_limit` measures in the same way
def test_real_measurement_of_auto(monkeypatch):
    monkeypatch.setattr("orchestrator.cluster.device.has_several_nodes", lambda: False)
    experiment = wide(64).replace(train__micro_batch_size="auto")
    large = fitting._needed(experiment, 64, 40, ONE_WORKER)
    # Two measurements of the same step differ by some percent.
    monkeypatch.setattr(fitting, "_room", lambda layout, stages: 0.85 * large)
    assert fitting.with_auto_size(ONE_WORKER, [(experiment, 40)]).micro_batch_size == 32


def test_number_fits_the_most_workers_that_may_come_later():
    words = ["train.micro_batch_size=auto", "train.global_batch_size=32"]
    experiment = load_experiment(None, [*words, "compute.num_workers=[1, 8]"])
    assert fitting.auto_sizes([experiment], Layout(1, 1, False)) == [1, 2, 4]
