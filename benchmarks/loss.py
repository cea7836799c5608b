#!/usr/bin/env python3
"""Measure time and memory of head and loss in chunks, as ratios to all logits at once.

    GOMP_SPINCOUNT=1000 benchmarks/loss.py [--tokens 4096] [--chunk 512] [--rounds 7]
                                           [--threads 1] [--device cpu|cuda]

Both sides compute the loss of the same hidden states and the gradients of these and of the head
(V = 50,304, C = 768), in turns. `all` is F.linear and F.cross_entropy in float32, as in nanoGPT;
bfloat16 is that of torch.autocast. GOMP_SPINCOUNT is that of our workers. On a CPU, the time is CPU
time, and the memory is how far the resident memory of the process rises above what it was before.
"""

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.loss import chunked_cross_entropy, cross_entropy
from orchestrator.train.numerics import device_name

VOCAB_SIZE, WIDTH, BLOCK_SIZE = 50304, 768, 1024
Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    sides: dict[str, Side] = {
        "all": lambda x, w, to: cross_entropy(F.linear(x, w), to, "mean"),
        "chunks": lambda x, w, to: chunked_cross_entropy(
            x, w, None, to, "mean", chunk=arguments.chunk
        ),
    }
    print(f"{device_name(device.type)}, torch {torch.__version__}, {arguments.threads} thread(s)")
    print(
        "| type | all, s | chunks ÷ all, time: median (range) | all, MiB | chunks ÷ all, memory |"
    )
    print("|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        times: dict[str, list[float]] = {name: [] for name in sides}
        memory: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(arguments.rounds + 1):
            for name, side in sides.items():
                seconds, mib = _measure(side, dtype, arguments.tokens, device)
                if number:  # the first round is a warm-up
                    times[name].append(seconds)
                    memory[name].append(mib)
        _report(dtype, times, memory)


def _measure(
    side: Side, dtype: torch.dtype, tokens: int, device: torch.device
) -> tuple[float, float]:
    """Return seconds and MiB of the loss and its gradients."""
    generator = torch.Generator().manual_seed(1)
    shape = (tokens // BLOCK_SIZE, BLOCK_SIZE)
    hidden = torch.randn((*shape, WIDTH), generator=generator).to(device).requires_grad_()
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=generator) * 0.02
    weight = weight.to(device).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, shape, generator=generator).to(device)
    for tensor in (hidden, weight):  # as in training: the loss adds to what there is
        tensor.grad = torch.zeros_like(tensor)
    gc.collect()
    before = _memory(device, reset=True)
    start = _clock(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = side(hidden, weight, targets)
    loss.backward()
    return _clock(device) - start, (_memory(device) - before) / 2**20


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _memory(device: torch.device, reset: bool = False) -> float:
    """Return the peak memory in bytes since the last reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _report(
    dtype: torch.dtype, times: dict[str, list[float]], memory: dict[str, list[float]]
) -> None:
    mib = {name: statistics.median(values) for name, values in memory.items()}
    ratios = sorted(ours / full for ours, full in zip(times["chunks"], times["all"], strict=True))
    print(
        f"| {str(dtype).removeprefix('torch.')} | {statistics.median(times['all']):.3f} | "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) | "
        f"{mib['all']:,.0f} | {mib['chunks'] / mib['all']:.2f} |",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="positions, a multiple of 1,024")
    parser.add_argument("--chunk", type=int, default=512, help="model.loss_chunk")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
