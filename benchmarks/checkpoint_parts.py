#!/usr/bin/env python3
"""Measure a checkpoint that several ranks write and read in parts.

    benchmarks/checkpoint_parts.py [--ranks 1 2 4] [--mb 128] [--rounds 5] [--folder FOLDER]

One state of weights and two moments is saved by 1, 2, … processes on this machine, and read again
as at a restart. `pause` is the time until `save` returns on the slowest rank. `read` counts the
bytes that all ranks together have read from files of the checkpoint, as a multiple of its size.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.folders import folder_bytes
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.train.checkpointer import Checkpointer
from orchestrator.train.numerics import Worker, gather
from orchestrator.train.ranks.reading import read_together


def state(numbers: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return weights and moments of this many parameters, in 24 tensors each."""
    weights = {f"w{i:02d}": torch.rand(numbers // 24) for i in range(24)}
    moments = {f"{k}/{m}": torch.rand_like(v) for k, v in weights.items() for m in ("m", "v")}
    return {"model": weights, "optimizer": moments}


def measure(rank: int, ranks: int, folder: Path, numbers: int, rounds: int) -> None:
    """Save and read as one rank; rank 0 writes result.json."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    worker = Worker(rank, ranks)
    if ranks > 1:
        store = f"file://{folder / 'store'}"
        timeout = timedelta(minutes=10)
        dist.init_process_group("gloo", store, timeout, rank=rank, world_size=ranks)
    run = RunFolder(folder)
    tensors = state(numbers)
    pauses = []
    writes = []
    with Checkpointer(run, 1, Journal(run), worker) as checkpointer:
        for step in range(1, rounds + 2):
            gather("", worker)
            start = time.perf_counter()
            checkpointer.save(step, tensors, {}, {})
            pauses.append(time.perf_counter() - start)
            checkpointer.wait()
            writes.append(time.perf_counter() - start)
    gather("", worker)
    read = counted_reads()
    start = time.perf_counter()
    content = read_together(run.checkpoint(rounds + 1), worker)
    for group in tensors:
        found = content.tensors(group)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors[group].items())
    own = {"pauses": pauses[1:], "writes": writes[1:], "read": read()}
    own["seconds"] = time.perf_counter() - start
    all_ranks = [json.loads(text) for text in gather(json.dumps(own), worker)]
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(all_ranks))
    os._exit(0)  # the shutdown of gloo can deadlock


def counted_reads() -> Callable[[], int]:
    """Return a function that returns how many bytes of checkpoints were read since now."""
    total = 0
    hash_here = checkpoint_format.hash_here

    def counted(paths: list[str], *contents: Any) -> list[str]:
        nonlocal total
        total += sum(os.stat(path).st_size for path in paths)
        return hash_here(paths, *contents)

    checkpoint_format.hash_here = counted
    return lambda: total


def row(ranks: int, numbers: int, rounds: int, place: Path | None) -> list[str]:
    """Return the row of the table for one number of ranks."""
    with tempfile.TemporaryDirectory(dir=place, prefix="espalier-") as name:
        folder = Path(name)
        context = multiprocessing.get_context("spawn")
        arguments = [(rank, ranks, folder, numbers, rounds) for rank in range(ranks)]
        processes = [context.Process(target=measure, args=args) for args in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = json.loads((folder / "result.json").read_text())
        size = folder_bytes(RunFolder(folder).checkpoint(rounds + 1))
    pauses = [max(one) for one in zip(*(rank["pauses"] for rank in found), strict=True)]
    return [
        str(ranks),
        f"{statistics.median(pauses) * 1e3:.1f}",
        f"{statistics.median(found[0]['writes']):.3f}",
        f"{sum(rank['read'] for rank in found) / size:.3f}",
        f"{max(rank['seconds'] for rank in found):.3f}",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--mb", type=int, default=128, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="default: the temporary folder")
    arguments = parser.parse_args(argv)
    numbers = arguments.mb * 10**6 // 12
    heads = ["ranks", "pause, ms", "written, s", "read ÷ size", "restart reads, s"]
    for cells in (heads, ["---"] * len(heads)):
        print(f"| {' | '.join(cells)} |", flush=True)
    for ranks in arguments.ranks:
        cells = row(ranks, numbers, arguments.rounds, arguments.folder)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
