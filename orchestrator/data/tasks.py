"""The three jobs of a preparation, each a pure function of a file system and a small dict: survey, tokenize, assemble.

Ray runs them anywhere and in any order (see `tokens.py`); none knows of Ray. A chunk's ids go to part files, one for
each split, with a sidecar that is written last: `00000012.train.bin`, `00000012.val.bin`, `00000012.json`. A part whose
sidecar and SHA-256 are right is not made again. Shards are exact slices of the parts laid end to end.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.dataset import ROW_TOKENS
from orchestrator.data.documents import Piece, Span, pieces
from orchestrator.data.shards import ROW_GROUP_ROWS, write_shard
from orchestrator.data.tokenizer import Tokenizer, load_tokenizer
from orchestrator.errors import UserError
from orchestrator.files import file_sha256, fsync, write_atomically

SPLITS = ("train", "val")
_LONG_SPACE = re.compile(r"\s{100000,}")


def survey(job: dict[str, Any]) -> dict[str, Any]:
    """SHA-256 of whole files, or the characters of a chunk.

    `{"sources": [[number, path], …]}` -> `{"bytes", "sha256": [[number, hex], …]}`;
    `{"id", "spans", "text_field"}` -> `{"bytes", "id", "characters", "seen"}`.
    """
    if "sources" in job:
        return {
            "bytes": sum(os.path.getsize(path) for _, path in job["sources"]),
            "sha256": [[number, file_sha256(path)] for number, path in job["sources"]],
        }
    count, seen = 0, set()
    for piece in _pieces(job):
        count += len(piece.text)
        seen.update(piece.text)
    return {
        "bytes": sum(span["end"] - span["start"] for span in job["spans"]),
        "id": job["id"],
        "characters": count,
        "seen": "".join(sorted(seen)),
    }


def tokenize(job: dict[str, Any]) -> dict[str, Any]:
    """Turn a chunk into its part files, unless they are there.

    Args:
        job: `id`, `spans`, `text_field`, `tokenizer` (name, SHA-256), `directory`, `parts`, `append_eot`, and what
            decides the split: `cut` (characters of this chunk that come before val), or `val_fraction` and `val_spans`
            (whether a span of a text file is val, whose hash is known beforehand; None for other kinds).

    Returns:
        `{"id", "train": {"tokens", "bytes", "documents"}, "val": {…}}`.
    """
    stem = os.path.join(job["parts"], f"{job['id']:08d}")
    done = _complete(stem)
    if done is None:
        tokenizer = _tokenizer(*job["tokenizer"], job["directory"])
        writers = {split: _Writer(f"{stem}.{split}.bin", tokenizer) for split in SPLITS}
        try:
            for split, piece, opens in _assigned(job):
                writers[split].add(piece, opens, job["append_eot"])
            done = {split: writer.close() for split, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.discard()
        write_atomically(Path(f"{stem}.json"), json.dumps(done), durable=True)
    return {
        "id": job["id"],
        **{
            split: {"tokens": d["tokens"], "bytes": d["bytes"], "documents": len(d["index"])}
            for split, d in done.items()
        },
    }


def assemble(job: dict[str, Any]) -> dict[str, Any]:
    """Write one shard; under its name it is whole or not there.

    `path`, `tokens`, `dtype`, `slices`: [[part file, first token, count], …] -> its entry in the manifest.
    """
    path = Path(job["path"])
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        rows = write_shard(
            temporary, np.dtype(job["dtype"]), _row_groups(job["slices"], np.dtype(job["dtype"]))
        )
        fsync(temporary)
        sha256 = file_sha256(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": path.name, "rows": rows, "tokens": job["tokens"], "sha256": sha256}


def tail_cut(characters: int, val_fraction: float) -> int:
    """`split: tail`: how many characters are train. As an exact fraction: 1 - 0.9 as a float is less than 0.1."""
    return int((1 - Fraction(str(val_fraction))) * characters)


def is_val(content_sha256: str, val_fraction: float) -> bool:
    """`split: hash`: a document's own hash decides, so that other documents never move it."""
    return int(content_sha256[:16], 16) < val_fraction * 2**64


# ---- which split ----
def _assigned(job: dict[str, Any]) -> Iterator[tuple[str, Piece, bool]]:
    """Pieces with their split, and whether a document (or the val part of one that is cut) begins there."""
    if job["cut"] is None:
        for span, val in zip(job["spans"], job["val_spans"], strict=True):
            for piece in pieces(Span(**span), job["text_field"]):
                if span["kind"] != "text":
                    val = is_val(
                        hashlib.sha256(piece.text.encode()).hexdigest(), job["val_fraction"]
                    )
                yield SPLITS[val], piece, piece.starts
        return
    position = 0
    for piece in _pieces(job):
        yield from _cut(piece, job["cut"] - position)
        position += len(piece.text)


