"""Sampling: with cache = a plain loop; top_k, temperature and padding."""

import math

import pytest
import torch
from torch import Tensor

from model.generate import generate
from model.gpt import GPT, KVCache


def prompt(model: GPT, batch: int, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.config.vocab_size, (batch, steps), generator=generator)


def greedy(model: GPT, tokens: Tensor, new: int) -> Tensor:
    """Generate with one full forward pass per token, over the last block_size tokens."""
    for _ in range(new):
        logits = model(tokens[:, -model.config.block_size :])
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("steps", [1, 5, 15, 16, 17, 40])  # block_size is 16: below, at, beyond
def test_greedy_equals_plain_loop(small_gpt, steps):
    model = small_gpt()
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            # Otherwise a random model with a tied head repeats its input.
            parameter.mul_(4)
    tokens = prompt(model, batch=3, steps=steps)
    drawn = generate(model, tokens, 30, temperature=0)
    assert torch.equal(drawn, greedy(model, tokens, 30))
    assert len(drawn[:, steps:].unique()) > 9  # otherwise the test proves little


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0, "n_vocab": 50}]
)
def test_sampling_with_cache_equals_sampling_without(small_gpt, monkeypatch, options):
    model = small_gpt()
    tokens = prompt(model, batch=3, steps=4)
    with_cache = generate(model, tokens, 30, seed=11, **options)
    assert not torch.equal(with_cache, generate(model, tokens, 30, seed=12, **options))
    assert torch.equal(with_cache[:, :4], tokens)
    monkeypatch.setattr(
        "model.generate._next_logits",
        lambda model, tokens, _: model(tokens[:, -model.config.block_size :])[:, -1],
    )
    assert torch.equal(with_cache, generate(model, tokens, 30, seed=11, **options))


def test_cached_logits_equal_full_logits_for_any_prompt_length(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=2, steps=16)
    with torch.no_grad():
        whole = model.logits(tokens)
        for first in range(1, 16):
            cache = KVCache(model.config)
            pieces = [model(tokens[:, :first], cache=cache)]
            pieces += [model(tokens[:, t : t + 1], cache=cache) for t in range(first, 16)]
            assert cache.length == 16
            torch.testing.assert_close(
                torch.cat(pieces, dim=1), whole[:, first - 1 :], atol=1e-5, rtol=0
            )


def test_full_cache_refuses_more_tokens(small_gpt):
    model = small_gpt()
    cache = KVCache(model.config)
    model(prompt(model, 1, 16), cache=cache)
    with pytest.raises(ValueError, match="17 tokens.*block_size=16"):
        model(prompt(model, 1, 1), cache=cache)


def test_cache_works_under_autocast(small_gpt):
    model = small_gpt()
    with torch.autocast("cpu", torch.bfloat16):
        drawn = generate(model, prompt(model, 2, 4), 20, seed=0)
    assert drawn.shape == (2, 24)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_equal_softmax_of_logits(small_gpt, temperature):
    model = small_gpt(vocab_size=8)
    rows = 20_000
    tokens = prompt(model, batch=1, steps=3)
    drawn = generate(model, tokens.expand(rows, -1), 1, temperature=temperature, seed=0)[:, -1]
    expected = (model(tokens)[0, -1] / temperature).softmax(-1)
    observed = torch.bincount(drawn, minlength=8) / rows
    five_sigma = 5 * (expected * (1 - expected) / rows).sqrt() + 1 / rows
    assert ((observed - expected).abs() < five_sigma).all()


def test_top_k_draws_only_the_k_most_probable_tokens(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=1, steps=3)
    drawn = generate(model, tokens.expand(2000, -1), 1, temperature=5.0, top_k=4, seed=0)[:, -1]
    assert set(drawn.tolist()) == set(model(tokens)[0, -1].topk(4).indices.tolist())


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 1e-30}])
def test_top_1_and_tiny_temperature_are_greedy(small_gpt, options):
    model = small_gpt()
    tokens = prompt(model, batch=3, steps=4)
    assert torch.equal(generate(model, tokens, 30, seed=5, **options), greedy(model, tokens, 30))


def test_top_k_above_vocabulary_has_no_effect(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=3, steps=4)
    assert torch.equal(
        generate(model, tokens, 9, seed=5, top_k=10**6), generate(model, tokens, 9, seed=5)
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vocabulary_padding_is_never_drawn(small_gpt, temperature):
    model = small_gpt()
    tokens = prompt(model, batch=4, steps=4) % 50
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[50:] = 1.0  # padding is now most probable
    assert (generate(model, tokens, 20, temperature=temperature, seed=0)[:, 4:] >= 50).any()
    drawn = generate(model, tokens, 20, temperature=temperature, seed=0, n_vocab=50)
    assert (drawn < 50).all()


def test_global_rng_and_mode_do_not_change(small_gpt):
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


def test_calls_without_seed_differ(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=2, steps=4)
    assert not torch.equal(generate(model, tokens, 30), generate(model, tokens, 30))


def test_mode_is_restored_after_an_error(small_gpt, monkeypatch):
    model = small_gpt().train()
    monkeypatch.setattr(model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, prompt(model, 1, 1), 1)
    assert model.training


def test_zero_new_tokens_returns_prompt(small_gpt):
    model = small_gpt()
    tokens = prompt(model, batch=2, steps=4)
    assert torch.equal(generate(model, tokens, 0), tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(small_gpt, temperature, value):
    model = small_gpt()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = value
    with pytest.raises(ValueError, match="the logits are not finite"):
        generate(model, prompt(model, 1, 3), 2, temperature=temperature)
