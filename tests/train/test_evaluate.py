"""Evaluation: each target once, the same bits for any number of ranks."""

import contextlib
import math
import threading

import numpy as np
import pytest
import torch

from model.gpt import GPT
from model.gpt_config import GPTConfig
from orchestrator.train import evaluate as evaluate_module
from orchestrator.train.evaluate import EvalSet

T, B, VOCAB = 8, 3, 17
STREAM = np.random.default_rng(1).integers(0, VOCAB, 100)
BYTES = np.arange(1, VOCAB + 1)


def batches(tokens: int = len(STREAM)) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Windows of stride T over the stream, in batches of B; the tail is padded with -1."""
    windows = []
    for number, start in enumerate(range(0, tokens - 1, T)):
        real = STREAM[start : min(start + T + 1, tokens)]
        inputs, targets = np.zeros(T, np.int64), np.full(T, -1, np.int64)
        inputs[: len(real) - 1], targets[: len(real) - 1] = real[:-1], real[1:]
        windows.append((inputs, targets, number))
    while len(windows) % B:
        windows.append((np.zeros(T, np.int64), np.full(T, -1, np.int64), -1))
    groups = [windows[i : i + B] for i in range(0, len(windows), B)]
    return [
        tuple(np.stack([np.asarray(w[k]) for w in group]) for k in range(3)) for group in groups
    ]


def model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(2)
    return GPT(GPTConfig(T, VOCAB, 1, 2, 8, dropout))


def evaluate(gpt: GPT, data, **worker):
    return EvalSet(data, BYTES).evaluate(
        gpt, torch.device("cpu"), contextlib.nullcontext(), **worker
    )


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 25, 99, 100])
def test_loss_is_the_mean_over_all_targets_and_bits_are_per_byte(tokens):
    gpt = model()
    total = 0.0
    for i in range(1, tokens):  # each target by itself, after the tokens of its window
        start = (i - 1) // T * T
        logits = gpt(torch.from_numpy(STREAM[start:i])[None])[0, -1].double()
        total -= torch.log_softmax(logits, 0)[STREAM[i]].item()
    result = evaluate(gpt, batches(tokens))
    assert result.tokens == tokens - 1
    assert math.isclose(result.loss, total / (tokens - 1), rel_tol=1e-5)
    assert math.isclose(
        result.bits_per_byte, total / math.log(2) / BYTES[STREAM[1:tokens]].sum(), rel_tol=1e-5
    )


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_any_number_of_ranks_gives_the_same_bits(world, monkeypatch):
    # The ranks are threads; their all_reduce is a sum after a barrier, as in gloo.
    gpt, barrier, shared = model().eval(), threading.Barrier(world), []

    def all_reduce(sums):
        shared.append(sums.clone())
        barrier.wait()
        sums.copy_(torch.stack(shared).sum(dim=0))

    monkeypatch.setattr(evaluate_module.dist, "all_reduce", all_reduce)
    results = [None] * world

    def rank(r: int) -> None:
        results[r] = evaluate(gpt, batches(), rank=r, world_size=world)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [evaluate(gpt, batches())] * world


def test_evaluation_has_no_dropout_and_does_not_change_the_model():
    gpt = model(dropout=0.5)
    for training in (True, False):
        gpt.train(training)
        first, again = evaluate(gpt, batches()), evaluate(gpt, batches())
        assert first == again
        assert gpt.training == training
    assert all(p.grad is None for p in gpt.parameters())
