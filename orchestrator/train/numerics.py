"""Settings of the process and seeds on which the last bit of a result depends; a fingerprint.

No list of settings is complete. A checkpoint therefore has a proof as well (`Step.proof`), which a
resume computes again (`begin.prove`). The fingerprint says what has changed if the proofs differ.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.cluster import dtypes
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError
from orchestrator.machine import processor
from orchestrator.redact import redact
from orchestrator.runs import identity
from orchestrator.runs.folder import RunFolder

# Environment variables that may change the bits of a result.
_VARIABLES = re.compile(
    "(ATEN|BLIS|CUBLAS|CUBLASLT|CUDNN|DNNL|GOMP|KMP|MKL|OMP|ONEDNN|OPENBLAS|PYTORCH|TORCH"
    "|TORCHINDUCTOR|TRITON)_.+|NVIDIA_TF32_OVERRIDE|GLIBC_TUNABLES|LD_PRELOAD"
)
_VALUE_CHARS = 200  # of a variable, in a checkpoint
# Raised when the bits of runs change, and so their proofs. 2: a gradient's norm is that of pieces
# of fixed size, and Muon orthogonalises the matrices of each slot together. 3, only with Muon: the
# lists of these matrices are limited by the sum of their numbers.
VERSION = 3
# Entries of the fingerprint that decide which sums a step makes: one micro-batch does not prove
# that they are as before.
NOT_PROVEN = ("micro_batch", "reduction_slots", "dtype", "compile")


@dataclass(frozen=True)
class Worker:
    """Place of this process among the training processes of a run.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        device: "cpu", "cuda:0" and so on.
        cpus: Number of CPUs, and so of torch's threads.
        attempt: Number of this start of the processes, from 1.
        has_folder: This process sees the files that rank 0 writes.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    cpus: int = 1
    attempt: int = 1
    has_folder: bool = True

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0


# Variables that decide what glibc does with large blocks.
MALLOC = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}


def prepare_process(experiment: Experiment, worker: Worker) -> None:
    """Set all global settings that arithmetic depends on.

    A reused Ray process still has the settings of its previous work.
    """
    on_gpu = worker.device.startswith("cuda")
    keep_memory()
    torch.set_num_threads(worker.cpus)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")  # high: TF32
    torch.backends.cudnn.allow_tf32 = True
    if on_gpu:
        # Without this setting, cuBLAS may add in another order on each stream.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Without this, backward passes of attention and embedding add with atomics, whose order changes
    # from run to run. With `warn_only`, cuDNN's attention would keep its atomics. The cost is 3 %
    # of a step (benchmarks/RESULTS.md).
    if torch.are_deterministic_algorithms_enabled() != on_gpu:
        torch.use_deterministic_algorithms(on_gpu)  # imports torch's compiler: 1.7 s
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(experiment.train.seed)
    if on_gpu:
        torch.cuda.set_device(worker.device)
        torch.cuda.reset_peak_memory_stats()


def keep_memory() -> None:
    """Let glibc keep the memory that torch frees, for the next step.

    By default it returns large blocks to the kernel, which fills each page with zeros when it is
    used again: 4 % of a small step, and a fifth of a step of GPT-2 (benchmarks/RESULTS.md).
    Settings of the user in the environment hold.
    """
    if MALLOC & os.environ.keys() or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped alone
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def resolve_auto(experiment: Experiment, folder: RunFolder, worker: Worker) -> Experiment:
    """Return the experiment with what `auto` stands for in this process.

    Raises:
        UserError: See `identity.resolve_auto`.
    """
    on_gpu = worker.device.startswith("cuda")
    layout = Layout(1, worker.cpus, on_gpu, fast_dtype=dtypes.fast_dtype(on_gpu))
    return identity.resolve_auto(experiment, layout, folder)


def autocast(experiment: Experiment, device: str) -> AbstractContextManager:
    """Return the context in which matrix products have `train.dtype`.

    Parameters and gradients are float32.
    """
    if experiment.train.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, experiment.train.dtype))


