#!/usr/bin/env python3
"""Compare our training step with nanoGPT's: the ratio of the times, and the losses.

    benchmarks/train_step.py --nanogpt CHECKOUT [--config char|124m] [--steps 20] [--rounds 7]

Both sides start from the same weights, see the same batches and use the same learning rate. Their
rounds alternate in one process, so that noise of the machine hits both. A ratio below 1 means that
ours is faster. nanoGPT's side is its own `model.py` and the inner loop of its `train.py`. With a
GPU, 124m runs in bfloat16 with torch.compile on both sides.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from model.flops import mfu
from model.gpt import GPT
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.train.numerics import Worker, device_name, prepare_process
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
        self.step.update(LR)
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experiment, vocab_size = _experiment(
        arguments.config, device, arguments.micro_batch_size, arguments.accumulate
    )
    worker = Worker(device="cuda:0" if device == "cuda" else "cpu", cpus=arguments.threads)
    prepare_process(experiment, worker)
    model = experiment.new_model(vocab_size)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    sides = {
        "ours": Ours(experiment, model, worker),
        "nanoGPT": NanoGPT(arguments.nanogpt, experiment, weights, vocab_size, worker.device),
    }
    seconds, losses = _race(sides, experiment, vocab_size, worker.device, arguments)
    _report(experiment, model, worker, seconds, losses, arguments)


def _race(sides, experiment: Experiment, vocab_size: int, device: str, arguments):
    """Run rounds of `--steps` steps; return seconds per step and losses of each side.

    The sides take turns in being first. The first round is a warm-up and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    generator = torch.Generator().manual_seed(1)
    t = experiment.train
    m = experiment.model
    for number in range(arguments.rounds + 1):
        rounds = [
            [
                _batch(generator, vocab_size, t.micro_batch_size, m.block_size, device)
                for _ in range(experiment.micro_batches)
            ]
            for _ in range(arguments.steps)
        ]
        for name in list(sides)[:: 1 if number % 2 else -1]:
            _synchronize(device)
            start = time.perf_counter()
            values = [sides[name].run(batches) for batches in rounds]
            _synchronize(device)
            if number:
                seconds[name].append((time.perf_counter() - start) / arguments.steps)
            losses[name] += values
    return seconds, losses


def _report(experiment, model, worker, seconds, losses, arguments) -> None:
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["nanoGPT"], strict=True)]
    where = device_name(worker.device)
    print(
        f"{arguments.config}: {model.num_parameters():,} parameters, {experiment.micro_batches} × "
        f"{experiment.train.micro_batch_size} × {experiment.model.block_size} tokens, "
        f"{experiment.train.dtype}, compile {experiment.train.compile}, {where}, "
        f"{worker.cpus} threads, torch {torch.__version__}"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        speed = experiment.tokens_per_step / median
        share = mfu(
            speed, model.flops_per_token(experiment.model.block_size), where, experiment.train.dtype
        )
        least = min(values) * 1e3
        time_ms = f"{median * 1e3:9.2f} ms per step (min {least:.2f})"
        utilization = "" if share is None else f", MFU {share:.1%}"
        print(f"  {name:<8} {time_ms}, {speed:12,.0f} tokens/s{utilization}")
    print(
        f"  ours / nanoGPT: median {statistics.median(ratios):.3f} of {len(ratios)} rounds "
        f"({min(ratios):.3f} … {max(ratios):.3f})"
    )
    apart = max(abs(a - b) for a, b in zip(losses["ours"], losses["nanoGPT"], strict=True))
    print(
        f"  loss after {len(losses['ours'])} steps: {losses['ours'][-1]:.6f} ours, "
        f"{losses['nanoGPT'][-1]:.6f} nanoGPT; largest difference of all steps {apart:.2e}"
    )


def _experiment(
    name: str, device: str, micro_batch_size: int | None, accumulate: int
) -> tuple[Experiment, int]:
    file, vocab_size = {"char": ("shakespeare-char-cpu", 65), "124m": ("shakespeare", 50304)}[name]
    gpu = device == "cuda"
    size = micro_batch_size or {"char": 12, "124m": 32 if gpu else 1}[name]
    dtype = "bfloat16" if name == "124m" else "float32"
    return load_experiment(
        CONFIGS / f"{file}.yaml",
        [
            f"train.micro_batch_size={size}",
            f"train.global_batch_size={size * accumulate}",
            f"train.dtype={dtype}",
            f"train.compile={str(gpu).lower()}",
            "train.max_steps=1000000",
        ],
    ), vocab_size


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
