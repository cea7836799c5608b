#!/usr/bin/env python3
"""Measure what a checkpoint costs training, as ratios to a synchronous write.

    benchmarks/checkpoint.py [--config 124m|small] [--device cpu|cuda] [--rounds 7]
                             [--folder FOLDER]

One state (weights and both moments) is written in three ways, in turns: by torch.save and an fsync
(no hash, no commit); by our checkpointer, waiting until it is done; and by our checkpointer while
training goes on. For the last one, `pause` is the time until `save` returns. `cost` is how much
longer the same steps take with the checkpoint than without it, pause included.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.files import fsync
from orchestrator.machine import available_cpus
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.train import state
from orchestrator.train.checkpointer import Checkpointer
from orchestrator.train.numerics import Worker, device_name, prepare_process
from orchestrator.train.step import Step

VOCAB_SIZE = {"124m": 50304, "small": 256}
SHAPES = {
    "124m": ["model.n_layer=12", "model.n_head=12", "model.n_embd=768", "model.block_size=1024"],
    "small": ["model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.block_size=64"],
}
LR = 3e-4


class Training:
    """Steps of a model on random tokens."""

    def __init__(self, experiment: Experiment, vocab_size: int, worker: Worker, tokens: int):
        self.tokens = min(tokens, experiment.model.block_size)
        prepare_process(experiment, worker)
        self.experiment = experiment
        self.worker = worker
        self.vocab_size = vocab_size
        self.state = state.build(experiment, experiment.new_model(vocab_size), worker)
        self.step = Step(experiment, self.state)
        self.generator = torch.Generator().manual_seed(1)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step.gradient(self._batches())
            self.step.update(replace(self.step.steps(0), lr=LR))

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size = (self.experiment.train.micro_batch_size, self.tokens + 1)
        for _ in range(self.experiment.micro_batches):
            tokens = torch.randint(self.vocab_size, size, generator=self.generator)
            tokens = tokens.to(self.worker.device)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.state.model.named_parameters()
            for key, value in self.state.optimizer.state[parameter].items()
        }
        return {"model": dict(self.state.model.state_dict()), "optimizer": moments}


class Race:
    """Writes a state in different ways, in turns."""

    def __init__(self, training: Training, checkpointer: Checkpointer, folder: Path):
        self.training = training
        self.checkpointer = checkpointer
        self.folder = folder
        self.saved = 0

    def warm_up(self) -> int:
        """Fill buffers and caches; return a number of steps that take longer than a write."""
        self.training.run(2)
        self.synchronous()
        self.torch_save()
        step_s = min(self._timed(lambda: self.training.run(1)) for _ in range(3))
        return max(3, math.ceil(2 * self.synchronous() / step_s))

    def torch_save(self) -> float:
        def save() -> None:
            torch.save(self.training.tensors(), self.folder / "state.pt")
            fsync(self.folder / "state.pt")

        seconds = self._timed(save)
        (self.folder / "state.pt").unlink()
        return seconds

    def synchronous(self) -> float:
        def save() -> None:
            self._save()
            self.checkpointer.wait()

        return self._timed(save)

    def beside(self, steps: int) -> tuple[float, float]:
        """Return the seconds until `save` returns, and until steps and checkpoint are done."""
        pause, _, both = self._laps(
            self._save, lambda: self.training.run(steps), self.checkpointer.wait
        )
        return pause, both

    def alone(self, steps: int) -> float:
        return self._timed(lambda: self.training.run(steps))

    def run(self, rounds: int) -> tuple[int, dict[str, list[float]]]:
        """Return the number of steps beside a checkpoint, and the seconds of each round by name."""
        steps = self.warm_up()
        seconds: dict[str, list[float]] = {}
        ways = {
            ("torch.save",): lambda: [self.torch_save()],
            ("synchronous",): lambda: [self.synchronous()],
            ("pause", "both"): lambda: self.beside(steps),
            ("alone",): lambda: [self.alone(steps)],
        }
        for number in range(rounds):
            order = list(ways)[number % 4 :] + list(ways)[: number % 4]
            for names in order:
                for name, value in zip(names, ways[names](), strict=True):
                    seconds.setdefault(name, []).append(value)
        return steps, seconds

    def _save(self) -> None:
        self.saved += 1
        self.checkpointer.save(self.saved, self.training.tensors(), {}, {})

    def _timed(self, action: Callable[[], object]) -> float:
        return self._laps(action)[0]

    def _laps(self, *actions: Callable[[], object]) -> list[float]:
        """Do one action after the other; return the seconds from the start to the end of each."""
        self._synchronize()
        start = time.perf_counter()
        laps = []
        for action in actions:
            action()
            self._synchronize()
            laps.append(time.perf_counter() - start)
        return laps

    def _synchronize(self) -> None:
        if self.training.worker.device.startswith("cuda"):
            torch.cuda.synchronize()


def rows(steps: int, seconds: dict[str, list[float]]) -> list[list[str]]:
    """Return the table: median seconds, and ratios to the synchronous write of the same round."""

    def row(name: str, values: list[float]) -> list[str]:
        shares = [a / b for a, b in zip(values, seconds["synchronous"], strict=True)]
        return [
            name,
            f"{statistics.median(values):.3f}",
            f"{statistics.median(shares):.3f} ({min(shares):.3f} – {max(shares):.3f})",
        ]

    cost = [both - alone for both, alone in zip(seconds["both"], seconds["alone"], strict=True)]
    step_ms = statistics.median(seconds["alone"]) / steps * 1e3
    return [
        row("torch.save and fsync, without a hash", seconds["torch.save"]),
        row("synchronous: copied, written, hashed, committed", seconds["synchronous"]),
        row("background: pause of training", seconds["pause"]),
        row(f"background: cost to {steps} steps of {step_ms:.0f} ms, pause included", cost),
    ]


def main(argv: list[str] | None = None) -> None:
    arguments = _arguments(argv)
    device = "cuda:0" if arguments.device == "cuda" else "cpu"
    worker = Worker(device=device, cpus=arguments.threads or available_cpus())
    size = arguments.micro_batch_size
    experiment = load_experiment(
        None,
        [
            *SHAPES[arguments.config],
            f"train.micro_batch_size={size}",
            f"train.global_batch_size={size}",
            "train.dtype=bfloat16",
            "train.compile=false",
        ],
    )
    training = Training(experiment, VOCAB_SIZE[arguments.config], worker, arguments.tokens)
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder, prefix="espalier-") as name,
        Checkpointer(RunFolder(name), 1, Journal(RunFolder(name))) as checkpointer,
    ):
        steps, seconds = Race(training, checkpointer, Path(name)).run(arguments.rounds)
    total = sum(
        t.numel() * t.element_size()
        for group in training.tensors().values()
        for t in group.values()
    )
    parameters = sum(parameter.numel() for parameter in training.state.model.parameters())
    print(
        f"{arguments.config}: {parameters:,} parameters, a state of "
        f"{total / 1e9:.2f} GB; {size} × {training.tokens} tokens a step, {device_name(device)}, "
        f"{worker.cpus} threads of {os.cpu_count()} CPUs, torch {torch.__version__}; medians of "
        f"{arguments.rounds} rounds\n"
    )
    for cells in (
        ["what", "s", "÷ synchronous, median (range)"],
        ["---"] * 3,
        *rows(steps, seconds),
    ):
        print(f"| {' | '.join(cells)} |")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=tuple(SHAPES), default="124m")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--micro-batch-size", type=int, default=1, help="sequences a step")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="tokens of a sequence, at most block_size"
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="torch threads; default: all CPUs"
    )
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; default: the temporary folder"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
