"""nanoGPT's way to prepare tokens: tiktoken in a pool of processes, whose ids go into one memmap.

benchmarks/token_pool.py CORPUS TARGET PROCESSES
"""

import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken

BLOCK = 1 << 20  # characters of one text that a process gets at once


def read_texts(corpus: Path) -> Iterator[str | Path]:
    """Return the documents of a corpus, or their files."""
    if corpus.is_dir():
        yield from sorted(corpus.rglob("*.txt"))
    elif corpus.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(corpus).iter_batches(1024):
            yield from batch.column(0).to_pylist()
    else:
        with open(corpus, encoding="utf-8", newline="") as lines:
            if corpus.suffix == ".jsonl":
                yield from (json.loads(line)["text"] for line in lines)
            while corpus.suffix == ".txt" and (text := lines.read(BLOCK)):
                yield text


def encode(text: str | Path) -> list[int]:
    """Return the ids of a document."""
    encoding = tiktoken.get_encoding("gpt2")
    if isinstance(text, Path):
        text = text.read_bytes().decode()
    return [*encoding.encode_ordinary(text), encoding.eot_token]


def pool(corpus: Path, target: Path, cpus: int) -> None:
    """Write the ids of a corpus into one memmap."""
    with multiprocessing.Pool(cpus) as processes:
        ids = [
            np.array(found, np.uint16) for found in processes.imap(encode, read_texts(corpus), 8)
        ]
    total = sum(map(len, ids))
    stored = np.memmap(target, np.uint16, "w+", shape=(total,))
    first = 0
    for found in ids:
        stored[first : first + len(found)] = found
        first += len(found)
    stored.flush()


if __name__ == "__main__":
    pool(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
