#!/usr/bin/env python3
"""Measure what the number of files of a corpus costs a command whose dataset is there already.

    benchmarks/files.py [FILES …]     default: 1 1000 10000 100000

prepare: make the dataset of so many small text files, without Ray.
find: list the files, compare them with the dataset, and open it, as each command does.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator import hashes
from orchestrator.config.sections import Data
from orchestrator.data.batches import TokenStream
from orchestrator.data.prepare import prepare_in

FILES = [1, 1_000, 10_000, 100_000]
TEXT_BYTES = 36


def write_corpus(folder: Path, files: int) -> None:
    """Write files of a few words, at most 1,000 in a folder."""
    for number in range(files):
        file = folder / f"{number // 1000:03d}" / f"{number:06d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number:06d}".ljust(TEXT_BYTES, "."))


def cpu_seconds(work: Callable[[], None]) -> float:
    """Return the CPU time that a function takes."""
    before = time.process_time()
    work()
    return time.process_time() - before


def measure(files: int, storage: Path) -> list[str]:
    """Return one row of the table."""
    write_corpus(storage / "corpus", files)
    data = Data(corpus=str(storage / "corpus"), tokenizer="byte", val_fraction=0.5)

    def find() -> None:
        hashes.forget()  # as a new process
        dataset = prepare_in(data, storage, lambda *_: None)
        TokenStream(dataset.directory, "train", dataset)

    prepare_s = cpu_seconds(find)
    started = time.monotonic()
    find_s = cpu_seconds(find)
    wall_s = time.monotonic() - started
    return [f"{files:,}", f"{prepare_s:.1f}", f"{find_s:.2f}", f"{wall_s:.2f}"]


def main(argv: list[str]) -> None:
    """Print the table."""
    print("| files | prepare, CPU s | find, CPU s | find, s |\n|---:|---:|---:|---:|")
    for files in map(int, argv or FILES):
        storage = Path(tempfile.mkdtemp(prefix="espalier-files-"))
        os.environ["XDG_CACHE_HOME"] = str(storage / "cache")
        try:
            print(f"| {' | '.join(measure(files, storage))} |", flush=True)
        finally:
            shutil.rmtree(storage)


if __name__ == "__main__":
    main(sys.argv[1:])
