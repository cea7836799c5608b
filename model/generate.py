"""Sampling: continue prompts with a model.

While the context is not full, the keys and values of earlier tokens are cached, so that a new token
costs a forward pass of one position. Once the context is full, the window slides, and each token
costs a forward pass of the whole window: the cached keys and values depend on tokens that have left
it, and, if positions are absolute, on the old positions.

Shapes: B sequences, T tokens of prompt, N new tokens, V = vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.protocol import Cache, HasCache, LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    n_vocab: int | None = None,
) -> Tensor:
    """Continue B prompts by N = `max_new_tokens` tokens: (B, T) int64 -> (B, T + N) int64.

    Dropout is off. The global random generators and the train/eval mode do not change. Each token
    depends on the last block_size tokens.

    Args:
        model: The model.
        tokens: The prompts, (B, T), on the device of the model.
        max_new_tokens: N.
        temperature: Divides the logits. 0: take the most probable token, of equal ones the
            first.
        top_k: Draw only from the k most probable tokens, and from tokens equal to the k-th.
        seed: Seed of a separate generator. None: a random seed from the system.
        n_vocab: Draw only ids below this; the others pad the vocabulary. None: draw all ids.

    Raises:
        ValueError: The logits are not finite.
    """
    generator = torch.Generator(device=tokens.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    cache = None
    if isinstance(model, HasCache):
        capacity = tokens.size(1) + max_new_tokens
        cache = model.new_cache(min(capacity, model.config.block_size))
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = _next_logits(model, tokens, cache)[:, :n_vocab]  # (B, n_vocab)
            drawn = _draw(logits, temperature, top_k, generator)  # (B, 1)
            tokens = torch.cat((tokens, drawn), dim=1)  # (B, T + 1)
    finally:
        model.train(was_training)
    return tokens


def _next_logits(model: LanguageModel, tokens: Tensor, cache: Cache | None) -> Tensor:
    """Return the logits after the last of `tokens`: (B, V) float32."""
    block_size = model.config.block_size
    if cache is None or tokens.size(1) > block_size:
        logits = model(tokens[:, -block_size:])
    else:
        logits = model(tokens[:, cache.length :], cache=cache)
    return logits[:, -1].float()


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """Draw one id for each row of `logits`: (B, V) -> (B, 1)."""
    # On a GPU, drawing from probabilities that are not finite would end the process.
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite: the weights are too large or not finite")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    # Shift the largest logit to 0 first. Otherwise a small temperature could give inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return torch.multinomial(F.softmax(scaled, dim=-1), num_samples=1, generator=generator)
