#!/usr/bin/env python3
"""Measure what the number of files of a corpus costs a command whose dataset is there already.

    benchmarks/files.py [FILES …]     default: 1 1000 10000 100000

prepare: make the dataset of so many small text files, without Ray.
find: list the files, compare them with the dataset, and open it, as each command does.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = [1, 1_000, 10_000, 100_000]
TEXT_BYTES = 36

# In a process of its own, which knows only what the cache has. Imports are not measured.
WORK = """
import sys, time
from pathlib import Path
from orchestrator.config.sections import Data
from orchestrator.data.batches import TokenStream
from orchestrator.data.prepare import prepare_in

storage = Path(sys.argv[1])
data = Data(corpus=str(storage / "corpus"), tokenizer="byte", val_fraction=0.5)
cpu, clock = time.process_time(), time.monotonic()
dataset = prepare_in(data, storage, lambda *_: None)
TokenStream(dataset.directory, "train", dataset)
print(time.process_time() - cpu, time.monotonic() - clock)
"""


def write_corpus(folder: Path, files: int) -> None:
    """Write files of a few words, at most 1,000 in a folder."""
    for number in range(files):
        file = folder / f"{number // 1000:03d}" / f"{number:06d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number:06d}".ljust(TEXT_BYTES, "."))


def seconds(storage: Path) -> list[float]:
    """Return the CPU time and the time that it takes to prepare or find the dataset."""
    env = {**os.environ, "XDG_CACHE_HOME": str(storage / "cache")}
    command = [sys.executable, "-c", WORK, str(storage)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()[-2:]]


def main(argv: list[str]) -> None:
    """Print the table."""
    print("| files | prepare, CPU s | find, CPU s | find, s |\n|---:|---:|---:|---:|")
    for files in map(int, argv or FILES):
        storage = Path(tempfile.mkdtemp(prefix="espalier-files-"))
        try:
            write_corpus(storage / "corpus", files)
            prepare_s, _ = seconds(storage)
            find_s, wall_s = seconds(storage)
        finally:
            shutil.rmtree(storage)
        print(f"| {files:,} | {prepare_s:.1f} | {find_s:.2f} | {wall_s:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
