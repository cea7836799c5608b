"""The type of matrix products: what a device computes fast, and what `train.dtype=auto` stands for.

A run or sweep replaces `auto` before its workers start. The type itself is stored with the
experiment and belongs to the identity of the run.
"""

import os
import re
import sys

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.machine import cpu_flags

# On a CPU with instructions for bfloat16, models of this width train twice as fast with it
# (benchmarks/RESULTS.md). Smaller ones are fast anyway, and keep the more exact float32.
MIN_WIDTH = 512
# Time of a step on a CPU without instructions for the type (benchmarks/RESULTS.md).
SLOWDOWN = {"bfloat16": "about 4 times", "float16": "up to 45 times"}
# Values of ONEDNN_MAX_CPU_ISA with which torch uses the instructions for bfloat16.
WITH_BFLOAT16 = re.compile("BF16|FP16|AMX|AVX10|DEFAULT|ALL")


def fast_dtype(on_gpu: bool) -> str:
    """Return the type with the fastest matrix products on this machine, for large matrices."""
    if on_gpu:
        import torch

        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16"
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or "ALL").upper()
    is_fast = cpu_flags() & {"amx_bf16", "avx512_bf16"} and WITH_BFLOAT16.search(limit)
    return "bfloat16" if is_fast else "float32"


def suitable(experiment: Experiment, layout: Layout) -> str:
    """Return the type that `train.dtype=auto` stands for in a new run."""
    width = getattr(experiment.model, "n_embd", MIN_WIDTH)  # other models may have no width
    if not layout.use_gpu and width < MIN_WIDTH:
        return "float32"
    return layout.fast_dtype


def warn_if_emulated(experiment: Experiment, layout: Layout, has_begun: bool) -> None:
    """Print a line to stderr if `train.dtype` is slow on the devices of the workers.

    Args:
        experiment: The run, without `auto`.
        layout: Its workers.
        has_begun: Its checkpoints have this type, which `auto` would keep.
    """
    dtype = experiment.train.dtype
    if dtype in ("float32", layout.fast_dtype):
        return
    if not layout.use_gpu:
        if dtype == "float16" and "avx512_fp16" in cpu_flags():
            return
        reason = f"on this CPU, a step takes {SLOWDOWN[dtype]} as long as with float32"
    elif layout.fast_dtype == "float16":
        reason = "this GPU emulates it, which is slower than float16"
    else:
        return
    advice = "a new name (name=…) with train.dtype=auto" if has_begun else "train.dtype=auto"
    print(f"train.dtype={dtype}: {reason}; use {advice}", file=sys.stderr, flush=True)
