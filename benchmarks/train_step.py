#!/usr/bin/env python3
"""Compare our training step with nanoGPT's: the ratio of the times, and the losses.

    benchmarks/train_step.py --nanogpt CHECKOUT [--config char|124m] [--steps 20] [--rounds 7]

Both sides start from the same weights, see the same batches and use the same learning rate. Each
has a process, and their rounds alternate, so that noise of the machine hits both. A ratio below 1
means that ours is faster. nanoGPT's side is its own `model.py` and the inner loop of its
`train.py`. Both compute in the type that `train.dtype=auto` stands for; with a GPU, both use
torch.compile.
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from model.flops import mfu
from model.gpt import GPT
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker, device_name, prepare_process, resolve_auto
from orchestrator.train.state import build
from orchestrator.train.step import Step

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LR = 3e-4


class Ours:
    """Our step on given batches."""

    def __init__(self, experiment: Experiment, model: GPT, worker: Worker):
        self.state = build(experiment, model, worker)
        self.step = Step(experiment, self.state)
        self.on_gpu = worker.device != "cpu"

    def run(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Make one update; return its mean loss."""
        torch.use_deterministic_algorithms(self.on_gpu)  # as in our workers
        losses = self.step.gradient(iter(batches)).losses
        self.step.update(replace(self.step.steps(0), lr=LR))
        return sum(losses) / len(losses)


