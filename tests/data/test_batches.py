"""Micro-batches of every step, batches of an evaluation, and reading ahead."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.steps import BatchSizes
from orchestrator.data import batches as module
from orchestrator.data.batches import Batches, EvalBatches, Prefetcher
from orchestrator.data.order import sample_offsets
from orchestrator.errors import UserError

REPO = Path(__file__).resolve().parent.parent.parent


class CountingStream:
    """A stream whose token i is i."""

    directory = "here"
    split = "val"

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.array = np.arange(tokens, dtype=np.uint32)

    def read(self, offset: int, length: int) -> np.ndarray:
        assert 0 <= offset <= offset + length <= self.tokens
        return self.array[offset : offset + length]


# ---- training ----


def test_micro_batches_are_the_samples_of_the_step_in_order():
    batches = Batches(CountingStream(10_007), 64, BatchSizes(((0, 12),)), 4, 3)
    for step in (0, 1, 37, 400, 2):  # in any order
        offsets = sample_offsets(np.arange(step * 12, step * 12 + 12), 10_007, 64, 3)
        assert (batches.offsets(step) == offsets).all()
        for m in range(3):
            inputs, targets = batches.micro_batch(step, m)
            assert inputs.dtype == targets.dtype == np.int64
            assert inputs.flags.c_contiguous
            assert targets.flags.c_contiguous
            assert (inputs[:, 0] == offsets[4 * m : 4 * m + 4]).all()
            assert (inputs == inputs[:, :1] + np.arange(64)).all()
            assert (targets == inputs + 1).all()


def test_samples_of_a_batch_schedule_follow_each_other():
    batches = Batches(CountingStream(5_000), 32, BatchSizes(((0, 4), (3, 10), (9, 2))), 2, 11)
    steps = [9, *range(12)]  # in any order
    found = {step: batches.offsets(step) for step in steps}
    expected = sample_offsets(np.arange(3 * 4 + 6 * 10 + 3 * 2), 5_000, 32, 11)
    assert (np.concatenate([found[step] for step in range(12)]) == expected).all()
    assert [batches.micro_batches(step) for step in (2, 3, 8, 9)] == [2, 5, 5, 1]
    assert batches.epoch(4) == 22 / batches.windows_per_epoch


@pytest.mark.parametrize("ahead", [1, 7, 4096])
def test_offsets_do_not_depend_on_how_many_are_computed_at_once(monkeypatch, ahead):
    monkeypatch.setattr(module, "AHEAD", ahead)
    batches = Batches(CountingStream(5_000), 32, BatchSizes(((0, 10),)), 2, 11)
    expected = sample_offsets(np.arange(2_000), 5_000, 32, 11).reshape(200, 10)
    assert (np.stack([batches.offsets(step) for step in range(200)]) == expected).all()
    for step in reversed(range(200)):  # a replay goes back
        assert (batches.offsets(step) == expected[step]).all()


def test_epoch_counts_windows():
    batches = Batches(CountingStream(1_000), 10, BatchSizes(((0, 33),)), 33, 0)
    assert (batches.windows_per_epoch, batches.epoch(0), batches.epoch(3)) == (99, 0.0, 1.0)


def test_reading_imports_neither_ray_nor_pydantic_nor_torch():
    code = (
        "import sys\n"
        "for name in ('ray', 'pydantic', 'tiktoken', 'torch', 'mlflow'): sys.modules[name] = None\n"
        "import orchestrator.data.batches"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


# ---- evaluation ----


@given(
    n=st.integers(2, 300),
    block=st.integers(1, 40),
    rows=st.integers(1, 7),
    limit=st.none() | st.integers(2, 400),
)
def test_every_target_is_evaluated_once(n, block, rows, limit):
    batches = EvalBatches(CountingStream(n), block, rows, limit)
    found = [batches[i] for i in range(len(batches))]
    assert {array.shape for batch in found for array in batch[:2]} == {(rows, block)}
    inputs, targets = (np.concatenate([batch[i] for batch in found]) for i in (0, 1))
    real = targets >= 0
    assert targets[real].tolist() == list(range(1, min(n, limit or n)))
    assert (inputs[real] == targets[real] - 1).all()
    ids = np.concatenate([batch[2] for batch in found])
    assert (real.any(axis=1) == (ids >= 0)).all()
    assert ids[ids >= 0].tolist() == list(range((ids >= 0).sum()))
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("tokens", [0, 1])
def test_evaluation_needs_a_target(tokens):
    with pytest.raises(UserError, match="val has"):
        EvalBatches(CountingStream(tokens), 8, 2)


# ---- reading ahead ----


def test_prefetcher_returns_the_results_in_order():
    with Prefetcher(lambda i: i * i, range(100), depth=3) as squares:
        assert list(squares) == [i * i for i in range(100)]
        assert list(squares) == []


@pytest.mark.parametrize("where", ["fetch", "items"])
def test_exception_is_raised_in_the_place_of_its_result(where):
    def items():
        yield from range(3)
        if where == "items":
            raise KeyError("three")
        yield 3

    def fetch(i):
        if i == 3:
            raise KeyError("three")
        return i

    prefetcher = Prefetcher(fetch, items())
    seen = []
    with pytest.raises(KeyError, match="three"):
        seen.extend(prefetcher)
    assert seen == [0, 1, 2]
    assert list(prefetcher) == []


def test_no_more_than_depth_results_are_ready():
    fetched = []
    may_end = threading.Event()

    def fetch(i):
        fetched.append(i)
        if i == 2:
            may_end.set()

    with Prefetcher(fetch, range(1000), depth=2) as prefetcher:
        next(prefetcher)
        assert may_end.wait(60)
        assert fetched == [0, 1, 2]  # one was taken, two are ready


@pytest.mark.parametrize("end", ["close", "abandon", "exhaust"])
def test_thread_ends(end):
    prefetcher = Prefetcher(lambda i: i, range(3 if end == "exhaust" else 10**9))
    next(prefetcher)
    [thread] = prefetcher._thread._threads
    if end == "close":
        prefetcher.close()
        prefetcher.close()
    elif end == "exhaust":
        list(prefetcher)
    else:
        del prefetcher
        gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()
