#!/usr/bin/env python3
"""Steps on a CPU without torch.compile, and with the whole model or each block compiled.

    python -m benchmarks.compile [--sizes char 768] [--dtypes float32 bfloat16] [--rounds 7]

Each variant has a process of its own with one thread. Their steps alternate. The first start has an
empty cache of the compiler, the second one has what the first start left there. "blocks" is what
train.compile does on a CPU.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from model import gpt
from orchestrator.config.experiment import load_experiment
from orchestrator.train.numerics import Worker, prepare_process
from orchestrator.train.state import build
from orchestrator.train.step import Step

SIZES = {
    "char": (65, 4, 128, 6, 384),
    "768": (50304, 1, 256, 4, 768),
}  # vocabulary, sequences, their tokens, layers, width
VARIANTS = ("eager", "whole", "blocks", "blocks+loss")


def new_step(variant: str, size: str, dtype: str) -> Step:
    """Return the steps of a model that is compiled in one of the ways."""
    vocabulary, batch, tokens, layers, width = SIZES[size]
    experiment = load_experiment(
        None,
        [
            f"model.block_size={tokens}",
            f"model.n_layer={layers}",
            f"model.n_head={width // 64}",
            f"model.n_embd={width}",
            f"train.dtype={dtype}",
            f"train.compile={str(variant.startswith('blocks')).lower()}",
            f"train.micro_batch_size={batch}",
            f"train.global_batch_size={batch}",
            "train.reduction_slots=1",
        ],
    )
    worker = Worker(cpus=1)
    prepare_process(experiment, worker)
    model = experiment.new_model(vocabulary)
    state = build(experiment, model, worker)
    if variant == "whole":
        state.forward = torch.compile(model, dynamic=False)
    elif variant == "blocks+loss":
        gpt.cross_entropy = torch.compile(gpt.cross_entropy, dynamic=False)
    return Step(experiment, state)


def serve(variant: str, size: str, dtype: str, cache: Path, connection: Connection) -> None:
    """Send the CPU seconds of the first step and of an evaluation, then times of a step."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # so that its time can be counted
    vocabulary, batch, tokens, *_ = SIZES[size]
    step = new_step(variant, size, dtype)  # imports the compiler
    generator = torch.Generator().manual_seed(1)

    def one() -> float:
        walk = torch.randint(vocabulary, (1, batch, tokens + 1), generator=generator)
        found = step.gradient(iter([(part[:, :-1], part[:, 1:]) for part in walk]))
        step.update(step.steps(step.state.step))
        return found.losses[-1]

    started = used()
    one()
    first_s = used() - started
    started = used()
    evaluate(step, vocabulary, batch, tokens)
    evaluation_s = used() - started
    connection.send((first_s, evaluation_s))
    loss = 0.0
    while connection.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        loss = one()
        connection.send((time.perf_counter() - wall, time.process_time() - cpu))
    connection.send((loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10))


def used() -> float:
    """Return the CPU seconds of this process and of the compilers that it started."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(found.ru_utime + found.ru_stime for found in both)


@torch.no_grad()
def evaluate(step: Step, vocabulary: int, batch: int, tokens: int) -> None:
    forward = step.state.forward.eval()
    inputs = torch.zeros((batch, tokens), dtype=torch.int64)
    with step.autocast:
        forward(inputs, inputs, reduction="window")
    forward.train()


def measure(size: str, dtype: str, rounds: int) -> None:
    """Print a row for each variant."""
    firsts: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for is_warm in (False, True):
            sides = {}
            for name in VARIANTS:
                sides[name] = started(name, size, dtype, Path(folder) / name)
                firsts[name].append(sides[name].recv())
            if not is_warm:
                for side in sides.values():
                    side.send(False)
                    side.recv()
        for number in range(rounds + 1):
            for name in VARIANTS[:: 1 if number % 2 else -1]:
                sides[name].send(True)
                found = sides[name].recv()
                if number:
                    rates[name].append(found)
        for name, side in sides.items():
            side.send(False)
            loss, peak_mb = side.recv()
            ratios = (
                statistics.median(
                    mine[i] / whole[i]
                    for mine, whole in zip(rates[name], rates["whole"], strict=True)
                )
                for i in range(2)
            )
            cells = [
                *(f"{step_s:.1f} + {evaluation_s:.1f}" for step_s, evaluation_s in firsts[name]),
                f"{1e3 * statistics.median(cpu_s for _, cpu_s in rates[name]):.0f}",
                " / ".join(f"{ratio:.3f}" for ratio in ratios),
                f"{peak_mb:.0f}",
                f"{loss:.6f}",
            ]
            print("|", " | ".join([size, dtype, name, *cells]), "|", flush=True)


def started(name: str, size: str, dtype: str, cache: Path) -> Connection:
    """Start the process of a variant."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    given = (name, size, dtype, cache, theirs)
    context.Process(target=serve, args=given, daemon=True).start()
    return mine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(
        "| size | type | compiled | first step + evaluation, CPU s | the same, warm cache "
        "| step, CPU ms | ÷ whole: time / CPU | peak MB | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            measure(size, dtype, arguments.rounds)


if __name__ == "__main__":
    main()
