"""The order of samples: a pure function of seed and position, the same on all workers.

Notation: N tokens of a split, T block_size. A window has T + 1 tokens and windows have stride T, so
an epoch has (N − T) div T windows. Position p, counted over all epochs, is window p mod windows of
epoch p div windows; sample i of step n has position i + the samples of all steps before n.

Each epoch visits its windows in the order of its own keyed permutation, which is a function and not
an array. Each epoch also starts at its own phase, so that a small corpus is not cut at the same
places in every epoch.

This is a format. A change here changes the samples of every run that is resumed or replayed.
"""

import hashlib

import numpy as np

from orchestrator.errors import UserError

# Rounds of the Feistel network. Four make a pseudo-random permutation (Luby and Rackoff, 1988).
ROUNDS = 4


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """Return (N − T) div T: the number of windows that fit at every phase.

    Raises:
        UserError: There are fewer than 2·T tokens.
    """
    if n_tokens < 2 * block_size:
        raise UserError(
            f"model.block_size: {block_size} needs at least {2 * block_size} tokens of train, "
            f"there are {n_tokens}; use a smaller block_size or more text"
        )
    return (n_tokens - block_size) // block_size


def check_tokens(train: int, val: int, block_size: int) -> None:
    """Raise UserError if a split with this number of tokens is too small for a loss."""
    windows_per_epoch(train, block_size)
    if val < 2:
        raise UserError(
            f"data.val_fraction: val has {val} token(s), and a loss needs 2; use more text or a "
            "larger data.val_fraction"
        )


def sample_offsets(positions: np.ndarray, n_tokens: int, block_size: int, seed: int) -> np.ndarray:
    """Return the first token of the window at each position, int64, at most N − T − 1.

    Args:
        positions: Numbers of samples from 0 over all epochs, int64, of any shape.
        n_tokens: N.
        block_size: T.
        seed: `train.seed`.
    """
    windows = windows_per_epoch(n_tokens, block_size)
    epochs, samples = np.divmod(positions, windows)
    offsets = np.empty_like(samples)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        phase = _hash(int(seed), epoch, "phase") % block_size
        order = permute(samples[here], windows, _hash(int(seed), epoch, "order"))
        offsets[here] = order * block_size + phase
    return offsets


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Return the elements `index` of the permutation of range(n) with this key, (k,) int64.

    A Feistel network permutes the smallest range of 2^b numbers, b even, that contains range(n). A
    result outside of range(n) is permuted again until it is inside (cycle walking, Black and
    Rogaway, 2002). At most four applications per index are expected.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(_hash(key, r, "round")) for r in range(ROUNDS)]
    result = _feistel(index.astype(np.uint64), half, keys)
    outside = result >= n
    while outside.any():
        result[outside] = _feistel(result[outside], half, keys)
        outside = result >= n
    return result.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    """Permute the numbers of 2 · `half` bits."""
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    left = x >> shift
    right = x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << shift | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Return splitmix64's finalizer: each bit depends on all input bits (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _hash(*key: int | str) -> int:
    """Return 64 bits that depend on `key` alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
