"""FLOPs equal nanoGPT's formula and torch's counter; unknown devices have no peak."""

from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.flops import (
    DecaySummary,
    decay_summary,
    flops_per_token,
    mfu,
    parameter_count,
    peak_flops,
)
from model.gpt import GPT
from model.gpt_config import GPTConfig
from model.optim import OptimizerSettings, parameter_groups

GPT2_124M = GPTConfig(bias=False)


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(1, 99),
    st.booleans(),
)
def test_parameter_count_equals_that_of_built_model(
    n_layer, n_head, head_size, block_size, vocab_size, bias
):
    config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_head * head_size, bias=bias)
    with torch.device("meta"):
        model = GPT(config)
    assert parameter_count(config) == model.num_parameters()
    assert parameter_count(config, positions=False) == model.num_parameters(positions=False)
    settings = OptimizerSettings(max_lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1)
    groups = [group["params"] for group in parameter_groups("adamw", model, settings)]
    sizes = [(len(group), sum(one.numel() for one in group)) for group in groups]
    assert astuple(decay_summary(config)) == (*sizes[0], *sizes[1])


def test_gpt2_has_known_number_of_decayed_parameters():
    assert decay_summary(GPTConfig(bias=False)) == DecaySummary(50, 124_354_560, 25, 19_200)


def test_gpt2_has_known_flops_per_token():
    heads_times_their_size = 12 * 64
    assert (
        flops_per_token(GPT2_124M)
        == 6 * 123_587_328 + 12 * 12 * heads_times_their_size * 1024
        == 854_770_176
    )


def test_flops_equal_torch_flop_counter():
    config = GPTConfig(block_size=64, vocab_size=512, n_layer=3, n_head=4, n_embd=64, bias=False)
    model = GPT(config)
    tokens = torch.zeros(2, config.block_size, dtype=torch.long)
    # The backward pass of fused attention computes the scores again, which MFU does not count.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    # The counter sees only matrix products; our N also has the few weights of the LayerNorms.
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(
        flops_per_token(config), rel=0.005
    )


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
        ("A100-SXM4-80GB", "float32", 156),
        ("NVIDIA A100 80GB PCIe", "float16", 312),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float16", 65),
        ("Tesla V100-SXM2-16GB", "float32", 15.7),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ],
)
def test_device_names_of_drivers_have_known_peaks(name, dtype, tera):
    assert peak_flops(name, dtype) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "NVIDIA L40",
        "NVIDIA A10",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_unknown_device_has_no_peak_and_no_mfu(name):
    assert peak_flops(name, "bfloat16") is None
    assert mfu(1e5, flops_per_token(GPT2_124M), name, "bfloat16") is None


@pytest.mark.parametrize("name", ["Tesla T4", "Tesla V100-SXM2-32GB"])
def test_dtype_without_hardware_support_has_no_peak(name):
    assert peak_flops(name, "bfloat16") is None
    assert peak_flops(name, "float16") > peak_flops(name, "float32")


def test_mfu_equals_that_of_published_nanogpt_run():
    # 600,000 steps of 491,520 tokens in about four days on eight A100: nanoGPT's README.
    tokens_per_sec = 600_000 * 491_520 / (4 * 24 * 3600)
    share = mfu(
        tokens_per_sec,
        flops_per_token(GPT2_124M),
        "NVIDIA A100-SXM4-40GB",
        "bfloat16",
        world_size=8,
    )
    assert share == pytest.approx(0.29, abs=0.005)
    assert share == pytest.approx(
        mfu(tokens_per_sec / 8, flops_per_token(GPT2_124M), "NVIDIA A100-SXM4-40GB", "bfloat16")
    )
