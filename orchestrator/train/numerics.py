"""What decides the last bit: the state of the process, the seed of each draw, and the fingerprint of both.

Eats an experiment and a `Worker`; yields a process in a known state whatever ran in it before.
"""

import contextlib
import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError


@dataclass(frozen=True)
class Worker:
    """This process's place: `rank` of `world_size`, its device ("cpu", "cuda:0"), its CPUs, and which attempt this is."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    cpus: int = 1
    attempt: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def prepare_process(experiment: Experiment, worker: Worker) -> None:
    """Set everything global that arithmetic depends on; a reused process leaks what it was set to before."""
    torch.set_num_threads(worker.cpus)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision(
        "high" if worker.device.startswith("cuda") else "highest"
    )  # TF32 on GPUs
    torch.backends.cudnn.allow_tf32 = True
    on_gpu = worker.device.startswith("cuda")
    if on_gpu:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # else cuBLAS may add in another order on each stream
    # The backward of attention and of the embedding adds with atomics otherwise, in an order that no two runs share; not
    # `warn_only`, with which cuDNN's attention keeps its atomics. It costs 3 % of a step (benchmarks/RESULTS.md).
    torch.use_deterministic_algorithms(on_gpu)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(experiment.train.seed)
    if on_gpu:
        torch.cuda.set_device(worker.device)
        torch.cuda.reset_peak_memory_stats()


def agree(number: int, worker: Worker) -> int:
    """Rank 0's `number`, on every worker."""
    if worker.world_size == 1:
        return number
    shared = torch.tensor([number], dtype=torch.int64, device=worker.device)
    dist.broadcast(shared, src=0)
    return int(shared.item())


def autocast(experiment: Experiment, device: str):
    """The context in which products are computed in `train.dtype`; parameters and gradients stay float32."""
    if experiment.train.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, experiment.train.dtype))


def available_cpus() -> int:
    """CPUs that this process may use, which on a shared machine are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keyed_seed(seed: int, *key: int) -> int:
    """A seed that is a function of `seed` and `key` alone, for torch.manual_seed: (seed, step, micro-batch) of dropout."""
    text = "/".join(map(str, (seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def fingerprint(experiment: Experiment, worker: Worker) -> dict[str, Any]:
    """What must stay the same for a resumed run to give the same bits; the number of workers is not part of it."""
    return {
        "micro_batch": [experiment.train.micro_batch_size, experiment.model.block_size],
        "reduction_slots": experiment.slots,
        "dtype": experiment.train.dtype,
        "compile": experiment.train.compile,
        "cpus_per_worker": worker.cpus,
        "device": device_name(worker.device),
        "torch": torch.__version__,
    }


def check(
    before: dict[str, Any], now: dict[str, Any], experiment: Experiment, where: Any
) -> list[str]:
    """Refuse to go on with other last bits, unless `train.allow_drift` says so; returns what differs, as `changes`.

    Raises:
        UserError: shows what differs.
    """
    lines = changes(before, now)
    if lines and not experiment.train.allow_drift:
        raise UserError(
            "\n".join(
                [
                    f"{where}: from here on the last bits would not be those of a run never stopped:",
                    *(f"  {line}" for line in lines),
                    "  go on where it began, set train.allow_drift=true, or use a new name (name=…)",
                ]
            )
        )
    return lines


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of two fingerprints differs, a line each: from here on the last bits may."""
    return [
        f"{key}: {before.get(key)} before, {now[key]} now"
        for key in now
        if now[key] != before.get(key)
    ]


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with the instruction set that torch found."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
