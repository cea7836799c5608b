#!/usr/bin/env python3
"""Time of a step whose exchange of gradients runs during the last backward pass, or after it.

    python -m benchmarks.overlap [--gbps 0.25 0.5 1 2]      as root, for the namespaces

Two processes with one thread each, on two network namespaces that a link of this rate connects,
train a GPT with 10.7 million parameters: one micro-batch each in a step. Both kinds of steps
alternate in the same processes.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.config.experiment import load_experiment
from orchestrator.train import state as train_state
from orchestrator.train.numerics import Worker
from orchestrator.train.step import MicroBatch, Step
from tests.helpers.machines import Machine, Switch, reason_to_skip

VOCABULARY = 256
MODEL = [
    "data.tokenizer=byte",
    "model.n_layer=6",
    "model.n_head=6",
    "model.n_embd=384",
    "model.block_size=256",
    "train.dtype=float32",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "train.reduction_slots=2",
]


def rank(number: int, address: str, pairs: int) -> None:
    """Time steps as one of both ranks; rank 0 prints the medians."""
    torch.set_num_threads(1)
    store = dist.TCPStore(address, 29500, 2, is_master=number == 0)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    train_state.node_digest = lambda: f"0{number}"
    steps = {kind: new_step(number, kind == "during") for kind in ("during", "after")}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    waits: dict[str, list[float]] = {kind: [] for kind in steps}
    for pair in range(pairs + 1):
        for kind in ("during", "after") if pair % 2 else ("after", "during"):
            taken, waited = timed(steps[kind])
            if pair:
                seconds[kind].append(taken)
                waits[kind].append(waited)
    if number == 0:
        pairs_of_s = zip(seconds["during"], seconds["after"], strict=True)
        ratio = statistics.median(during_s / after_s for during_s, after_s in pairs_of_s)
        steps_ms, waits_ms = (
            " | ".join(
                f"{1e3 * statistics.median(found[kind]):.0f}" for kind in ("after", "during")
            )
            for found in (seconds, waits)
        )
        print(f"{steps_ms} | {ratio:.2f} | {waits_ms} |", flush=True)
    dist.barrier()
    os._exit(0)


def new_step(number: int, overlaps: bool) -> Step:
    """Return a step of rank `number` of two."""
    experiment = load_experiment(None, [*MODEL, f"train.overlap_exchange={str(overlaps).lower()}"])
    model = experiment.new_model(VOCABULARY)
    state = train_state.build(experiment, model, Worker(number, 2, "cpu", cpus=1))
    assert (state.gradients.overlap is not None) == overlaps
    return Step(experiment, state)


def timed(step: Step) -> tuple[float, float]:
    """Return the seconds of a step, and those between its backward pass and its update."""
    marks: list[tuple[str, float]] = []
    step.report_phase = lambda phase, _: marks.append((phase, time.perf_counter()))
    dist.barrier()
    started = time.perf_counter()
    step.gradient(micro_batches())
    step.update(step.steps(step.state.step))
    taken = time.perf_counter() - started
    [begun] = [at for phase, at in marks[:2] if phase == "exchange"]
    [ended] = [at for phase, at in marks[:3] if phase == "update"]
    return taken, ended - begun


def micro_batches() -> Iterator[MicroBatch]:
    """Yield a micro-batch of random tokens."""
    tokens = torch.randint(VOCABULARY, (4, 257))
    yield tokens[:, :-1], tokens[:, 1:]


@contextlib.contextmanager
def two_machines(folder: Path, gbps: float) -> Iterator[list[Machine]]:
    """Boot two machines that a link of a given rate connects."""
    switch = Switch(folder)
    machines = [Machine(folder, number) for number in range(2)]
    (folder / "private").mkdir()
    try:
        for machine in machines:
            machine.boot(switch)
            rate = f"rate {gbps * 1000:.0f}mbit burst 256kb latency 100ms"
            shape = f"tc qdisc add dev eth0 root tbf {rate}".split()
            subprocess.run(machine.enter(shape), check=True)
        yield machines
    finally:
        for machine in machines:
            machine.kill()
        switch.holder.kill()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gbps", type=float, nargs="+", default=[0.25, 0.5, 1, 2])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank(arguments.rank, arguments.address, arguments.pairs)
    reason = reason_to_skip()
    if reason:
        sys.exit(reason)
    print("| Gb/s | step, exchange after, ms | during, ms | ratio | wait after, ms | during, ms |")
    print("|---|---|---|---|---|---|", flush=True)
    for gbps in arguments.gbps:
        with (
            tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
            two_machines(Path(folder), gbps) as machines,
        ):
            print(f"| {gbps:g} | ", end="", flush=True)
            words = [f"--address={machines[0].address}", f"--pairs={arguments.pairs}"]
            program = [
                "env",
                "GLOO_SOCKET_IFNAME=eth0",
                "TORCH_CPP_LOG_LEVEL=ERROR",
                f"PYTHONPATH={os.getcwd()}",
                sys.executable,
                "-W",
                "ignore",
            ]
            processes = [
                subprocess.Popen(machine.enter([*program, __file__, f"--rank={number}", *words]))
                for number, machine in enumerate(machines)
            ]
            if max(process.wait(600) for process in processes):
                sys.exit("a rank failed")


if __name__ == "__main__":
    main()