class NanoGPT:
    """nanoGPT's model, optimizer and inner loop, from a checkout."""

    def __init__(
        self,
        checkout: Path,
        experiment: Experiment,
        weights: dict[str, torch.Tensor],
        vocab_size: int,
        device: str,
    ):
        spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["nanogpt_model"] = module
        spec.loader.exec_module(module)
        m, o = experiment.model, experiment.optim
        config = module.GPTConfig(
            block_size=m.block_size,
            vocab_size=vocab_size,
            n_layer=m.n_layer,
            n_head=m.n_head,
            n_embd=m.n_embd,
            dropout=m.dropout,
            bias=m.bias,
        )
        model = module.GPT(config)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(
            name in ("lm_head.weight",) or name.endswith("attn.bias") for name in missing
        )
        model.to(device)
        self.optimizer = model.configure_optimizers(
            o.weight_decay, LR, (o.beta1, o.beta2), torch.device(device).type
        )
        self.model = torch.compile(model) if experiment.train.compile else model
        self.max_norm = o.max_grad_norm
        self.context = nullcontext()
        dtype = experiment.train.dtype
        if dtype != "float32":
            kind = torch.device(device).type
            self.context = torch.amp.autocast(kind, getattr(torch, dtype))
        self.parameters = list(model.parameters())

    def run(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        torch.use_deterministic_algorithms(False)
        total = torch.zeros((), device=self.parameters[0].device)
        for inputs, targets in batches:
            with self.context:
                _, loss = self.model(inputs, targets)
                loss = loss / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()


def main() -> None:
    arguments = _arguments()
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "nanoGPT": []}
    losses: dict[str, list[float]] = {name: [] for name in seconds}
    sides = {}
    for name in seconds:
        sides[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(name, arguments, theirs), daemon=True).start()
    # The sides take turns in being first. The first round is a warm-up and is not timed.
    for number in range(arguments.rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            sides[name].send(number)
            times, values = sides[name].recv()
            losses[name] += values
            if number:
                seconds[name].append(times)
    for side in sides.values():
        side.send(None)
    experiment, vocab_size = _experiment(arguments)
    model = experiment.new_model(vocab_size)
    _report(experiment, model, _worker(arguments), seconds, losses, arguments)


def _worker(arguments) -> Worker:
    return Worker(device="cuda:0" if torch.cuda.is_available() else "cpu", cpus=arguments.threads)


def _serve(name: str, arguments, connection) -> None:
    """Run a round of one side for each number received; send times of a step and losses."""
    worker = _worker(arguments)
    experiment, vocab_size = _experiment(arguments)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")  # TF32, as in nanoGPT
    if name == "ours":
        prepare_process(experiment, worker)
    torch.manual_seed(experiment.train.seed)
    model = experiment.new_model(vocab_size)
    side: Ours | NanoGPT
    if name == "ours":
        side = Ours(experiment, model, worker)
    else:
        weights = model.state_dict()
        side = NanoGPT(arguments.nanogpt, experiment, weights, vocab_size, worker.device)
    generator = torch.Generator().manual_seed(1)
    shape = (experiment.train.micro_batch_size, experiment.model.block_size)
    while connection.recv() is not None:
        rounds = [
            [
                _batch(generator, vocab_size, *shape, worker.device)
                for _ in range(experiment.micro_batches)
            ]
            for _ in range(arguments.steps)
        ]
        _synchronize(worker.device)
        wall = time.perf_counter()
        cpu = time.process_time()
        values = [side.run(batches) for batches in rounds]
        _synchronize(worker.device)
        times = (time.perf_counter() - wall, time.process_time() - cpu)
        connection.send(([spent / arguments.steps for spent in times], values))


def _report(experiment, model, worker, seconds, losses, arguments) -> None:
    where = device_name(worker.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{arguments.config}: {parameters:,} parameters, {experiment.micro_batches} × "
        f"{experiment.train.micro_batch_size} × {experiment.model.block_size} tokens, "
        f"{experiment.train.dtype}, compile {experiment.train.compile}, {where}, "
        f"{worker.cpus} threads, torch {torch.__version__}"
    )
    for name, times in seconds.items():
        median, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        speed = experiment.tokens_per_step / median
        share = mfu(speed, model.config, where, experiment.train.dtype)
        least = min(wall for wall, _ in times) * 1e3
        time_ms = f"{median * 1e3:9.2f} ms per step (min {least:.2f}), CPU {cpu * 1e3:.2f} ms"
        utilization = "" if share is None else f", MFU {share:.1%}"
        print(f"  {name:<8} {time_ms}, {speed:12,.0f} tokens/s{utilization}")
    for i, kind in enumerate(("time", "CPU time")):
        pairs = zip(seconds["ours"], seconds["nanoGPT"], strict=True)
        ratios = [ours[i] / theirs[i] for ours, theirs in pairs]
        print(
            f"  {kind}, ours / nanoGPT: median {statistics.median(ratios):.3f} of {len(ratios)} "
            f"rounds ({min(ratios):.3f} … {max(ratios):.3f})"
        )
    apart = max(abs(a - b) for a, b in zip(losses["ours"], losses["nanoGPT"], strict=True))
    print(
        f"  loss after {len(losses['ours'])} steps: {losses['ours'][-1]:.6f} ours, "
        f"{losses['nanoGPT'][-1]:.6f} nanoGPT; largest difference of all steps {apart:.2e}"
    )


def _experiment(arguments) -> tuple[Experiment, int]:
    gpu = torch.cuda.is_available()
    name = arguments.config
    file, vocab_size = {"char": ("shakespeare-char-cpu", 65), "124m": ("shakespeare", 50304)}[name]
    size = arguments.micro_batch_size or {"char": 12, "124m": 32 if gpu else 1}[name]
    experiment = load_experiment(
        CONFIGS / f"{file}.yaml",
        [
            f"train.micro_batch_size={size}",
            f"train.global_batch_size={size * arguments.accumulate}",
            f"train.compile={str(gpu).lower()}",
            "train.max_steps=1000000",
        ],
    )
    return resolve_auto(experiment, RunFolder("none"), _worker(arguments)), vocab_size


def _batch(generator, vocab_size: int, b: int, t: int, device: str):
    """Return random tokens with structure (a walk of small steps), so that the loss can fall."""
    walk = torch.randint(-3, 4, (b, t + 1), generator=generator).cumsum(1) % vocab_size
    return walk[:, :-1].contiguous().to(device), walk[:, 1:].contiguous().to(device)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True, help="folder of a nanoGPT checkout")
    parser.add_argument("--config", choices=("char", "124m"), default="char")
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        default=None,
        help="sequences; 12 for char, 1 or 32 (GPU) for 124m",
    )
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    arguments = parser.parse_args()
    if not (arguments.nanogpt / "model.py").is_file():
        parser.error(
            f"--nanogpt: {arguments.nanogpt} has no model.py; give the folder of a nanoGPT checkout"
        )
    return arguments


if __name__ == "__main__":
    main()