@contextlib.contextmanager
def casts_kept() -> Iterator[None]:
    """Keep the weights that autocast has cast, which it otherwise casts for each micro-batch.

    They are dropped at the end, before the update of the weights.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


def agree(number: int, worker: Worker) -> int:
    """Return the `number` of rank 0 on all ranks. All ranks must call this function."""
    if worker.world_size == 1:
        return number
    shared = torch.tensor([number], dtype=torch.int64, device=worker.device)
    dist.broadcast(shared, src=0)
    return int(shared.item())


def gather(text: str, worker: Worker, group: dist.ProcessGroup | None = None) -> list[str]:
    """Return the `text` of each rank, by rank. All ranks must call this function.

    Args:
        text: Any text.
        worker: This process.
        group: A process group of CPUs with all ranks; None: the default one.
    """
    if worker.world_size == 1:
        return [text]
    device = worker.device if group is None else "cpu"
    content = text.encode()
    own_size = torch.tensor([len(content)], dtype=torch.int64, device=device)
    sizes = [torch.empty_like(own_size) for _ in range(worker.world_size)]
    dist.all_gather(sizes, own_size, group=group)
    longest = max(1, *(int(size) for size in sizes))
    padded = bytearray(content.ljust(longest))
    mine = torch.frombuffer(padded, dtype=torch.uint8).to(device)
    found = [torch.empty_like(mine) for _ in range(worker.world_size)]
    dist.all_gather(found, mine, group=group)
    texts = zip(found, sizes, strict=True)
    return [one[: int(size)].cpu().numpy().tobytes().decode() for one, size in texts]


def keyed_seed(seed: int, *key: int) -> int:
    """Return a seed for `seed_device` that depends on `seed` and `key` only.

    Dropout uses the key (step, micro-batch).
    """
    text = "/".join(str(number) for number in (seed, *key))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_device(seed: int, device: str) -> None:
    """Seed the random numbers that are drawn on a device, such as those of dropout.

    `torch.manual_seed` seeds all kinds of devices. For each kind that is not used it stores a stack
    trace, which takes half a millisecond: too long for every micro-batch.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


# ---- fingerprint ----


def fingerprint(experiment: Experiment, worker: Worker) -> dict[str, Any]:
    """Return what must stay the same for a resumed run to have the same bits.

    The number of workers is not part of it: results do not depend on it.
    """
    compiles = experiment.train.compile
    return {
        "micro_batch": [experiment.train.micro_batch_size, experiment.model.block_size],
        "reduction_slots": experiment.slots,
        "dtype": experiment.train.dtype,
        # True: as a whole, as every model was at first; see `models.compiled`.
        "compile": "by block" if compiles and worker.device == "cpu" else compiles,
        "cpus_per_worker": worker.cpus,
        "device": device_name(worker.device),
        "torch": torch.__version__,
        "numerics": VERSION,
    }


def environment() -> dict[str, Any]:
    """Return what else may change the bits: versions and environment variables."""
    variables = {
        name: value[:_VALUE_CHARS]
        for name, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(name)
    }
    return {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **redact(variables),
    }


def refuse_drift(lines: list[str], experiment: Experiment, where: object) -> None:
    """Refuse a start that would change the last bits, unless `train.allow_drift` is set.

    Args:
        lines: Why the bits would change; empty if they would not.
        experiment: The configuration.
        where: Folder of the run, for the message.

    Raises:
        UserError: There are lines, and `train.allow_drift` is false.
    """
    if lines and not experiment.train.allow_drift:
        raise UserError(
            f"{where}: results would differ in their last bits from an uninterrupted run: "
            f"{'; '.join(lines)}. Continue as before, set train.allow_drift=true, or use a new "
            "name (name=…)"
        )


def device_name(device: str) -> str:
    """Return the name of the GPU, or of the processor with the instruction set that torch uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()})"
