"""FLOPs equal nanoGPT's formula and torch's counter; unknown devices have no peak."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.flops import (
    COUNTED,
    flops_per_token,
    mfu,
    peak_flops,
    position_parameters,
    sizes_of,
)
from model.gpt import GPT
from model.gpt_config import GPTConfig
from model.models import MODELS, empty_model
from orchestrator.code_hashes import REPOSITORY, source_hash

GPT2_124M = GPTConfig(bias=False)


SHAPE = {
    "block_size": st.integers(1, 40),
    "vocab_size": st.integers(1, 99),
    "n_layer": st.integers(1, 5),
    "n_head": st.just(4),
    "n_embd": st.sampled_from([8, 24, 64]),
    "dropout": st.just(0.0),
    "bias": st.booleans(),
    "loss_chunk": st.sampled_from([None, 7]),
}
OPTIONS = {
    "gpt2": {**SHAPE, "activation": st.sampled_from(["gelu", "gelu_tanh"])},
    "modern": {
        **SHAPE,
        "n_kv_head": st.sampled_from([None, 1, 2]),
        "norm_gains": st.booleans(),
        "rotary_base": st.just(1024.0),
        "rotary_share": st.sampled_from([0.0, 0.5]),
        "attention_scale": st.just(1.0),
        "window": st.sampled_from(["S", "SL"]),
        "window_size": st.sampled_from([None, 1, 9]),
        "value_embeddings": st.sampled_from([None, "last", "alternate"]),
        "smear": st.booleans(),
        "layer_smear": st.booleans(),
        "layer_scalars": st.booleans(),
        "logit_cap": st.sampled_from([None, 15.0]),
    },
}
CONFIGS = [st.builds(MODELS[kind].config, **options) for kind, options in OPTIONS.items()]


@given(st.one_of(CONFIGS))
def test_sizes_and_flops_equal_those_of_built_model(config):
    model = empty_model("gpt2" if isinstance(config, GPTConfig) else "modern", config)
    groups = model.parameter_groups()
    built = {
        group: sorted(model.get_parameter(name).numel() for name in names)
        for group, names in groups.items()
    }
    assert {group: sorted(numbers) for group, numbers in sizes_of(config).items()} == built
    assert flops_per_token(config) == model.flops_per_token(config.block_size)


@given(CONFIGS[0])
def test_positions_of_a_gpt2_are_those_of_the_built_model(config):
    model = empty_model("gpt2", config)
    without = model.num_parameters() - model.num_parameters(positions=False)
    assert position_parameters(config) == without


@pytest.mark.parametrize("kind", OPTIONS)
def test_sizes_are_checked_for_each_option_and_for_the_present_source(kind):
    """If the source has changed: mend `sizes_of` if the test above fails, then `COUNTED`."""
    assert OPTIONS[kind].keys() == {field.name for field in fields(MODELS[kind].config)}
    assert COUNTED[kind] == source_hash((REPOSITORY / MODELS[kind].files[0]).read_bytes())


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
