"""Which tokens step n sees: a pure function of (data manifest, seed, n), and their reading from memory-mapped shards.

Eats a dataset's folder; yields windows of `block_size + 1` ids as inputs and targets. Windows have stride T within an
epoch, whose phase is hash(seed, epoch) mod T; their order is a keyed permutation of each epoch, a function and not an
array. Sample i of step n is position n·G + i of that order. The state to save is the step. No Ray.

Legend: N tokens of a split, T = block_size, B = micro_batch_size, G = global_batch_size.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.documents import documents_of
from orchestrator.errors import UserError
from orchestrator.manifest import load_manifest
from orchestrator.shards import map_shard, verify_shard

__all__ = ["Batches", "EvalBatches", "Prefetcher", "TokenStream", "documents_of", "eval_batches", "permute", "sample_offset",
           "windows_per_epoch"]
ROUNDS = 4  # of the Feistel network: a pseudo-random permutation from four on (Luby and Rackoff, 1988)


class TokenStream:
    """One split of a dataset as one continuous stream of `tokens` ids.

    Args:
        verify: compare each shard with its SHA-256 first, once per node and version of the file.
    """

    def __init__(self, directory: Path, split: str, verify: bool = True):
        entry = load_manifest(directory).splits[split]
        self.directory, self.split, self.tokens = Path(directory), split, entry.tokens
        self.pieces: list[np.ndarray] = []
        for shard in entry.shards:
            if verify:
                verify_shard(self.directory / shard.name, shard.sha256)
            self.pieces += map_shard(self.directory / shard.name)
        self.starts = np.cumsum([0, *map(len, self.pieces)])  # padding only ends the last piece
        if self.starts[-1] < self.tokens:
            raise UserError(f"{directory}: its {split} shards hold {self.starts[-1]:,} tokens, the manifest says "
                            f"{self.tokens:,}; prepare the tokens again")

    def read(self, offset: int, length: int) -> np.ndarray:
        """Tokens [offset, offset + length) as uint16 or uint32, a view where they lie in one piece."""
        assert 0 <= offset and offset + length <= self.tokens, (offset, length, self.tokens)
        i = int(np.searchsorted(self.starts, offset, side="right")) - 1
        start = offset - int(self.starts[i])
        window = self.pieces[i][start : start + length]
        if len(window) == length:
            return window
        return np.concatenate((window, self.read(offset + len(window), length - len(window))))


# ---- the order of samples ----
def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """(N − T) div T: as many windows of T + 1 tokens as fit whatever the phase.

    Raises:
        UserError: fewer than 2·T tokens.
    """
    if n_tokens < 2 * block_size:
        raise UserError(f"model.block_size: {block_size} needs at least {2 * block_size} tokens of train, there are {n_tokens}; "
                        f"use a smaller one or more text")
    return (n_tokens - block_size) // block_size


def sample_offset(position: int | np.ndarray, n_tokens: int, block_size: int, seed: int) -> int | np.ndarray:
    """Where in the stream the window at `position` of the run begins; positions count samples from 0 over all epochs."""
    windows = windows_per_epoch(n_tokens, block_size)
    positions = np.atleast_1d(np.asarray(position, dtype=np.int64))
    offsets = np.empty_like(positions)
    for epoch in np.unique(positions // windows):
        here = positions // windows == epoch
        phase = _hash(seed, int(epoch), "phase") % block_size
        order = permute(positions[here] % windows, windows, _hash(seed, int(epoch), "order"))
        offsets[here] = order * block_size + phase
    return offsets if np.ndim(position) else int(offsets[0])


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A permutation of range(n), chosen by `key` and evaluated at `index`, (k,) int64.

    A Feistel network on the smallest even number of bits that holds n, walked along its cycles until it is back in
    range (Black and Rogaway, 2002): at most four rounds of it are expected per index.
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


class Batches:
    """The micro-batches of every step of a run."""

    def __init__(self, stream: TokenStream, block_size: int, global_batch_size: int, micro_batch_size: int, seed: int):
        self.stream, self.block_size, self.seed = stream, block_size, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.windows_per_epoch = windows_per_epoch(stream.tokens, block_size)

    def epoch(self, step: int) -> float:
        """Epochs seen after `step` updates."""
        return step * self.global_batch_size / self.windows_per_epoch

    def offsets(self, step: int) -> np.ndarray:
        """Where the windows of the update after `step` updates begin, (G,) int64."""
        positions = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        return sample_offset(positions, self.stream.tokens, self.block_size, self.seed)

    def micro_batch(self, step: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of micro-batch m, (B, T) int64 each: targets are the inputs moved by one."""
        first = step * self.global_batch_size + m * self.micro_batch_size
        offsets = sample_offset(np.arange(first, first + self.micro_batch_size), self.stream.tokens, self.block_size, self.seed)
        windows = np.stack([self.stream.read(int(o), self.block_size + 1) for o in offsets]).astype(np.int64)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


