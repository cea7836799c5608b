#!/usr/bin/env python3
"""Measure the preparation of GPT-2 tokens, beside nanoGPT's method.

    benchmarks/prepare.py [--mb 120] [--files 8000] [--kinds files text lines parquet] [--cpus 1 2]
        [--alone]

nanoGPT's method is `token_pool.py`, with as many processes. Both write the same ids, and run in
turns; `--alone` leaves it out. The corpus is made from the source of Python's standard library: its
paragraphs in random order, in which a word in fifty is replaced by a random one.

Times are those of whole commands. CPU seconds and memory are those of all their processes; shared
memory counts once.
"""

import itertools
import json
import os
import random
import re
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil
from studies import markdown

from orchestrator.data.corpus import STDLIB, resolve
from orchestrator.data.dataset import load_manifest
from pipelines.common import run_command
from pipelines.options import Options, at_least

REPO = Path(__file__).resolve().parent.parent
KINDS = ("files", "text", "lines", "parquet")
POLL_S = 0.1
WORD = re.compile(r"[a-z]{3,}")


# ---- the corpus ----


def documents(size: int, count: int) -> Iterator[str]:
    """Return `count` documents with `size` bytes in all, the same in each call."""
    chance = random.Random(0)
    sources = [source.path.read_bytes().decode("utf-8", "ignore") for source in resolve(STDLIB)]
    paragraphs = [part + "\n\n" for text in sources for part in text.split("\n\n")]

    def word(match: re.Match[str]) -> str:
        if chance.random() > 0.02:
            return match[0]
        return "".join(chance.choices(string.ascii_lowercase, k=chance.randint(3, 10)))

    room = 0
    for _ in range(count):
        room += size // count
        taken = []
        while room > 0:
            taken.append(WORD.sub(word, chance.choice(paragraphs)))
            room -= len(taken[-1].encode())
        yield "".join(taken)


def write_corpus(folder: Path, kind: str, size: int, files: int) -> Path:
    """Write a corpus, and return what `data.corpus` names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    if kind == "files":
        for number, text in enumerate(documents(size, files)):
            file = folder / f"{number // 1000:03d}" / f"{number:06d}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(text.encode())
        return folder
    texts = documents(size, max(1, size // 15_000))
    path = folder / {"text": "one.txt", "lines": "one.jsonl", "parquet": "one.parquet"}[kind]
    if kind == "parquet":
        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            while group := list(itertools.islice(texts, 1000)):
                writer.write_batch(pa.record_batch([pa.array(group)], ["text"]))
        return path
    with open(path, "wb") as file:
        for text in texts:
            line = json.dumps({"text": text}) + "\n"
            file.write((line if kind == "lines" else text).encode())
    return path


# ---- measuring ----


class Meter:
    """CPU seconds and largest memory of a process and all its descendants."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.cpu: dict[int, float] = {}
        self.memory = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            memory = 0
            for process in self._processes():
                try:
                    times = process.cpu_times()
                    self.cpu[process.pid] = times.user + times.system
                    memory += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.memory = max(self.memory, memory)

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.Error:
            return []

    def end(self) -> list[float]:
        """Return CPU seconds and MB."""
        self._ended.set()
        self._thread.join()
        return [sum(self.cpu.values()), self.memory / 1e6]


def measure(command: list[str], cpus: int, folder: Path) -> list[float]:
    """Return seconds, CPU seconds and MB of a command that may use some CPUs."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    before = os.sched_getaffinity(0)
    began = time.monotonic()
    with open(folder / "output", "w+") as output:
        os.sched_setaffinity(0, sorted(before)[:cpus])
        try:
            started = psutil.Popen(command, cwd=REPO, env=environment, stdout=output, stderr=output)
        finally:
            os.sched_setaffinity(0, before)
        meter = Meter(psutil.Process(started.pid))
        status = started.wait()
        seconds = time.monotonic() - began
        used = meter.end()
        if status != 0:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}:\n{output.read()}")
    return [seconds, *used]


def compare(
    corpus: Path, cpus: int, number: int, folder: Path, alone: bool
) -> dict[str, list[float]]:
    """Prepare a corpus in both ways, or only in ours."""
    here = folder / f"{number}-{cpus}"
    here.mkdir()
    dataset = here / "dataset"
    fields = ["data.tokenizer=gpt2", "data.append_eot=true", f"data.corpus={corpus}"]
    fields += [f"data.dir={dataset}", f"storage={here}"]
    ours = [sys.executable, "pipelines/prepare.py", "configs/quickstart.yaml", *fields]
    theirs = [sys.executable, "benchmarks/token_pool.py", str(corpus), str(here / "ids.bin")]
    found = {} if alone else {"nanoGPT's method": measure([*theirs, str(cpus)], cpus, here)}
    found["ours"] = measure(ours, cpus, here)
    if not alone and corpus.suffix != ".txt":  # one text is cut in other places
        tokens = sum(split.tokens for split in load_manifest(dataset).splits.values())
        # The cut between train and val may be inside a token.
        assert abs(tokens - (here / "ids.bin").stat().st_size // 2) < 8
    subprocess.run(["rm", "-r", str(here)], check=True)
    return found


def main(argv: list[str]) -> int:
    """Print the table."""
    options = Options(__doc__)
    options.add_argument("--mb", type=at_least(1), nargs="+", default=[120], help="sizes of text")
    options.add_argument("--files", type=at_least(1), default=8000, help="of the kind `files`")
    options.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of corpora")
    options.add_argument("--cpus", type=at_least(1), nargs="+", default=[1, 2], help="of both")
    options.add_argument("--rounds", type=at_least(1), default=3, help="of each comparison")
    options.add_argument("--alone", action="store_true", help="without nanoGPT's method")
    arguments = options.parse_args(argv)
    rows = []
    for size in arguments.mb:
        for kind in arguments.kinds:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                corpus = write_corpus(folder / "corpus", kind, size * 10**6, arguments.files)
                for cpus in arguments.cpus:
                    rounds = [
                        compare(corpus, cpus, i, folder, arguments.alone)
                        for i in range(arguments.rounds)
                    ]
                    for program in rounds[0]:
                        figures = [
                            median(x) for x in zip(*(r[program] for r in rounds), strict=True)
                        ]
                        seconds, used, memory = figures
                        speed = f"{size / seconds:.1f}"
                        what = [f"{kind}, {size:,} MB", str(cpus), program, f"{seconds:.1f}", speed]
                        rows.append([*what, f"{used:.1f}", f"{memory:,.0f}"])
                    print(f"{kind}: load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    print(markdown(["corpus", "CPUs", "program", "s", "MB/s", "CPU s", "peak MB"], rows))
    return 0


if __name__ == "__main__":
    run_command(main)
