"""Part files: the token ids of one chunk of the corpus, before they become shards.

Chunk 12 has the ids of `train` in `00000012.train.bin` and its documents in `00000012.train.json`
(a line for each), the same for `val`, and the sidecar `00000012.json`, which is written last. A
chunk is not tokenized again if its sidecar and SHA-256 are right. Laid end to end, the parts are
the token streams; a shard is an exact slice of a stream.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from orchestrator.data.dataset import ROW_TOKENS, Shard
from orchestrator.data.index import Entry
from orchestrator.data.shards import ROW_GROUP_ROWS, write_shard
from orchestrator.files import file_sha256, replacement

FORMAT = 2  # of the part files
SPLITS = ("train", "val")
_BLOCK = 1 << 20

Slice = tuple[str, int, int]  # part file, first token, number of tokens


class PartFacts(TypedDict):
    """What a sidecar says about one split of a chunk."""

    file: str  # name of its files, without suffix
    tokens: int
    characters: int
    bytes: int  # of UTF-8 text
    documents: int
    nulls: int  # null texts that were left out; counted in train
    sha256: str  # of the part file
    index_sha256: str  # of the file with its documents


ChunkFacts = dict[str, PartFacts]  # by split


def no_part() -> PartFacts:
    """Return the facts of a part without files."""
    return PartFacts(
        file="", tokens=0, characters=0, bytes=0, documents=0, nulls=0, sha256="", index_sha256=""
    )


def sidecar_file(folder: Path, chunk: int) -> Path:
    """Return the path of a sidecar."""
    return folder / f"{chunk:08d}.json"


def find_complete(folder: Path, chunk: int) -> ChunkFacts | None:
    """Return the sidecar of a chunk whose part files are complete; None if they are not."""
    try:
        facts = json.loads(sidecar_file(folder, chunk).read_bytes())
        for split in SPLITS:
            part = facts[split]
            for kind, sha256 in (("bin", part["sha256"]), ("json", part["index_sha256"])):
                if file_sha256(folder / f"{part['file']}.{kind}") != sha256:
                    return None
    except (OSError, ValueError, KeyError):
        return None
    return facts


class Part:
    """Writes the ids of one split of a chunk, and its documents, as they come.

    Args:
        files: Closes the files, and gives them their names.
        folder: Folder of the part files.
        chunk: Number of the chunk.
        split: `train` or `val`.
    """

    def __init__(self, files: ExitStack, folder: Path, chunk: int, split: str):
        self.facts = no_part()
        self.facts["file"] = f"{chunk:08d}.{split}"
        self._ids = _Output(files, folder / f"{self.facts['file']}.bin")
        self._index = _Output(files, folder / f"{self.facts['file']}.json")

    def begin(self, document: str) -> None:
        """Note that a document begins here."""
        self._index.write(json.dumps([document, self.facts["tokens"]]).encode() + b"\n")
        self.facts["documents"] += 1

    def add(self, ids: np.ndarray, text: str = "") -> None:
        """Append the ids of a text."""
        self._ids.write(ids.data)
        self.facts["tokens"] += len(ids)
        self.facts["characters"] += len(text)
        self.facts["bytes"] += len(text.encode())

    def finish(self) -> PartFacts:
        """Return the facts of all that was added."""
        self.facts["sha256"] = self._ids.digest.hexdigest()
        self.facts["index_sha256"] = self._index.digest.hexdigest()
        return self.facts


class _Output:
    """A file that is hashed while it is written. Its content need not survive a power failure."""

    def __init__(self, files: ExitStack, path: Path):
        temporary = files.enter_context(replacement(path, durable=False))
        self.file = files.enter_context(temporary.open("xb"))
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)


class Parts:
    """All part files of a dataset, in the order of the corpus.

    Args:
        folder: Their folder.
        facts: The sidecars.
    """

    def __init__(self, folder: Path, facts: list[ChunkFacts]):
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
        nulls = sum(part[split]["nulls"] for part in self.facts for split in SPLITS)
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
        for first, chunk in zip(self.starts[split], self.facts, strict=False):
            if chunk[split]["documents"] == 0:
                continue
            with open(self.folder / f"{chunk[split]['file']}.json", "rb") as lines:
                for document, offset in map(json.loads, lines):
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
                path = str(self._ids(chunk, split))
                found.append((path, first - starts[chunk], end - first))
            first = end
            chunk += 1
        return found

    def _ids(self, chunk: int, split: str) -> Path:
        return self.folder / f"{self.facts[chunk][split]['file']}.bin"

    def stream_sha256(self, split: str) -> str:
        """Return the SHA-256 of all ids of a split, as little-endian integers."""
        digest = hashlib.sha256()
        for chunk, part in enumerate(self.facts):
            if part[split]["tokens"] == 0:
                continue
            with open(self._ids(chunk, split), "rb") as file:
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
