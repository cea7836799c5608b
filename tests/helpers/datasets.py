"""A small corpus of all kinds of files, and what a prepared dataset contains."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.config.sections import Data
from orchestrator.data.batches import TokenStream

STORY = (
    "It was a dark and stormy night;\r\n"
    "the rain fell in torrents, except at <|endoftext|> intervals. 中文 😀\n"
)


def quiet(stage: str, done: int, total: int) -> None:
    """Show no progress, but check it."""
    assert 0 <= done <= total, stage


def data(corpus: str | list[str] | Path, **fields) -> Data:
    """A `data` section of bytes. A folder of `write_mixed` is read kind by kind."""
    defaults = {"tokenizer": "byte", "append_eot": True, "val_fraction": 0.25}
    if isinstance(corpus, Path) and (corpus / "c.jsonl").exists():
        corpus = [
            f"{corpus}/{name}" for name in ("[ab]*.txt", "*.jsonl", "*.parquet", "[e-z]*.txt")
        ]
    if isinstance(corpus, Path):
        corpus = str(corpus)
    return Data(**{"corpus": corpus, **defaults, **fields})


def write_mixed(folder: Path) -> None:
    """Write 27 documents in every kind of file; some documents and one file are empty."""
    folder.mkdir(parents=True)
    (folder / "a.txt").write_bytes((STORY * 40).encode())
    (folder / "b.txt").write_bytes(b"")
    lines = [json.dumps({"text": f"line {i} {STORY * (i % 3)}"}) for i in range(12)]
    (folder / "c.jsonl").write_text("\n".join(lines))
    table = pa.table({"text": [STORY * (i % 4) for i in range(12)]})
    pq.write_table(table, folder / "d.parquet", row_group_size=5)
    (folder / "e.txt").write_bytes((STORY * 7).encode())


def mixed_documents(folder: Path) -> list[str]:
    """The documents of `write_mixed`, read in another way."""
    lines = (folder / "c.jsonl").read_text().splitlines()
    return [
        (folder / "a.txt").read_bytes().decode(),
        "",
        *[json.loads(line)["text"] for line in lines],
        *pq.read_table(folder / "d.parquet")["text"].to_pylist(),
        (folder / "e.txt").read_bytes().decode(),
    ]


def ids_of(directory: Path, split: str) -> np.ndarray:
    """All ids of a split."""
    stream = TokenStream(directory, split)
    return stream.read(0, stream.tokens)


def hashes_of(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a dataset."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name != ".lock"
    }


def change_in_place(path: Path) -> None:
    """Change one bit in the middle of a file; its size and time of the last write stay."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=times)
