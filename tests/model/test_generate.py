"""Sampling: with the cache = without = the plainest loop, and only what was asked for is drawn."""

import pytest
import torch
from torch import Tensor

from model.generate import generate
from model.gpt import GPT, KVCache


def prompt(model: GPT, batch: int, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.config.vocab_size, (batch, steps), generator=generator)


def greedy(model: GPT, tokens: Tensor, new: int) -> Tensor:
    """The plainest loop: one whole forward for each token, over the last block_size tokens."""
    for _ in range(new):
        logits, _ = model(tokens[:, -model.config.block_size :])
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("steps", [1, 5, 15, 16, 17, 40])  # block_size is 16: below, at, beyond
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_the_plainest_loop(small_gpt, steps, use_cache):
    model = small_gpt()
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.mul_(
                4
            )  # the blocks decide: else a random model with a tied head repeats what it has read
    tokens = prompt(model, batch=3, steps=steps)
    drawn = generate(model, tokens, 30, temperature=0, use_cache=use_cache)
    assert torch.equal(drawn, greedy(model, tokens, 30))
    assert len(drawn[:, steps:].unique()) > 9  # a model that repeats itself would prove little


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0, "n_vocab": 50}]
)
def test_sampling_with_the_cache_equals_sampling_without(small_gpt, options):
    model = small_gpt()
    tokens = prompt(model, batch=3, steps=4)
    with_cache = generate(model, tokens, 30, seed=11, **options)
    assert torch.equal(with_cache, generate(model, tokens, 30, seed=11, use_cache=False, **options))
    assert not torch.equal(with_cache, generate(model, tokens, 30, seed=12, **options))
    assert torch.equal(with_cache[:, :4], tokens)


def test_cached_logits_equal_whole_ones_for_any_length_of_prompt(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=2, steps=16)
    with torch.no_grad():
        whole, _ = model(tokens, tokens)
        for first in range(1, 16):
            cache = KVCache(model.config)
            pieces = [model(tokens[:, :first], cache=cache)[0]]
            pieces += [model(tokens[:, t : t + 1], cache=cache)[0] for t in range(first, 16)]
            assert cache.length == 16
            torch.testing.assert_close(
                torch.cat(pieces, dim=1), whole[:, first - 1 :], atol=1e-5, rtol=0
            )


def test_a_full_cache_takes_no_more(small_gpt):
    model = small_gpt()
    cache = KVCache(model.config)
    model(prompt(model, 1, 16), cache=cache)
    with pytest.raises(ValueError, match="17 tokens.*block_size=16"):
        model(prompt(model, 1, 1), cache=cache)


def test_the_cache_follows_autocast(small_gpt):
    model = small_gpt()
    with torch.autocast("cpu", torch.bfloat16):
        drawn = generate(model, prompt(model, 2, 4), 20, seed=0)
    assert drawn.shape == (2, 24)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_of_the_logits(small_gpt, temperature):
    model = small_gpt(vocab_size=8)
    rows = 20_000
    tokens = prompt(model, batch=1, steps=3)
    drawn = generate(model, tokens.expand(rows, -1), 1, temperature=temperature, seed=0)[:, -1]
    expected = (model(tokens)[0][0, -1] / temperature).softmax(-1)
    observed = torch.bincount(drawn, minlength=8) / rows
    five_sigma = 5 * (expected * (1 - expected) / rows).sqrt() + 1 / rows
    assert ((observed - expected).abs() < five_sigma).all()


def test_top_k_draws_all_of_the_k_likeliest_and_nothing_else(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=1, steps=3)
    drawn = generate(model, tokens.expand(2000, -1), 1, temperature=5.0, top_k=4, seed=0)[:, -1]
    assert set(drawn.tolist()) == set(model(tokens)[0][0, -1].topk(4).indices.tolist())


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 1e-30}])
def test_the_limits_of_sampling_are_greedy(small_gpt, options):
    model = small_gpt()
    tokens = prompt(model, batch=3, steps=4)
    assert torch.equal(generate(model, tokens, 30, seed=5, **options), greedy(model, tokens, 30))


def test_a_top_k_above_the_vocabulary_is_no_limit(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=3, steps=4)
    assert torch.equal(
        generate(model, tokens, 9, seed=5, top_k=10**6), generate(model, tokens, 9, seed=5)
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_of_the_vocabulary_is_never_drawn(small_gpt, temperature):
    model = small_gpt()
    tokens = prompt(model, batch=4, steps=4) % 50
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[50:] = 1.0  # now padding is what the model wants most
    assert (generate(model, tokens, 20, temperature=temperature, seed=0)[:, 4:] >= 50).any()
    drawn = generate(model, tokens, 20, temperature=temperature, seed=0, n_vocab=50)
    assert (drawn < 50).all()


def test_a_row_that_stopped_stays_stopped(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=6, steps=2)
    free = generate(model, tokens, 40, seed=1)
    stop_id = int(free[0, 7])
    stopped = generate(model, tokens, 40, seed=1, stop_id=stop_id)
    for free_row, row in zip(free[:, 2:], stopped[:, 2:], strict=True):
        ends = (free_row == stop_id).nonzero()
        end = int(ends[0]) + 1 if len(ends) else len(row)
        assert torch.equal(row[:end], free_row[: len(row)][:end])
        assert (row[end:] == stop_id).all()


def test_generation_ends_when_every_row_has(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=1, steps=2)
    free = generate(model, tokens, 40, temperature=0)
    stop_id = int(free[0, 5])
    first = int((free[0, 2:] == stop_id).nonzero()[0]) + 2
    assert torch.equal(
        generate(model, tokens, 40, temperature=0, stop_id=stop_id), free[:, : first + 1]
    )


def test_nothing_else_is_touched(small_gpt):
    model = small_gpt(dropout=0.5).train()
    tokens = prompt(model, batch=2, steps=4)
    before, kept = torch.get_rng_state(), tokens.clone()
    drawn = [generate(model, tokens, 5, seed=seed) for seed in (7, 7, None)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(tokens, kept)
    assert torch.equal(drawn[0], drawn[1])  # dropout was off
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    generate(model, tokens, 1)
    assert not model.training


def test_without_a_seed_every_call_differs(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=2, steps=4)
    assert not torch.equal(generate(model, tokens, 30), generate(model, tokens, 30))


def test_the_mode_comes_back_after_a_failure(small_gpt, monkeypatch):
    model = small_gpt().train()
    monkeypatch.setattr(model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, prompt(model, 1, 1), 1)
    assert model.training


def test_no_new_tokens_is_the_prompt(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=2, steps=4)
    assert torch.equal(generate(model, tokens, 0), tokens)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"tokens": torch.zeros(3, dtype=torch.long)}, r"\(3,\)"),
        ({"tokens": torch.tensor([[3, 61]])}, "3..61.*0..60"),
        ({"tokens": torch.tensor([[-1, 4]])}, "-1..4"),
        ({"max_new_tokens": -1}, "max_new_tokens.*-1"),
        ({"temperature": -0.5}, "temperature.*-0.5"),
        ({"temperature": float("nan")}, "temperature.*nan"),
        ({"top_k": 0}, "top_k.*0"),
        ({"n_vocab": 62}, "n_vocab.*62"),
    ],
)
def test_impossible_requests_are_refused(small_gpt, wrong, said):
    with pytest.raises(ValueError, match=said):
        generate(small_gpt(), **{"tokens": torch.tensor([[1, 2]]), "max_new_tokens": 1, **wrong})
