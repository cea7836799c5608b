"""Parameters and FLOPs of the models, and the share of the hardware's peak that is used (MFU).

For a device that is not in the table, the peak and the MFU are None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from model.gpt_config import GPTConfig
from model.modern_config import ModernConfig

Sizes = dict[str, list[int]]  # of each parameter, by group; see `protocol.HasParameterGroups`

# Hashes of the sources that `sizes_of` holds for. An edited model is built to count its parameters.
COUNTED = {"gpt2": "86054d8a5f655a67", "modern": "d5d27fc7cd4981f2"}


@dataclass(frozen=True)
class Peak:
    """Peak of one device in dense TFLOP/s with float32 accumulation. None: not supported.

    Dense is half of what a datasheet gives "with sparsity". float32 means TF32 where the chip has
    it.
    """

    names: str  # regular expression for the whole name of the device
    bfloat16: float | None
    float16: float
    float32: float


# The whole name must match: MIG slices, laptop chips and "Ti" or "D" variants have other peaks.
_PEAKS = (
    # NVIDIA A100 Tensor Core GPU datasheet (SXM and PCIe alike)
    Peak(r"A100-SXM4-(40|80)GB|A100-PCIE-40GB|A100 80GB PCIe", 312, 312, 156),
    # NVIDIA H100 Tensor Core GPU datasheet: SXM 1,979 / 1,979 / 989 with sparsity
    Peak(r"H100 80GB HBM3", 989.5, 989.5, 494.5),
    # the same datasheet: PCIe 1,513 / 1,513 / 756 with sparsity
    Peak(r"H100 PCIe", 756.5, 756.5, 378),
    # NVIDIA H200 Tensor Core GPU datasheet: SXM 1,979 / 1,979 / 989 with sparsity
    Peak(r"H200", 989.5, 989.5, 494.5),
    # NVIDIA Blackwell datasheet, HGX B200 (8 GPUs): 36 / 36 / 18 PFLOPS with sparsity
    Peak(r"B200", 2250, 2250, 1125),
    # NVIDIA L40S datasheet: 362 / 362 / 183 dense
    Peak(r"L40S", 362, 362, 183),
    # NVIDIA L4 Tensor Core GPU datasheet: 242 / 242 / 120 with sparsity
    Peak(r"L4", 121, 121, 60),
    # NVIDIA A10G datasheet: 70 / 70 / 35 dense
    Peak(r"A10G", 70, 70, 35),
    # NVIDIA T4 datasheet: 65 mixed precision, 8.1 single; no bfloat16, no TF32
    Peak(r"T4", None, 65, 8.1),
    # NVIDIA V100 Tensor Core GPU datasheet: SXM2 125 / 15.7; PCIe 112 / 14; V100S 130 / 16.4;
    # no bfloat16, no TF32
    Peak(r"V100-SXM2-(16|32)GB", None, 125, 15.7),
    Peak(r"V100-PCIE-(16|32)GB", None, 112, 14),
    Peak(r"V100S-PCIE-32GB", None, 130, 16.4),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: GeForce RTX 4090, FP32 accumulate
    Peak(r"GeForce RTX 4090", 165.2, 165.2, 82.6),
    # NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A: GeForce RTX 3090, FP32 accumulate
    Peak(r"GeForce RTX 3090", 71, 71, 35.6),
)


def sizes_of(config: GPTConfig | ModernConfig) -> Sizes:
    """Return the sizes of the parameters of `GPT(config)` or `Modern(config)`, without torch."""
    if isinstance(config, GPTConfig):
        return _sizes_of_gpt(config)
    return _sizes_of_modern(config)


def _sizes_of_gpt(config: GPTConfig) -> Sizes:
    c, layers = config.n_embd, config.n_layer
    norm = [c] * (1 + config.bias)
    biases = [3 * c, c, 4 * c, c] * config.bias
    return {
        "matrix": [3 * c * c, c * c, 4 * c * c, 4 * c * c] * layers,
        "embedding": [config.vocab_size * c, config.block_size * c],
        "head": [],  # tied to the embedding
        "scalar": (2 * norm + biases) * layers + norm,
    }


def _sizes_of_modern(config: ModernConfig) -> Sizes:
    c, layers, vocabulary = config.n_embd, config.n_layer, config.vocab_size
    kv = config.kv_heads * config.head_size
    value_embeddings = sum(map(config.has_value_embedding, range(layers)))
    factors = [c] * (2 * config.norm_gains + 2 * config.layer_smear)
    biases = [c, kv, kv, c, 4 * c, c] * config.bias
    return {
        "matrix": [c * c, kv * c, kv * c, c * c, 4 * c * c, 4 * c * c] * layers,
        "embedding": [vocabulary * c] + [vocabulary * kv] * value_embeddings,
        "head": [vocabulary * c],
        "scalar": (factors + biases) * layers
        + [c] * (config.smear + 2 * config.norm_gains)
        + [2 * layers] * config.layer_scalars
        + [vocabulary] * config.bias,
    }


def position_parameters(config: GPTConfig | ModernConfig) -> int:
    """Return the number of parameters of position embeddings."""
    return config.block_size * config.n_embd if isinstance(config, GPTConfig) else 0


def flops_per_token(config: GPTConfig | ModernConfig) -> int:
    """Return the FLOPs of training on one token: 6 N + 12 n_embd × tokens that each layer sees.

    N is the number of weights that multiply; of a GPT-2, as in nanoGPT, of all parameters without
    position embeddings, which are only added. Each weight needs a multiplication and an addition in
    the forward pass, and twice as many in the backward pass. The second term is attention over a
    full context or window, including the masked half that causal kernels skip.
    GPT-2 124M, block 1024, no bias: 854,770,176.

    Sources: PaLM, arXiv:2204.02311, appendix B; nanoGPT, estimate_mfu, writes 12 L H Q T.
    """
    sizes = sizes_of(config)
    if isinstance(config, GPTConfig):
        multiplied = sum(map(sum, sizes.values())) - position_parameters(config)
        seen = config.n_layer * config.block_size
    else:
        multiplied = sum(sizes["matrix"] + sizes["head"])
        seen = sum(map(config.window_of, range(config.n_layer)))
    return 6 * multiplied + 12 * config.n_embd * seen


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the peak dense FLOP/s of one device for matrix products; None if it is not known.

    Args:
        device_name: As `torch.cuda.get_device_name()` returns it.
        dtype: "bfloat16", "float16" or "float32" (TF32 where the chip has it).
    """
    for peak in _PEAKS:
        if re.fullmatch(f"((NVIDIA|Tesla) )?({peak.names})", device_name):
            tera = getattr(peak, dtype)
            return None if tera is None else tera * 1e12
    return None


def mfu(
    tokens_per_sec: float, flops: int, device_name: str, dtype: str, world_size: int = 1
) -> float | None:
    """Return the model FLOPs utilization, 0 to 1; None if the peak of the device is not known.

    Source: PaLM, arXiv:2204.02311, appendix B.

    Args:
        tokens_per_sec: Speed over all devices.
        flops: FLOPs of training on one token.
        device_name: See `peak_flops`.
        dtype: See `peak_flops`.
        world_size: Number of devices.
    """
    peak = peak_flops(device_name, dtype)
    if peak is None:
        return None
    return tokens_per_sec * flops / (peak * world_size)
