"""Windows of tokens for training steps and evaluations, as a function of (dataset, seed, step).

Shards are memory-mapped, so all workers of a node share one copy in the page cache. Nothing is kept
from step to step: the only state to save is the step.

Notation: N tokens of the split, T block_size, B micro_batch_size, G batch size of a step.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config.steps import BatchSizes
from orchestrator.data.dataset import Manifest, load_manifest, verify
from orchestrator.data.order import sample_offsets, windows_per_epoch
from orchestrator.data.shards import map_shard
from orchestrator.errors import UserError
from orchestrator.hashes import Stamp, stamp

# Offsets are computed for at least this many samples at once: a call takes 0.1 ms for one sample or
# for hundreds.
AHEAD = 4096


class TokenStream:
    """One split of a dataset as one stream of `tokens` ids.

    Args:
        directory: Folder of the dataset.
        split: `train` or `val`.
        manifest: The dataset, if it was loaded already.

    Raises:
        UserError: There is no such dataset or split, or a shard is missing or changed.
    """

    def __init__(self, directory: Path, split: str, manifest: Manifest | None = None):
        self.directory = Path(directory)
        self.split = split
        splits = (manifest or load_manifest(directory)).splits
        if split not in splits:
            raise UserError(f"{directory}: has no split '{split}', only {' and '.join(splits)}")
        self.tokens = splits[split].tokens
        self.versions: dict[Path, Stamp] = {}  # of the shards, when they were verified
        self.row_groups: list[np.ndarray] = []
        self.starts = [0]  # first token of each row group, then the end of the last one
        for shard in splits[split].shards:
            path = self.directory / shard.name
            self.versions[path] = verify(path, shard.sha256)
            for row_group in map_shard(path):
                self.row_groups.append(row_group)
                self.starts.append(self.starts[-1] + len(row_group))

    def read(self, offset: int, length: int) -> np.ndarray:
        """Return tokens [offset, offset + length), uint16 or uint32.

        The result is a view of the file if the tokens lie in one row group, else a copy.
        """
        if not 0 <= offset <= offset + length <= self.tokens:
            raise IndexError(
                f"tokens [{offset}, {offset + length}) of {self.tokens} in {self.split}"
            )
        i = bisect_right(self.starts, offset, hi=len(self.row_groups)) - 1
        start = offset - self.starts[i]
        window = self.row_groups[i][start : start + length]
        if len(window) == length:
            return window
        rest = self.read(offset + len(window), length - len(window))
        return np.concatenate((window, rest))


def check_unchanged(streams: Iterable[TokenStream]) -> None:
    """Check that no shard was written to, replaced or removed since it was verified.

    A mapping shows later writes to its file. If this check passes, all that was read before it is
    what the manifest describes.

    Raises:
        UserError: A shard was changed.
    """
    for stream in streams:
        for path, version in stream.versions.items():
            if not path.exists() or stamp(path) != version:
                raise UserError(
                    f"{path}: was changed while it was read, so nothing computed since the last "
                    "checkpoint is kept; run the same command again, which verifies the file first"
                )


class Batches:
    """The micro-batches of every step of a run. `step` counts the updates that are done."""

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        sizes: BatchSizes,
        micro_batch_size: int,
        seed: int,
    ):
        assert all(size % micro_batch_size == 0 for _, size in sizes.stretches)
        self.stream = stream
        self.block_size = block_size
        self.sizes = sizes
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.windows_per_epoch = windows_per_epoch(stream.tokens, block_size)
        # First sample whose offset is known, and the known offsets from there on.
        self._ahead = (0, np.empty(0, np.int64))

    def epoch(self, step: int) -> float:
        """Return the number of epochs that `step` updates have seen."""
        return self.sizes.before(step) / self.windows_per_epoch

    def micro_batches(self, step: int) -> int:
        """Return the number of micro-batches of the update after `step` updates."""
        return self.sizes.at(step) // self.micro_batch_size

    def offsets(self, step: int) -> np.ndarray:
        """Return the first token of each window of the update after `step` updates, (G,) int64."""
        size = self.sizes.at(step)
        position = self.sizes.before(step)
        # The pair is read and written as a whole: two threads at worst compute the same offsets.
        first, known = self._ahead
        if not first <= position <= position + size <= first + len(known):
            first = position
            positions = np.arange(position, position + max(size, AHEAD), dtype=np.int64)
            known = sample_offsets(positions, self.stream.tokens, self.block_size, self.seed)
            self._ahead = (first, known)
        return known[position - first : position - first + size]

    def micro_batch(self, step: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of micro-batch m, (B, T) int64 each."""
        size = self.micro_batch_size
        inputs = np.empty((size, self.block_size), np.int64)
        targets = np.empty_like(inputs)
        offsets = self.offsets(step)[m * size : (m + 1) * size]
        for row, offset in enumerate(offsets.tolist()):
            window = self.stream.read(offset, self.block_size + 1)
            inputs[row] = window[:-1]
            targets[row] = window[1:]
        return inputs, targets