# ---- evaluation ----
class EvalBatches:
    """All N − 1 targets of the first N tokens of a split, once each: `[i] -> (inputs, targets, window_ids)`.

    Inputs and targets are (B, T) int64, window_ids (B,). The tail of the last window and the rows that fill up the last
    batch have targets of -1, the latter a window id of -1. Every batch has the same shape, and which worker takes which
    is not decided here, so that results do not depend on their number.
    """

    def __init__(self, stream: TokenStream, block_size: int, micro_batch_size: int, tokens: int):
        self.stream, self.block_size, self.micro_batch_size, self.tokens = stream, block_size, micro_batch_size, tokens
        self.windows = -(-(tokens - 1) // block_size)

    def __len__(self) -> int:
        return -(-self.windows // self.micro_batch_size)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        b, t = self.micro_batch_size, self.block_size
        inputs, targets = np.zeros((b, t), np.int64), np.full((b, t), -1, np.int64)
        ids = np.arange(i * b, (i + 1) * b)
        ids[ids >= self.windows] = -1
        for row, window in enumerate(ids):
            if window >= 0:
                real = self.stream.read(int(window) * t, min(t + 1, self.tokens - int(window) * t))
                inputs[row, : len(real) - 1], targets[row, : len(real) - 1] = real[:-1], real[1:]
        return inputs, targets, ids


def eval_batches(stream: TokenStream, block_size: int, micro_batch_size: int, tokens_limit: int | None = None) -> EvalBatches:
    """Batches over the first `tokens_limit` tokens of a split, or over all of it."""
    tokens = min(tokens_limit or stream.tokens, stream.tokens)
    if tokens < 2:
        raise UserError(f"{stream.directory}: {stream.split} has {tokens} token(s), and a loss needs 2; use more text or "
                        f"another data.val_fraction")
    return EvalBatches(stream, block_size, micro_batch_size, tokens)


# ---- reading ahead ----
class Prefetcher:
    """Iterates over `fetch(item)` for each item, `depth` of them ahead in a background thread.

    An exception in `fetch` reaches the consumer in its place. `close` ends the thread; so does dropping the iterator.
    """

    def __init__(self, fetch: Callable[[Any], Any], items: Iterable[Any], depth: int = 2):
        self.ready: queue.Queue = queue.Queue(depth)
        self.closed = threading.Event()
        # The thread holds the queue and the event but not self: an abandoned prefetcher can be collected.
        self.thread = threading.Thread(target=_fetch_all, args=(fetch, items, self.ready, self.closed), daemon=True,
                                       name="prefetch")
        self.thread.start()

    def __iter__(self) -> Iterator[Any]:
        while True:
            value, error, ended = self.ready.get()
            if error is not None:
                raise error
            if ended:
                return
            yield value

    def close(self) -> None:
        self.closed.set()
        self.thread.join(timeout=10)

    def __del__(self):
        self.closed.set()


def _fetch_all(fetch: Callable[[Any], Any], items: Iterable[Any], ready: queue.Queue, closed: threading.Event) -> None:
    def put(entry: tuple) -> bool:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put((fetch(item), None, False)):
                return
        put((None, None, True))
    except BaseException as error:  # noqa: BLE001 - the consumer decides what it means
        put((None, error, False))
