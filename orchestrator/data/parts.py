"""Part files: the token ids of one chunk of the corpus, before they become shards.

Chunk 12 has the ids of `train` in `00000012.train.bin` and its documents in `00000012.train.json`,
the same for `val`, and the sidecar `00000012.json`, which is written last. A chunk is not tokenized
again if its sidecar and SHA-256 are right. Laid end to end, the parts are the token streams; a
shard is an exact slice of a stream.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from orchestrator.data.dataset import ROW_TOKENS, Shard
from orchestrator.data.index import Entry
from orchestrator.data.shards import ROW_GROUP_ROWS, write_shard
from orchestrator.files import file_sha256, replacement, write_atomically

SPLITS = ("train", "val")
_BLOCK = 1 << 20

Index = list[tuple[str, int]]  # document, its first token in the part
Slice = tuple[str, int, int]  # part file, first token, number of tokens


class PartFacts(TypedDict):
    """What a sidecar says about one split of a chunk."""

    tokens: int
    bytes: int  # of UTF-8 text
    documents: int
    nulls: int  # null texts that were left out; counted in train
    sha256: str  # of the part file
    index_sha256: str  # of the file with its documents


def part_file(folder: Path, chunk: int, split: str, kind: str = "bin") -> Path:
    """Return the path of a part's file: its ids (`bin`) or its documents (`json`)."""
    return folder / f"{chunk:08d}.{split}.{kind}"


def sidecar_file(folder: Path, chunk: int) -> Path:
    """Return the path of a sidecar."""
    return folder / f"{chunk:08d}.json"


def find_complete(folder: Path, chunk: int) -> dict[str, PartFacts] | None:
    """Return the sidecar of a chunk whose part files are complete; None if they are not."""
    try:
        facts = json.loads(sidecar_file(folder, chunk).read_bytes())
        for split in SPLITS:
            part = facts[split]
            for kind, sha256 in (("bin", part["sha256"]), ("json", part["index_sha256"])):
                if file_sha256(part_file(folder, chunk, split, kind)) != sha256:
                    return None
    except (OSError, ValueError, KeyError):
        return None
    return facts


@dataclass
class Part:
    """The ids of one split of a chunk, in memory."""

    arrays: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0
    bytes: int = 0  # of UTF-8 text
    nulls: int = 0
    index: Index = field(default_factory=list)

    def add(self, ids: np.ndarray) -> None:
        """Append ids."""
        self.arrays.append(ids)
        self.tokens += len(ids)

    def save(self, folder: Path, chunk: int, split: str) -> PartFacts:
        """Write the part files."""
        data = b"".join(ids.data for ids in self.arrays)
        write_atomically(part_file(folder, chunk, split), data)
        index = json.dumps(self.index).encode()
        write_atomically(part_file(folder, chunk, split, "json"), index)
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": len(self.index),
            "nulls": self.nulls,
            "sha256": hashlib.sha256(data).hexdigest(),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }


class Parts:
    """All part files of a dataset, in the order of the corpus.

    Args:
        folder: Their folder.
        facts: The sidecars.
    """

    def __init__(self, folder: Path, facts: list[dict[str, PartFacts]]):
        self.folder = folder
        self.facts = facts
        # First token of each part in its stream, and then the end of the stream.
        self.starts = {
            split: [0, *accumulate(part[split]["tokens"] for part in facts)] for split in SPLITS
        }

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return self.starts[split][-1]

    def totals(self, split: str) -> dict[str, int]:
        """Return the numbers of tokens, bytes and documents of a split."""
        parts = [part[split] for part in self.facts]
        return {
            "tokens": self.tokens(split),
            "bytes": sum(part["bytes"] for part in parts),
            "documents": sum(part["documents"] for part in parts),
        }

    def __str__(self) -> str:
        """Return `361 train, 40 val, 98,900 bytes of text; left out: 3 null`."""
        totals = {split: self.totals(split) for split in SPLITS}
        counts = [f"{total['documents']:,} {split}" for split, total in totals.items()]
        size = sum(total["bytes"] for total in totals.values())
        nulls = sum(part["train"]["nulls"] for part in self.facts)
        line = f"{', '.join(counts)}, {size:,} bytes of text"
        return f"{line}; left out: {nulls:,} null" if nulls else line

    def shard_jobs(
        self, split: str, directory: Path, shard_rows: int, dtype: np.dtype
    ) -> list[dict[str, Any]]:
        """Return the arguments of `write_slices` for each shard of a split."""
        stop = self.tokens(split)
        size = shard_rows * ROW_TOKENS
        return [
            {
                "path": str(directory / f"{split}-{number:05d}.parquet"),
                "dtype": dtype.str,
                "slices": self._slices(split, first, min(first + size, stop)),
            }
            for number, first in enumerate(range(0, stop, size))
        ]

    def documents(self, split: str) -> Iterator[Entry]:
        """Return first token and name of each document of a split."""
        for chunk, first in enumerate(self.starts[split][:-1]):
            file = part_file(self.folder, chunk, split, "json")
            for document, offset in json.loads(file.read_bytes()):
                # A file name may have bytes that are not UTF-8, which Parquet does not allow.
                yield first + offset, document.encode("utf-8", "replace").decode()

    def _slices(self, split: str, first: int, stop: int) -> list[Slice]:
        """Return the slices of part files that hold tokens [first, stop) of a split."""
        starts = self.starts[split]
        chunk = bisect_right(starts, first) - 1
        found = []
        while first < stop:
            end = min(stop, starts[chunk + 1])
            if first < end:
                path = str(part_file(self.folder, chunk, split))
                found.append((path, first - starts[chunk], end - first))
            first = end
            chunk += 1
        return found

    def stream_sha256(self, split: str) -> str:
        """Return the SHA-256 of all ids of a split, as little-endian integers."""
        digest = hashlib.sha256()
        for chunk in range(len(self.facts)):
            with open(part_file(self.folder, chunk, split), "rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        return digest.hexdigest()


def write_slices(path: str, dtype: str, slices: list[Slice]) -> Shard:
    """Write slices of part files as one shard; its file appears only when it is complete."""
    file = Path(path)
    id_type = np.dtype(dtype)
    with replacement(file) as temporary:
        rows = write_shard(temporary, id_type, _row_groups(slices, id_type))
    tokens = sum(count for _, _, count in slices)
    return Shard(file.name, rows, tokens, file_sha256(file))


def _row_groups(slices: list[Slice], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Return the ids of slices, end to end, in row groups; zeros fill up the last row."""
    size = ROW_GROUP_ROWS * ROW_TOKENS
    group = np.zeros(size, dtype)
    filled = 0
    for path, first, count in slices:
        with open(path, "rb") as file:
            file.seek(first * dtype.itemsize)
            while count > 0:
                ids = np.fromfile(file, dtype, min(count, size - filled))
                assert len(ids) > 0, f"{path} is shorter than its sidecar says"
                group[filled : filled + len(ids)] = ids
                filled += len(ids)
                count -= len(ids)
                if filled == size:
                    yield group
                    group = np.zeros(size, dtype)
                    filled = 0
    if filled > 0:
        rows = -(-filled // ROW_TOKENS)  # rounded up
        yield group[: rows * ROW_TOKENS]
