#!/usr/bin/env python3
"""Bytes, time and efficiency of the exchange of gradients by the number of ranks.

    benchmarks/scaling.py [--parameters 124373760] [--step-s 1.15] [--slots 64]
    benchmarks/scaling.py --measure AA AABB AAAABBBB

The bytes of every link are counted while the code of a run adds small vectors over simulated ranks,
and scaled to the parameters. Time and efficiency follow by formula. An all-gather is counted as a
ring, as NCCL and gloo do it. `--measure` times real processes here: a letter is the node of a rank.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from orchestrator.train.ranks.exchange import (
    Exchange,
    Partial,
    Partition,
    add_subtrees,
)
from orchestrator.train.ranks.slots import deal, subtrees

WAIT_S = 60
INSIDE_GBPS = 3600  # NVLink of an H100, one direction
NUMBERS = 3 * 64  # of a simulated vector: a multiple of every W below
LAYOUTS = (
    *((1, ranks) for ranks in (2, 4, 8)),
    *((nodes, 1) for nodes in (2, 4, 8)),
    *((nodes, 8) for nodes in (2, 3, 4, 6, 8)),
)  # (nodes, ranks of each)


@dataclass
class Wire:
    """What simulated ranks, which are threads, send to each other.

    Attributes:
        sent: Bytes by (rank, other rank).
    """

    sent: Counter[tuple[int, int]] = field(default_factory=Counter)
    posted: dict[tuple[int, ...], dict[int, list[Tensor]]] = field(default_factory=dict)
    barriers: dict[tuple[int, ...], threading.Barrier] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def swap(self, members: tuple[int, ...], rank: int, parts: list[Tensor]) -> list[list[Tensor]]:
        """Wait for all members; return what each has posted."""
        with self.lock:
            self.posted.setdefault(members, {})[rank] = parts
            barrier = self.barriers.setdefault(members, threading.Barrier(len(members)))
        barrier.wait(WAIT_S)
        posted = [self.posted[members][member] for member in members]
        barrier.wait(WAIT_S)
        return posted

    def count(self, rank: int, other: int, numbers: int) -> None:
        """Count float32 numbers that go from one rank to another."""
        if rank != other:
            with self.lock:
                self.sent[rank, other] += 4 * numbers


class SimulatedGroup:
    """The collectives of one simulated rank; see `exchange.Group`."""

    def __init__(self, wire: Wire, rank: int, partition: Partition) -> None:
        self.wire = wire
        self.rank = rank
        [self.members] = [ranks for ranks in partition if rank in ranks]
        self.place = self.members.index(rank)

    def all_to_all(
        self, out: Tensor, sent: Tensor, from_each: list[int], to_each: list[int]
    ) -> None:
        for member, numbers in zip(self.members, to_each, strict=True):
            self.wire.count(self.rank, member, numbers)
        parts = [part.clone() for part in sent.split(to_each)]
        received = [parts[self.place] for parts in self.wire.swap(self.members, self.rank, parts)]
        assert [len(part) for part in received] == from_each
        out.copy_(torch.cat(received))

    def all_gather(self, out: Tensor, mine: Tensor) -> None:
        following = self.members[(self.place + 1) % len(self.members)]
        self.wire.count(self.rank, following, (len(self.members) - 1) * mine.numel())
        posted = self.wire.swap(self.members, self.rank, [mine.clone()])
        out.copy_(torch.cat([part for [part] in posted]))


def simulate(leaves: Tensor, nodes: list[str], rounds: int = 1) -> tuple[list[Tensor], Wire]:
    """Add the vectors of all slots, (S, P), over one thread per rank; return the results.

    Args:
        leaves: The vectors.
        nodes: Node of each rank.
        rounds: Largest number of rounds, 1 or 2.
    """
    wire = Wire()
    results: list[Tensor | None] = [None] * len(nodes)

    def work(rank: int) -> None:
        exchange = Exchange(
            len(leaves),
            rank,
            nodes,
            lambda partition: SimulatedGroup(wire, rank, partition),
            rounds,
        )
        stack: list[Partial] = []
        before: list[Partial] = []
        for mine in exchange.rounds:
            if stack:
                before = exchange.scatter(stack, ())
            stack = []
            for slot in mine:
                stack.append(Partial(slot, 1, leaves[slot].clone()))
                add_subtrees(stack)
        exchange.all_gather(stack[0].flat, exchange.reduce_scatter(stack, (), before))
        results[rank] = stack[0].flat

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [result for result in results if result is not None], wire


def busiest(wire: Wire, nodes: list[str]) -> tuple[int, int]:
    """Return the most bytes that a rank sends inside its node, and a node to the others."""
    inside: Counter[int] = Counter()
    between: Counter[str] = Counter()
    for (rank, other), size in wire.sent.items():
        if nodes[rank] == nodes[other]:
            inside[rank] += size
        else:
            between[nodes[rank]] += size
    return max(inside.values(), default=0), max(between.values(), default=0)


def ring(world: int, numbers: int) -> float:
    """Return the bytes that each rank of a ring all-reduce sends."""
    return 2 * (world - 1) / world * 4 * numbers


# ---- by formula ----


def rows(parameters: int, step_s: float, slots: int) -> list[str]:
    """Return the table in Markdown."""
    leaves = torch.ones(slots, NUMBERS)
    lines = [
        "| nodes × ranks | subtrees of a rank | bytes in a node, × ring | MB of a node to others "
        "| × ring | × ring in one level | exchange ms at 100, 200, 400 Gb/s | efficiency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count, size in LAYOUTS:
        world = count * size
        nodes = [f"node {rank // size}" for rank in range(world)]
        inside, between = busiest(simulate(leaves, nodes)[1], nodes)
        _, flat = busiest(simulate(leaves, ["one"] * world)[1], nodes)
        owned = deal(slots, world)
        pieces = {len(subtrees(mine)) for mine in owned}
        scale = parameters / NUMBERS
        share_s = step_s * max(map(len, owned)) / slots
        times = []
        for gbps in (100, 200, 400):
            inside_s = inside * scale * 8 / (INSIDE_GBPS * 1e9)
            times.append(inside_s + between * scale * 8 / (gbps * 1e9))
        efficiency = [step_s / world / (share_s + seconds) for seconds in times]
        whole = ring(world, NUMBERS)
        lines.append(
            f"| {count} × {size} | {min(pieces)}–{max(pieces)} | {inside / whole:.2f} "
            f"| {between * scale / 1e6:,.0f} | {between / whole:.2f} | {flat / whole:.2f} "
            f"| {', '.join(f'{1e3 * seconds:.1f}' for seconds in times)} "
            f"| {', '.join(f'{share:.0%}' for share in efficiency)} |"
        )
    return lines


# ---- measured ----


def measure(rank: int, nodes: str, numbers: int, rounds: int, folder: str) -> None:
    """Time `Exchange.sum` as one process of a group; rank 0 prints a line."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/{nodes}", len(nodes))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(nodes))
    for label, names in {"one level": "A" * len(nodes), "as given": nodes}.items():
        exchange = Exchange(64, rank, names)
        vector = torch.ones(numbers)
        parts = [Partial(*subtree, vector.clone()) for subtree in subtrees(exchange.mine)]
        exchange.sum(parts)
        seconds = []
        for _ in range(rounds):
            dist.barrier()
            started = time.perf_counter()
            exchange.sum(parts)
            seconds.append(time.perf_counter() - started)
        if rank == 0:
            median = statistics.median(seconds)
            moved = ring(len(nodes), numbers)
            print(
                f"{nodes}, {label}: {1e3 * median:.0f} ms for {4 * numbers / 1e6:.0f} MB, "
                f"{moved / median / 1e6:,.0f} MB/s of a ring's bytes",
                flush=True,
            )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=124_373_760)
    parser.add_argument("--step-s", type=float, default=1.15, help="a step on one device")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--measure", nargs="*", default=[], metavar="NODES")
    parser.add_argument("--numbers", type=int, default=64 * 60_000, help="of a measured vector")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if not arguments.measure:
        print("\n".join(rows(arguments.parameters, arguments.step_s, arguments.slots)))
    for nodes in arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            numbers = arguments.numbers // len(nodes) * len(nodes)
            torch.multiprocessing.spawn(
                measure, (nodes, numbers, arguments.rounds, folder), nprocs=len(nodes)
            )


if __name__ == "__main__":
    main()
