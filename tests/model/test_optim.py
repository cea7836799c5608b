"""Optimizers: groups with and without weight decay, and the formula of AdamW."""

import subprocess
import sys

import torch

from model.optim import OptimizerSettings, build, parameter_groups

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
    groups = parameter_groups(theirs, 0.1)
    optimizers = (
        build("adamw", ours, settings),
        torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-8, fused=True),
    )
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            tokens = torch.arange(16).view(2, 8) % model.config.vocab_size
            _, loss = model(tokens, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_every_parameter_is_in_one_group(small_gpt):
    model = small_gpt()
    decayed, kept = parameter_groups(model, 0.1)
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


def test_frozen_parameters_are_left_out(small_gpt):
    model = small_gpt()
    model.transformer.wpe.weight.requires_grad_(False)
    names = [name for group in parameter_groups(model, 0.1) for name in group["names"]]
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
        model(tokens, tokens)[1].backward()
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
