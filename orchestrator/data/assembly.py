"""Parts laid end to end are the stream of a split; a shard is an exact slice of it. Arithmetic on counts, no tokens.

Eats the counts of every part; yields the jobs that write shards, and what the manifest says of a split.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.dataset import ROW_TOKENS


class Parts:
    """The part files of a preparation, in the order of the corpus.

    Args:
        counts: of each part, `{split: {"tokens", "bytes", "documents"}}`.
    """

    def __init__(self, folder: Path, counts: list[dict[str, Any]], splits: tuple[str, ...]):
        self.folder, self.counts = folder, counts
        self.starts = {
            s: [0, *accumulate(c[s]["tokens"] for c in counts)] for s in splits
        }  # first token of each, end

    def tokens(self, split: str) -> int:
        return self.starts[split][-1]

    def totals(self, split: str) -> dict[str, int]:
        """`{"tokens", "bytes", "documents"}` of a split."""
        return {
            key: sum(c[split][key] for c in self.counts) for key in ("tokens", "bytes", "documents")
        }

    def shards(
        self, split: str, directory: Path, shard_rows: int, dtype: np.dtype
    ) -> Iterator[dict[str, Any]]:
        """Jobs of `parts.assemble`, one for each `shard_rows` rows."""
        size, end = shard_rows * ROW_TOKENS, self.tokens(split)
        for number, first in enumerate(range(0, end, size)):
            stop = min(first + size, end)
            yield {
                "path": str(directory / f"{split}-{number:05d}.parquet"),
                "tokens": stop - first,
                "dtype": dtype.str,
                "slices": self.slices(split, first, stop),
            }

    def slices(self, split: str, first: int, stop: int) -> list[list[Any]]:
        """Tokens [first, stop) of a split as [part file, first token in it, count] each."""
        starts, found = self.starts[split], []
        i = bisect_right(starts, first) - 1
        while first < stop:
            count = min(stop, starts[i + 1]) - first
            if count:
                found.append([str(self._path(i, split)), first - starts[i], count])
            first, i = first + count, i + 1
        return found

    def stream_sha256(self, split: str) -> str:
        """Of all tokens of a split as little-endian integers."""
        digest = hashlib.sha256()
        for i in range(len(self.counts)):
            with open(self._path(i, split), "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def documents(self, split: str) -> Iterator[tuple[int, str]]:
        """(first token, document) of a split, read from one sidecar after the other."""
        for i, first in enumerate(self.starts[split][:-1]):
            for document, offset in json.loads((self.folder / f"{i:08d}.json").read_bytes())[split][
                "index"
            ]:
                # A file name may hold bytes that are no UTF-8; Parquet's strings may not.
                yield first + offset, document.encode("utf-8", "replace").decode()

    def _path(self, i: int, split: str) -> Path:
        return self.folder / f"{i:08d}.{split}.bin"