class EvalBatches:
    """All N − 1 targets of the first N tokens of a split, each exactly once.

    Batch i is `(inputs, targets, window_ids)`, (B, T), (B, T) and (B,) int64. Windows have stride
    T. Targets after the last token are -1; rows that fill up the last batch have window id -1. All
    batches have the same shape, so the loss does not depend on the number of workers.

    Args:
        stream: The split.
        block_size: T.
        micro_batch_size: B.
        tokens: N, at most `stream.tokens`; None for all.

    Raises:
        UserError: There are fewer than two tokens, so there is no target.
    """

    def __init__(
        self, stream: TokenStream, block_size: int, micro_batch_size: int, tokens: int | None = None
    ):
        self.stream = stream
        self.block_size = block_size
        self.micro_batch_size = micro_batch_size
        self.tokens = min(tokens or stream.tokens, stream.tokens)
        if self.tokens < 2:
            raise UserError(
                f"{stream.directory}: {stream.split} has {self.tokens} token(s), and a loss needs "
                "2; use more text or another data.val_fraction"
            )
        self.windows = -(-(self.tokens - 1) // block_size)  # rounded up

    def __len__(self) -> int:
        return -(-self.windows // self.micro_batch_size)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        size = self.micro_batch_size
        inputs = np.zeros((size, self.block_size), np.int64)
        targets = np.full_like(inputs, -1)
        window_ids = np.full(size, -1, np.int64)
        for row, window in enumerate(range(i * size, min((i + 1) * size, self.windows))):
            start = window * self.block_size
            tokens = self.stream.read(start, min(self.block_size + 1, self.tokens - start))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
            window_ids[row] = window
        return inputs, targets, window_ids


class Prefetcher:
    """Iterates over `fetch(item) for item in items`, in order, in a background thread.

    Up to `depth` results are computed in advance. An exception of `fetch` or `items` is raised in
    the place of its result. The thread ends, after its current fetch, when `close` is called, the
    `with` block ends or the object is garbage-collected.
    """

    def __init__(self, fetch: Callable[[Any], Any], items: Iterable[Any], depth: int = 2):
        iterator = iter(items)

        def fetch_next() -> Any:
            return fetch(next(iterator))

        # The thread has no reference to this object, so that it can be garbage-collected.
        self._fetch_next = fetch_next
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._results: deque[Future] = deque(self._submit() for _ in range(depth))

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if not self._results:
            raise StopIteration
        self._results.append(self._submit())
        try:
            return self._results.popleft().result()
        except BaseException:  # also the StopIteration of `items`
            self.close()
            raise

    def close(self) -> None:
        """End the thread and wait for it."""
        self._results.clear()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self) -> Future:
        return self._thread.submit(self._fetch_next)
