#!/usr/bin/env python3
"""Measure the training that a val loss of 1.8982 takes on Shakespeare's characters.

    benchmarks/time_to_loss.py --nanogpt PATH --text tinyshakespeare.txt [--seeds 3] [--only NAME]

1.8982 is the loss over the whole val split that nanoGPT's documented run on a CPU ends with. All
contenders have about its 804,096 parameters, its batches of 12 × 64 tokens, and one thread:

- nanogpt: nanoGPT's model, optimizer, sampling and inner loop, 2,000 steps;
- gpt2: ours, configs/shakespeare-char-cpu.yaml;
- modern: ours, configs/shakespeare-char-modern.yaml;
- nanochat: its recipe, see nanochat_recipe.py.

`--ablation` measures the recipe of `modern` without one of its parts at a time instead.

A contender trains in a process of its own, and the contenders take turns. The time is that of the
training steps with their batches, without start, evaluation and checkpoints. On a busy machine the
CPU time is the figure. A contender has reached the loss if all of its seeds end below it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from studies import markdown
from torch import Tensor

from model.schedule import learning_rate
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.data.batches import TokenStream
from orchestrator.data.prepare import prepare_in
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker
from pipelines.common import run_command
from pipelines.options import Options, at_least

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TARGET = 1.8982
BATCH = 12
BLOCK = 64
VOCAB = 65
NANOCHAT_STEPS = 190
FIXED = ("train.dtype=float32", "train.eval_interval=null", "train.checkpoint_interval=null")
FILES = {"gpt2": "shakespeare-char-cpu", "modern": "shakespeare-char-modern"}
ABLATION = {
    "all of it": (),
    "AdamW for all parameters": ("optim.kind=adamw", "schedule.max_lr=3e-3"),
    "no smear": ("model.smear=false", "model.layer_smear=false"),
    "no smear in the layers": ("model.layer_smear=false",),
    "all frequencies turn": ("model.rotary_share=1",),
    "attention scale 1": ("model.attention_scale=1",),
}


class Result(NamedTuple):
    """What one contender reached with one seed."""

    loss: float  # over the whole val split, nats per token
    steps: int
    cpu_s: float
    wall_s: float
    parameters: int


class Clock:
    """Time of the training steps."""

    def __init__(self) -> None:
        self.wall = -time.perf_counter()
        self.cpu = -time.process_time()

    def stop(self) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def main(argv: list[str]) -> int:
    """Run the contenders in turns and print a table."""
    arguments = _arguments(argv)
    if arguments.one is not None:
        print(json.dumps(_one(arguments)))
        return 0
    names = list(ABLATION) if arguments.ablation else ["nanogpt", "gpt2", "modern", "nanochat"]
    names = [name for name in names if arguments.only in (None, name)]
    results: dict[str, list[Result]] = {name: [] for name in names}
    for seed in range(1, arguments.seeds + 1):
        for name in names:
            results[name].append(_run(name, seed, argv))
            print(f"{name}, seed {seed}: {results[name][-1]}", file=sys.stderr, flush=True)
    print(_table(results))
    return 0


def _run(name: str, seed: int, argv: Sequence[str]) -> Result:
    """Train one contender in a process of its own."""
    command = [sys.executable, __file__, *argv, "--one", name, "--seed", str(seed)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Result(*json.loads(done.stdout.splitlines()[-1]))


def _one(arguments: Any) -> Result:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        experiment = _experiment(arguments, "gpt2")
        dataset = prepare_in(experiment.data, Path(scratch)).directory
        streams = {split: TokenStream(dataset, split) for split in ("train", "val")}
        tokens = {
            s: torch.from_numpy(stream.read(0, stream.tokens).astype(np.int64))
            for s, stream in streams.items()
        }
        if arguments.one == "nanogpt":
            return _nanogpt(arguments, experiment, tokens)
        if arguments.one == "nanochat":
            return _nanochat(arguments, tokens)
        return _ours(arguments, dataset, Path(scratch), tokens["val"])


def _experiment(arguments: Any, name: str) -> Experiment:
    words = [f"data.corpus={arguments.text}", f"train.seed={arguments.seed}", *FIXED]
    if name in ABLATION:
        words += ABLATION[name]
    return load_experiment(CONFIGS / f"{FILES.get(name, FILES['modern'])}.yaml", words)


def _ours(arguments: Any, dataset: Path, scratch: Path, val: Tensor) -> Result:
    """Train with our loop, as a run does, but without Ray."""
    experiment = _experiment(arguments, arguments.one)
    folder = RunFolder(scratch / "run")
    folder.path.mkdir()
    trainer = Trainer(experiment, folder, dataset, Worker(cpus=1))
    step = trainer.step
    spent = [0.0, 0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any) -> Any:
            clock = Clock()
            try:
                return function(*words)
            finally:
                clock.stop()
                spent[0] += clock.cpu
                spent[1] += clock.wall

        return call

    step.gradient, step.update = timed(step.gradient), timed(step.update)
    for _ in trainer.run():
        pass
    model = trainer.state.model
    loss = _val_loss(lambda x, y: model(x, y, reduction="sum"), val)
    return Result(loss, experiment.train.max_steps, *spent, _count(model))


def _nanogpt(arguments: Any, experiment: Experiment, tokens: dict[str, Tensor]) -> Result:
    """Train with nanoGPT's files: random windows, its schedule, its inner loop."""
    from train_step import NanoGPT

    torch.manual_seed(1337 + arguments.seed)
    model = experiment.new_model(VOCAB)  # nanoGPT's own initialization, from the same generator
    side = NanoGPT(arguments.nanogpt, experiment, model.state_dict(), VOCAB, "cpu")
    schedule = experiment.lr_schedule()
    steps = experiment.train.max_steps
    clock = Clock()
    for step in range(steps):
        for group in side.optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        starts = torch.randint(len(tokens["train"]) - BLOCK, (BATCH,))
        side.run([_windows(tokens["train"], starts)])
    clock.stop()

    def loss_sum(x: Tensor, y: Tensor) -> Tensor:
        return side.model(x, y)[1] * y.numel()

    side.model.eval()
    loss = _val_loss(loss_sum, tokens["val"])
    return Result(loss, steps, clock.cpu, clock.wall, _count(model))