def _cut(piece: Piece, cut: int) -> Iterator[tuple[str, Piece, bool]]:
    """Split a piece after `cut` characters. An end belongs to the split of the last character before it."""
    n = len(piece.text)
    if n == 0 and not piece.starts:
        # The empty rest of a document whose last character is exactly at the cut: its end must not slip into val.
        yield SPLITS[cut < 0], piece, False
    elif cut >= n and cut > 0:
        yield "train", piece, piece.starts
    elif cut <= 0:
        yield "val", piece, piece.starts or cut == 0
    else:
        yield (
            "train",
            Piece(piece.document, piece.text[:cut], piece.offset, piece.starts, False),
            piece.starts,
        )
        rest = piece.offset + len(piece.text[:cut].encode())
        yield "val", Piece(piece.document, piece.text[cut:], rest, False, piece.ends), True


def _pieces(job: dict[str, Any]) -> Iterator[Piece]:
    for span in job["spans"]:
        yield from pieces(Span(**span), job["text_field"])


# ---- parts ----
@dataclass
class _Writer:
    """Ids of one split of one chunk, under a name of its own: a killed driver's orphans may still write theirs."""

    path: str
    tokenizer: Tokenizer
    tokens: int = 0
    bytes: int = 0
    index: list[tuple[str, int]] = field(
        default_factory=list
    )  # document, its first token in this part

    def __post_init__(self):
        self.temporary = f"{self.path}.{os.getpid()}-{os.urandom(4).hex()}"
        self.file, self.digest = open(self.temporary, "wb"), hashlib.sha256()  # noqa: SIM115 - closed by close or discard

    def add(self, piece: Piece, opens: bool, append_eot: bool) -> None:
        if opens:
            self.index.append((piece.document, self.tokens))
        self._write(encode(self.tokenizer, piece))
        self.bytes += len(piece.text.encode())
        if append_eot and piece.ends:
            self._write(np.array([self.tokenizer.eot_id], self.tokenizer.dtype))

    def _write(self, ids: np.ndarray) -> None:
        self.file.write(ids.data)
        self.digest.update(ids.data)
        self.tokens += len(ids)

    def close(self) -> dict[str, Any]:
        self.file.close()
        os.replace(self.temporary, self.path)
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "sha256": self.digest.hexdigest(),
            "index": self.index,
        }

    def discard(self) -> None:
        self.file.close()
        Path(self.temporary).unlink(missing_ok=True)


def encode(tokenizer: Tokenizer, piece: Piece) -> np.ndarray:
    """Ids of a piece, (tokens,).

    Raises:
        UserError: about 1,000,000 whitespace characters in a row are more than tiktoken can take.
    """
    try:
        return tokenizer.encode(piece.text)
    except BaseException as error:
        # tiktoken's regular expressions overflow with a ValueError or with Rust's panic, which is no Exception.
        if type(error).__name__ != "PanicException" and not (
            isinstance(error, ValueError) and "Regex" in str(error)
        ):
            raise
        run = _LONG_SPACE.search(piece.text)
        where = (
            f"{len(run[0]):,} whitespace characters in a row"
            if run
            else "a run too long for its pattern"
        )
        at = (
            f" from its byte {piece.offset + len(piece.text[: run.start()].encode())} on"
            if run
            else ""
        )
        raise UserError(
            f"{piece.document}: {where}{at}, more than tiktoken can take; shorten it in the corpus, or use "
            f"data.tokenizer=byte"
        ) from None


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str, sha256: str, directory: str) -> Tokenizer:
    # The hash is in the key: a worker lives longer than a dataset, and `char` in the same folder may be another one.
    return load_tokenizer(name, Path(directory))


def _complete(stem: str) -> dict[str, Any] | None:
    try:
        done = json.loads(Path(f"{stem}.json").read_bytes())
        whole = all(file_sha256(f"{stem}.{split}.bin") == done[split]["sha256"] for split in SPLITS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return done if whole else None


# ---- shards ----
def _row_groups(slices: list[list[Any]], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Slices of part files end to end, in row groups; the last one padded with zeros to whole rows."""
    size = ROW_GROUP_ROWS * ROW_TOKENS
    group, filled = np.zeros(size, dtype), 0
    for path, first, count in slices:
        with open(path, "rb") as file:
            file.seek(first * dtype.itemsize)
            while count:
                ids = np.fromfile(file, dtype, min(count, size - filled))
                assert len(ids), f"{path} is shorter than its sidecar says"
                group[filled : filled + len(ids)] = ids
                filled, count = filled + len(ids), count - len(ids)
                if filled == size:
                    yield group
                    group, filled = np.zeros(size, dtype), 0
    if filled:
        yield group[: -(-filled // ROW_TOKENS) * ROW_TOKENS]
