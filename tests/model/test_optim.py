"""Optimizers: groups with and without weight decay, and the formula of AdamW."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from model.modern import Modern
from model.modern_config import ModernConfig
from model.optim import GroupSettings, OptimizerSettings, build, parameter_groups

SETTINGS = OptimizerSettings(max_lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1)

STEP = """
import sys
import torch
from model.optim import OptimizerSettings, build
model = torch.nn.Linear(3, 2)
optimizer = build("adamw", model, OptimizerSettings(0.1, 0.9, 0.99, 0.1))
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
sys.exit("torch._dynamo" in sys.modules)
"""


def test_update_imports_no_compiler():
    assert subprocess.run([sys.executable, "-c", STEP], timeout=60).returncode == 0


def test_updates_have_the_bits_of_adamw_of_torch(small_gpt):
    ours, theirs = small_gpt(), small_gpt()
    settings = OptimizerSettings(max_lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1)
    groups = parameter_groups("adamw", theirs, settings)
    optimizers = (
        build("adamw", ours, settings),
        torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-8, fused=True),
    )
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            tokens = torch.arange(16).view(2, 8) % model.config.vocab_size
            loss = model(tokens, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_every_parameter_is_in_one_group(small_gpt):
    model = small_gpt()
    decayed, kept = parameter_groups("adamw", model, SETTINGS)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    grouped = {
        name: p
        for group in (decayed, kept)
        for name, p in zip(group["names"], group["params"], strict=True)
    }
    assert len(grouped) == len(decayed["names"]) + len(kept["names"])
    assert {name: id(p) for name, p in grouped.items()} == {
        name: id(p) for name, p in model.named_parameters()
    }
    assert all(
        name.endswith(("bias", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
        for name in kept["names"]
    )
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(decayed["names"])


def test_groups_of_muon_have_their_own_rates_and_decay(small_gpt):
    own = {"head": GroupSettings(lr_scale=3.0), "embedding": GroupSettings(weight_decay=0.0)}
    settings = replace(SETTINGS, groups=own)
    by_name = {group["group"]: group for group in parameter_groups("muon", small_gpt(), settings)}
    # The head of a GPT-2 is tied, so it belongs to the embedding.
    assert {name: (g["lr_scale"], g["weight_decay"]) for name, g in by_name.items()} == {
        "matrix": (1.0, 0.1),
        "embedding": (5.0, 0.0),
        "scalar": (2.5, 0.0),
    }
    modern = Modern(ModernConfig(block_size=8, vocab_size=32, n_layer=1, n_head=2, n_embd=8))
    head = [g for g in parameter_groups("muon", modern, settings) if g["group"] == "head"]
    assert [(g["lr_scale"], g["names"]) for g in head] == [(3.0, ["head.weight"])]


def test_group_settings_split_the_groups_of_adamw(small_gpt):
    settings = replace(SETTINGS, groups={"embedding": GroupSettings(lr_scale=0.5, beta2=0.8)})
    model = small_gpt()
    groups = parameter_groups("adamw", model, settings)
    assert [(g["group"], g["lr_scale"], g["betas"]) for g in groups] == [
        ("matrix", 1.0, (0.9, 0.99)),
        ("scalar", 1.0, (0.9, 0.99)),
        ("embedding", 0.5, (0.9, 0.8)),
    ]
    assert sorted(name for g in groups for name in g["names"]) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_muon_needs_a_model_with_groups():
    with pytest.raises(ValueError, match="optim.kind=muon needs a model with `parameter_groups`"):
        build("muon", torch.nn.Linear(3, 2), SETTINGS)


def test_frozen_parameters_are_left_out(small_gpt):
    model = small_gpt()
    model.transformer.wpe.weight.requires_grad_(False)
    names = [
        name for group in parameter_groups("adamw", model, SETTINGS) for name in group["names"]
    ]
    assert len(names) == len(list(model.parameters())) - 1
    assert "transformer.wpe.weight" not in names


def test_adamw_steps_equal_formula(small_gpt):
    model = small_gpt()
    lr, beta1, beta2, decay, eps = 1e-2, 0.9, 0.95, 0.1, 1e-8
    optimizer = build("adamw", model, OptimizerSettings(lr, beta1, beta2, decay))
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    tokens = torch.arange(32).view(2, 16)
    for t in (1, 2, 3):
        optimizer.zero_grad()
        model(tokens, tokens).backward()
        for name, p in model.named_parameters():
            gradient = p.grad.double()
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            update = (first[name] / (1 - beta1**t)) / ((second[name] / (1 - beta2**t)).sqrt() + eps)
            shrunk = expected[name] * (1 - lr * decay) if p.dim() >= 2 else expected[name]
            expected[name] = shrunk - lr * update
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], atol=1e-5, rtol=1e-5)