def _nanochat(arguments: Any, tokens: dict[str, Tensor]) -> Result:
    from nanochat_recipe import NanochatModel, Recipe

    torch.manual_seed(arguments.seed)
    # 504, not 512: the second table of value embeddings would be 1 % of all parameters.
    model = NanochatModel(4, 4, 128, 504, BLOCK, VOCAB)
    recipe = Recipe(model, NANOCHAT_STEPS)
    order = torch.randperm((len(tokens["train"]) - 1) // BLOCK) * BLOCK
    clock = Clock()
    for step in range(recipe.steps):
        starts = order[step * BATCH : (step + 1) * BATCH]
        model(*_windows(tokens["train"], starts)).backward()
        recipe.update(step)
    clock.stop()
    loss = _val_loss(lambda x, y: model(x, y) * y.numel(), tokens["val"])
    return Result(loss, recipe.steps, clock.cpu, clock.wall, _count(model))


def _windows(tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the windows that begin at `starts`, (B, T) each."""
    places = starts[:, None] + torch.arange(BLOCK)
    return tokens[places], tokens[places + 1]


@torch.no_grad()
def _val_loss(loss_sum: Callable[[Tensor, Tensor], Tensor], val: Tensor) -> float:
    """Return the mean loss of all tokens of val but the first, in windows one after the other."""
    whole = (len(val) - 1) // BLOCK * BLOCK
    inputs = [val[:whole].view(-1, BLOCK), val[whole:-1][None]]
    targets = [val[1 : whole + 1].view(-1, BLOCK), val[whole + 1 :][None]]
    total = 0.0
    for x, y in zip(inputs, targets, strict=True):
        for some_x, some_y in zip(x.split(128), y.split(128), strict=True):
            if some_x.numel():
                total += float(loss_sum(some_x, some_y))
    return total / (len(val) - 1)


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _table(results: dict[str, list[Result]]) -> str:
    header = ("contender", "parameters", "steps", "val loss of each seed", "reached")
    rows = []
    first = next(iter(results.values()))
    for name, found in results.items():
        cpu = statistics.median(one.cpu_s for one in found)
        wall = statistics.median(one.wall_s for one in found)
        ratios = [a.cpu_s / b.cpu_s for a, b in zip(first, found, strict=True)]
        rows.append(
            (
                name,
                f"{found[0].parameters:,}",
                str(found[0].steps),
                ", ".join(f"{one.loss:.4f}" for one in found),
                "yes" if all(one.loss <= TARGET for one in found) else "no",
                f"{cpu:.1f}",
                f"{wall:.1f}",
                f"{statistics.median(ratios):.2f}",
            )
        )
    return markdown((*header, "CPU s", "s", f"{next(iter(results))} ÷ this"), rows)


def _arguments(argv: list[str]) -> Any:
    parser = Options(__doc__ or "")
    parser.add_argument("--nanogpt", type=Path, required=True, help="folder of a nanoGPT checkout")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="seeds of each contender")
    parser.add_argument("--only", help="measure this contender alone")
    parser.add_argument("--ablation", action="store_true", help="modern without one part at a time")
    parser.add_argument("--one", help="train this contender, print its result as JSON")
    parser.add_argument("--seed", type=int, default=1, help="seed of --one")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
