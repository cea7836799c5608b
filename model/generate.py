"""Sampling: a model and the ids of a prompt in, the prompt and its continuation out.

The keys and values of tokens already seen are cached, so a new token costs one position and not the whole context,
until the context is full. From then on the window slides, and with learned absolute positions every token in it gets
another position, hence other keys: nothing can be reused, and each token costs a whole window. That is exact; a cache
that kept the old keys would be another model.

Shapes: B sequences, T tokens of prompt, N new tokens, V = vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.gpt import GPT, KVCache


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    n_vocab: int | None = None,
    use_cache: bool = True,
    stop_id: int | None = None,
) -> Tensor:
    """Continue each of B prompts by N = max_new_tokens tokens: (B, T) int64 -> (B, T + N) int64.

    temperature: logits are divided by it; 0 takes the likeliest token (the first of equals). top_k: only the k
    likeliest tokens (and those equal to the k-th). seed: of a generator of our own; None draws a fresh seed from the
    system. n_vocab: ids from here on are padding of the vocabulary and never drawn. stop_id: a row that has drawn it
    is filled with it, and the result is shorter when every row has.

    Works past block_size, on the last block_size tokens. Leaves the global RNGs and train/eval mode as they were;
    dropout is off meanwhile. `tokens` lie on the model's device.

    Raises ValueError for an empty prompt, ids outside the vocabulary, a negative temperature or length, top_k < 1.
    """
    _check(model, tokens, max_new_tokens, temperature, top_k, n_vocab)
    generator = torch.Generator(device=tokens.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    cache = KVCache(model.config, tokens.size(1) + max_new_tokens) if use_cache else None
    stopped = torch.zeros(tokens.size(0), 1, dtype=torch.bool, device=tokens.device)  # (B, 1)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = _next_logits(model, tokens, cache)[:, :n_vocab]  # (B, n_vocab)
            drawn = _draw(logits, temperature, top_k, generator)  # (B, 1)
            if stop_id is not None:
                drawn = drawn.masked_fill(stopped, stop_id)
                stopped |= drawn == stop_id
            tokens = torch.cat((tokens, drawn), dim=1)  # (B, T + 1)
            if stop_id is not None and stopped.all():
                break
    finally:
        model.train(was_training)
    return tokens


def _next_logits(model: GPT, tokens: Tensor, cache: KVCache | None) -> Tensor:
    """Logits after the last of `tokens`: (B, V) float32."""
    block_size = model.config.block_size
    if (
        cache is None or tokens.size(1) > block_size
    ):  # no cache, or a window that slides: see the top of the file
        logits, _ = model(tokens[:, -block_size:])
    else:
        logits, _ = model(tokens[:, cache.length :], cache=cache)
    return logits[:, -1].float()


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """One id for each row of `logits`: (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    # The largest logit is moved to 0 first: a tiny temperature must not overflow to inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return torch.multinomial(F.softmax(scaled, dim=-1), num_samples=1, generator=generator)


def _check(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    n_vocab: int | None,
):
    vocab_size = model.config.vocab_size
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(
            f"a prompt of shape (B, T) with at least one token is needed, got {tuple(tokens.shape)}"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"ids {int(tokens.min())}..{int(tokens.max())} do not lie in 0..{vocab_size - 1}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0 (0 is greedy), got {temperature!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(
            f"top_k must be at least 1, got {top_k} (leave it out to draw from the whole vocabulary)"
        )
    if n_vocab is not None and not 1 <= n_vocab <= vocab_size:
        raise ValueError(f"n_vocab must lie in 1..{vocab_size}, got {n_vocab}")
