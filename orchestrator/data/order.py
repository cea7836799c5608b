"""The order of samples: a pure function of seed and position, so that every worker and every restart agrees on it.

Legend: N tokens of a split; T block_size; windows of T + 1 tokens with stride T, (N − T) div T of them in an epoch
whatever its phase. Sample i of step n is position n · global_batch_size + i, and position p is window p mod windows of
epoch p div windows. An epoch visits its windows by a keyed permutation of its own, a function and not an array, and
starts at a phase of its own, so that a small corpus is not cut at the same places in every epoch. This is a format:
what a run has seen can be told only as long as these functions stay as they are.
"""

import hashlib

import numpy as np

from orchestrator.errors import UserError

ROUNDS = (
    4  # of the Feistel network: a pseudo-random permutation from four on (Luby and Rackoff, 1988)
)


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """(N − T) div T: as many windows of T + 1 tokens as fit whatever the phase.

    Raises:
        UserError: fewer than 2·T tokens.
    """
    if n_tokens < 2 * block_size:
        raise UserError(
            f"model.block_size: {block_size} needs at least {2 * block_size} tokens of train, there are "
            f"{n_tokens}; use a smaller one or more text"
        )
    return (n_tokens - block_size) // block_size


def sample_offset(
    position: int | np.ndarray, n_tokens: int, block_size: int, seed: int
) -> int | np.ndarray:
    """The token at which the window of a position begins, at most N − T − 1.

    Args:
        position: p ≥ 0 or an array of them; positions count samples from 0 over all epochs.
    """
    windows = windows_per_epoch(n_tokens, block_size)
    epochs, samples = np.divmod(np.atleast_1d(np.asarray(position, dtype=np.int64)), windows)
    offsets = np.empty_like(samples)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        phase = _hash(int(seed), epoch, "phase") % block_size
        offsets[here] = (
            permute(samples[here], windows, _hash(int(seed), epoch, "order")) * block_size + phase
        )
    return offsets if np.ndim(position) else int(offsets[0])


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A permutation of range(n), chosen by `key` and evaluated at `index`, (k,) int64.

    A Feistel network on the smallest even number of bits that holds n, walked along its cycles until it is back in
    range (Black and Rogaway, 2002): four applications at most are expected per index.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(_hash(key, r, "round")) for r in range(ROUNDS)]
    result = _feistel(index.astype(np.uint64), half, keys)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << shift | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele et al. 2014): every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _hash(*key: int | str) -> int:
    """64 bits that are a function of `key` alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
