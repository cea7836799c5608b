"""(dataset, seed, step) -> windows of tokens: what a training step and an evaluation read.

Eats a dataset's folder; yields int64 arrays. Shards are memory-mapped, so the workers of a node share one copy in the
page cache, and nothing is kept from step to step: the state to save is the step. No Ray. The order is `order.py`'s.

Legend: N tokens of the split; T block_size; B micro_batch_size; G global_batch_size.
"""

from bisect import bisect_right
from pathlib import Path

import numpy as np

from orchestrator.data.dataset import load_manifest
from orchestrator.data.index import documents_of
from orchestrator.data.order import sample_offset, windows_per_epoch
from orchestrator.data.prefetch import Prefetcher
from orchestrator.data.shards import map_shard
from orchestrator.data.shards import verify as verify_file
from orchestrator.errors import UserError

__all__ = [
    "Batches",
    "EvalBatches",
    "Prefetcher",
    "TokenStream",
    "documents_of",
    "eval_batches",
    "sample_offset",
]
AHEAD = 4096  # positions whose offsets are computed at once: a call costs 0.1 ms, for one of them or for hundreds


class TokenStream:
    """One split of a dataset as one continuous stream of `tokens` ids.

    Args:
        verify: compare each shard with its SHA-256 first, once per node and version of the file.

    Raises:
        UserError: no such dataset or split; a shard that is missing, changed or laid out otherwise.
    """

    def __init__(self, directory: Path, split: str, verify: bool = True):
        splits = load_manifest(directory).splits
        if split not in splits:
            raise UserError(f"{directory}: has no split '{split}', only {' and '.join(splits)}")
        self.directory, self.split, self.tokens = Path(directory), split, splits[split].tokens
        self.pieces: list[np.ndarray] = []
        self.starts = [0]  # of the pieces, and the end; only the last piece has padding
        for shard in splits[split].shards:
            if verify:
                verify_file(self.directory / shard.name, shard.sha256)
            for piece in map_shard(self.directory / shard.name):
                self.pieces.append(piece)
                self.starts.append(self.starts[-1] + len(piece))
        if self.starts[-1] < self.tokens:
            raise UserError(
                f"{directory}: its {split} shards hold {self.starts[-1]:,} tokens, the manifest says "
                f"{self.tokens:,}; prepare the tokens again"
            )

    def read(self, offset: int, length: int) -> np.ndarray:
        """Tokens [offset, offset + length) as uint16 or uint32, a view where they lie in one piece."""
        if not 0 <= offset <= offset + length <= self.tokens:
            raise IndexError(
                f"tokens [{offset}, {offset + length}) of {self.tokens} in {self.split}"
            )
        i = bisect_right(self.starts, offset, hi=len(self.pieces)) - 1
        start = offset - self.starts[i]
        window = self.pieces[i][start : start + length]
        if len(window) == length:
            return window
        return np.concatenate((window, self.read(offset + len(window), length - len(window))))


class Batches:
    """The micro-batches of every step of a run: `step` counts updates already done."""

    def __init__(
        self,
        stream: TokenStream,
        block_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
    ):
        assert global_batch_size % micro_batch_size == 0
        self.stream, self.block_size, self.seed = stream, block_size, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.windows_per_epoch = windows_per_epoch(stream.tokens, block_size)
        self._ahead = (0, np.empty(0, np.int64))  # a first position, and the offsets from there on

    def epoch(self, step: int) -> float:
        """Epochs seen after `step` updates."""
        return step * self.global_batch_size / self.windows_per_epoch

    def offsets(self, step: int) -> np.ndarray:
        """Where the windows of the update after `step` updates begin, (G,) int64."""
        size, position = self.global_batch_size, step * self.global_batch_size
        first, known = (
            self._ahead
        )  # read and replaced as one, so that threads at worst compute it twice
        if not first <= position <= position + size <= first + len(known):
            positions = np.arange(position, position + max(size, AHEAD), dtype=np.int64)
            first, known = (
                position,
                sample_offset(positions, self.stream.tokens, self.block_size, self.seed),
            )
            self._ahead = (first, known)
        return known[position - first : position - first + size]

    def micro_batch(self, step: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of micro-batch m, (B, T) int64 each: targets are the inputs moved by one."""
        b, t = self.micro_batch_size, self.block_size
        inputs, targets = np.empty((b, t), np.int64), np.empty((b, t), np.int64)
        for row, offset in enumerate(self.offsets(step)[m * b : (m + 1) * b].tolist()):
            window = self.stream.read(offset, t + 1)
            inputs[row], targets[row] = window[:-1], window[1:]
        return inputs, targets


class EvalBatches:
    """All N − 1 targets of the first N tokens of a split, once each: `[i] -> (inputs, targets, window_ids)`.

    Inputs and targets are (B, T) int64, window_ids (B,). Windows have stride T. The tail of the last window and the
    rows that fill up the last batch have targets of -1, the latter a window id of -1. Every batch has the same shape,
    and which worker takes which is not decided here, so that results do not depend on their number.
    """

    def __init__(self, stream: TokenStream, block_size: int, micro_batch_size: int, tokens: int):
        self.stream, self.block_size, self.micro_batch_size, self.tokens = (
            stream,
            block_size,
            micro_batch_size,
            tokens,
        )
        self.windows = -(-(tokens - 1) // block_size)

    def __len__(self) -> int:
        return -(-self.windows // self.micro_batch_size)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        b, t = self.micro_batch_size, self.block_size
        inputs, targets, ids = (
            np.zeros((b, t), np.int64),
            np.full((b, t), -1, np.int64),
            np.full(b, -1, np.int64),
        )
        for row, window in enumerate(range(i * b, min((i + 1) * b, self.windows))):
            real = self.stream.read(window * t, min(t + 1, self.tokens - window * t))
            inputs[row, : len(real) - 1], targets[row, : len(real) - 1], ids[row] = (
                real[:-1],
                real[1:],
                window,
            )
        return inputs, targets, ids


def eval_batches(
    stream: TokenStream, block_size: int, micro_batch_size: int, tokens_limit: int | None = None
) -> EvalBatches:
    """Batches over the first `tokens_limit` tokens of a split, or over all of it.

    Raises:
        UserError: fewer than two tokens, so no target.
    """
    tokens = min(tokens_limit or stream.tokens, stream.tokens)
    if tokens < 2:
        raise UserError(
            f"{stream.directory}: {stream.split} has {tokens} token(s), and a loss needs 2; use more text "
            f"or another data.val_fraction"
        )
    return EvalBatches(stream, block_size, micro_batch_size, tokens)
