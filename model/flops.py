"""How much arithmetic training takes, and what share of the hardware's it reaches (MFU).

Eats a GPTConfig, a device's name as torch.cuda.get_device_name() gives it, and tokens per second; yields FLOPs and
shares. A device that is not in the table has no peak and no MFU (None): a guess would look like a measurement.
"""

from __future__ import annotations

import re

from model.gpt import GPTConfig

# Peaks in TFLOP/s, dense (half of what a datasheet quotes "with sparsity"), with float32 accumulation:
# (pattern of the whole device name, bfloat16, float16, float32). float32 is TF32 where the chip has it, else plain.
# None: the chip has no such unit. Patterns are full matches, so that MIG slices, laptop and "Ti" or "D" variants,
# which have other peaks, stay unknown.
_PEAKS: tuple[tuple[str, float | None, float, float], ...] = (
    # NVIDIA A100 Tensor Core GPU datasheet (SXM and PCIe alike)
    (r"A100-SXM4-(40|80)GB|A100-PCIE-40GB|A100 80GB PCIe", 312, 312, 156),
    # NVIDIA H100 Tensor Core GPU datasheet: SXM 1,979 / 1,979 / 989 with sparsity
    (r"H100 80GB HBM3", 989.5, 989.5, 494.5),
    # the same datasheet: PCIe 1,513 / 1,513 / 756 with sparsity
    (r"H100 PCIe", 756.5, 756.5, 378),
    # NVIDIA H200 Tensor Core GPU datasheet: SXM 1,979 / 1,979 / 989 with sparsity
    (r"H200", 989.5, 989.5, 494.5),
    # NVIDIA Blackwell datasheet, HGX B200 (8 GPUs): 36 / 36 / 18 PFLOPS with sparsity
    (r"B200", 2250, 2250, 1125),
    # NVIDIA L40S datasheet: 362 / 362 / 183 dense
    (r"L40S", 362, 362, 183),
    # NVIDIA L4 Tensor Core GPU datasheet: 242 / 242 / 120 with sparsity
    (r"L4", 121, 121, 60),
    # NVIDIA A10G datasheet: 70 / 70 / 35 dense
    (r"A10G", 70, 70, 35),
    # NVIDIA T4 datasheet: 65 mixed precision, 8.1 single; no bfloat16, no TF32
    (r"T4", None, 65, 8.1),
    # NVIDIA V100 Tensor Core GPU datasheet: SXM2 125 / 15.7; PCIe 112 / 14; V100S 130 / 16.4; no bfloat16, no TF32
    (r"V100-SXM2-(16|32)GB", None, 125, 15.7),
    (r"V100-PCIE-(16|32)GB", None, 112, 14),
    (r"V100S-PCIE-32GB", None, 130, 16.4),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: GeForce RTX 4090, FP32 accumulate
    (r"GeForce RTX 4090", 165.2, 165.2, 82.6),
    # NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A: GeForce RTX 3090, FP32 accumulate
    (r"GeForce RTX 3090", 71, 71, 35.6),
)
_COLUMNS = {"bfloat16": 1, "float16": 2, "float32": 3}


def parameter_count(config: GPTConfig, positions: bool = True) -> int:
    """Parameters of GPT(config) without building it; without `positions` as nanoGPT counts. The tied head is one."""
    c, biases = config.n_embd, int(config.bias)
    norm = c * (1 + biases)
    attention = 3 * c * (c + biases) + c * (c + biases)
    mlp = 4 * c * (c + biases) + c * (4 * c + biases)
    blocks = config.n_layer * (2 * norm + attention + mlp)
    return config.vocab_size * c + blocks + norm + (config.block_size * c if positions else 0)


def flops_per_token(config: GPTConfig) -> int:
    """FLOPs of training on one token, forward and backward: 6 N + 12 n_layer n_embd block_size.

    N is parameter_count without positions, as in nanoGPT's estimate_mfu: every weight, the tied head's once, takes a
    multiplication and an addition forward and twice that backward; positions are only added. The second term
    is attention over a full context, the causal half that kernels skip included. (nanoGPT writes it 12 L H Q T.)
    Source: PaLM, arXiv:2204.02311, appendix B. GPT-2 124M, block 1024, no bias: 854,770,176.
    """
    return (
        6 * parameter_count(config, positions=False)
        + 12 * config.n_layer * config.n_embd * config.block_size
    )


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak dense FLOP/s of one device for matrix products in `dtype`; None if the device or that unit is unknown.

    device_name: as torch.cuda.get_device_name(). dtype: "bfloat16", "float16" or "float32" (TF32 where it exists).
    Raises ValueError for another dtype.
    """
    if dtype not in _COLUMNS:
        raise ValueError(f"dtype must be one of {', '.join(_COLUMNS)}, got {dtype!r}")
    for row in _PEAKS:
        if re.fullmatch(f"((NVIDIA|Tesla) )?({row[0]})", device_name):
            tera = row[_COLUMNS[dtype]]
            return None if tera is None else tera * 1e12
    return None


def mfu(
    tokens_per_sec: float, config: GPTConfig, device_name: str, dtype: str, world_size: int = 1
) -> float | None:
    """Model FLOPs utilization, 0..1: what tokens_per_sec over all `world_size` devices takes, as a share of their peak.

    None where peak_flops knows no peak. Source: PaLM, arXiv:2204.02311, appendix B.
    """
    peak = peak_flops(device_name, dtype)
    return None if peak is None else tokens_per_sec * flops_per_token(config) / (peak * world_size)
