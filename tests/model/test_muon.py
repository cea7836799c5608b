"""Muon equals torch's with the cast to bfloat16 taken out, AdamW equals torch's; both resume."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from model.gpt import GPT
from model.gpt_config import GPTConfig
from model.muon import NEWTON_SCHULZ, POLAR_EXPRESS, MuonAdamW, batches, orthogonalize

SHAPES = [(32, 32), (32, 32), (96, 32), (32, 128), (32, 32), (128, 32)]
STEP = """
import sys
import torch
from model.gpt import GPT
from model.gpt_config import GPTConfig
from model.muon import MuonAdamW
model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
optimizer = MuonAdamW([
    {"params": list(model[0].parameters()), "muon": True}, {"params": list(model[1].parameters())}
])
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
sys.exit("torch._dynamo" in sys.modules)
"""


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Set gradients whose singular values differ by a factor of 100,000, as those of models do."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        rows, columns = param.shape
        scale = 10 ** -torch.linspace(0, 5, min(rows, columns))
        left = torch.randn(rows, len(scale), generator=generator)
        right = torch.randn(len(scale), columns, generator=generator)
        param.grad = left * scale @ right


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def without_cast(grad: Tensor, coefficients, steps: int, eps: float) -> Tensor:
    """Compute torch's Newton-Schulz iterations in the dtype of the gradient."""
    a, b, c = coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.size(0) > grad.size(1) else x


def test_muon_equals_that_of_torch_without_its_cast(monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", without_cast)
    ours, theirs = matrices(), matrices()
    group = {"params": ours, "muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    train(MuonAdamW([group]), ours, range(15))
    train(torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1), theirs, range(15))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1.5e-6, rtol=0)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 48), (2, 32, 64), (2, 32, 128), (1, 1, 5)])
@pytest.mark.parametrize(
    "coefficients",
    [NEWTON_SCHULZ, ((2.0, -1.5, 0.5),) * 12, POLAR_EXPRESS[:3], POLAR_EXPRESS],
    ids=["newton-schulz", "track 3", "polar-express-3", "polar-express-5"],
)
def test_orthogonalized_matrices_equal_singular_vectors_with_polynomial_of_values(
    shape, coefficients
):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    expected = u @ s.diag_embed() @ vh
    found = orthogonalize(matrices, coefficients)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    if len(coefficients) > 5 or coefficients == POLAR_EXPRESS:
        assert (s - 1).abs().max() < 0.3  # the values themselves are near 1


def test_other_groups_have_the_bits_of_adamw_of_torch():
    ours, theirs = matrices(), matrices()
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    train(MuonAdamW([{"params": ours, **settings}]), ours, range(3))
    train(torch.optim.AdamW(theirs, fused=True, **settings), theirs, range(3))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def two_groups(params: list[nn.Parameter]) -> MuonAdamW:
    muon = {"params": params[:4], "muon": True, "weight_decay": 0.1, "cautious": True}
    return MuonAdamW([muon, {"params": params[4:], "lr": 0.01}])


def test_restored_state_gives_the_bits_of_a_run_that_never_stopped():
    never, first = matrices(), matrices()
    train(two_groups(never), never, range(8))
    stopped = two_groups(first)
    train(stopped, first, range(5))
    second = [nn.Parameter(param.detach().clone()) for param in first]
    resumed = two_groups(second)
    for old, new in zip(first, second, strict=True):
        for name, value in stopped.state[old].items():
            assert isinstance(value, Tensor)
            resumed.state[new][name] = value.clone()
    train(resumed, second, range(5, 8))
    for mine, other in zip(never, second, strict=True):
        assert torch.equal(mine, other)


def test_state_dict_of_torch_restores_too():
    never, first = matrices(), matrices()
    train(two_groups(never), never, range(8))
    stopped = two_groups(first)
    train(stopped, first, range(5))
    resumed = two_groups(first)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    train(resumed, first, range(5, 8))
    assert all(torch.equal(mine, other) for mine, other in zip(never, first, strict=True))


def test_copies_in_trial_groups_are_updated_alone():
    params = matrices()
    optimizer = two_groups(params)
    train(optimizer, params, range(2))
    set_gradients(params, 2)
    before = [param.detach().clone() for param in params]
    groups = optimizer.param_groups
    copies = [params[2].detach().clone(), params[5].detach().clone()]
    for one, param in zip(copies, (params[2], params[5]), strict=True):
        one.grad = param.grad
        optimizer.state[one] = {k: v.clone() for k, v in optimizer.state[param].items()}
    optimizer.param_groups = [
        {**group, "params": [one]} for group, one in zip(groups, copies, strict=True)
    ]
    optimizer.step()
    optimizer.param_groups = groups
    assert all(torch.equal(old, new) for old, new in zip(before, params, strict=True))
    optimizer.step()
    torch.testing.assert_close(copies[0], params[2].data, atol=1e-6, rtol=0)
    assert torch.equal(copies[1], params[5])


def test_cautious_decay_only_strengthens_the_update():
    results = {}
    for name, settings in {
        "none": {"weight_decay": 0.0},
        "plain": {"weight_decay": 0.5},
        "cautious": {"weight_decay": 0.5, "cautious": True},
    }.items():
        params = matrices()
        before = [param.detach().clone() for param in params]
        train(MuonAdamW([{"params": params, "muon": True, **settings}]), params, range(1))
        results[name] = torch.cat([param.detach().flatten() for param in params])
    start = torch.cat([param.flatten() for param in before])
    same_direction = (start - results["none"]) * start >= 0  # the update, times the weight
    assert 0.2 < same_direction.float().mean() < 0.8
    expected = torch.where(same_direction, results["plain"], results["none"])
    torch.testing.assert_close(results["cautious"], expected, atol=1e-6, rtol=0)


def test_parts_of_a_matrix_are_updated_as_matrices_of_their_own():
    whole = [nn.Parameter(torch.randn(96, 32)), nn.Parameter(torch.randn(48, 32))]
    whole[0].row_parts = 3
    whole[1].row_parts = 3  # (16, 32)
    alone = [nn.Parameter(part.clone()) for param in whole for part in param.detach().chunk(3)]
    optimizers = [
        MuonAdamW([{"params": params, "muon": True, "weight_decay": 0.1}])
        for params in (whole, alone)
    ]
    for step in range(3):
        set_gradients(whole, step)
        parts = [part for param in whole for part in param.grad.chunk(3)]
        for param, part in zip(alone, parts, strict=True):
            param.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([*alone[:3]]), whole[0])
    assert torch.equal(torch.cat([*alone[3:]]), whole[1])


def test_gpt2_has_query_key_and_value_apart():
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=8))
    parts = {
        name: parameter.row_parts
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "row_parts")
    }
    assert parts == {f"transformer.h.{i}.attn.c_attn.weight": 3 for i in range(2)}


def test_batches_of_limited_size_give_the_same_updates(monkeypatch):
    ours, theirs = matrices(), matrices()
    train(MuonAdamW([{"params": ours, "muon": True}]), ours, range(3))
    monkeypatch.setattr("model.muon.BATCH_NUMEL", 2 * 32 * 32)
    train(MuonAdamW([{"params": theirs, "muon": True}]), theirs, range(3))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_list_of_matrices_has_no_more_numbers_than_the_limit(monkeypatch, order):
    c = 8
    monkeypatch.setattr("model.muon.BATCH_NUMEL", 8 * c * c)
    params = [nn.Parameter(torch.empty(3 * c, c)) for _ in range(4)]
    for param in params:
        param.row_parts = 3
    params = [*params, *(nn.Parameter(torch.empty(c, c)) for _ in range(5))][::order]
    found = batches([*params, nn.Parameter(torch.empty(9 * c, c))])
    sizes = [[param.numel() // (c * c) for param in batch] for batch in found]
    by_order = {1: [[3, 3], [3, 3, 1, 1], [1, 1, 1]], -1: [[1, 1, 1, 1, 1, 3], [3, 3], [3]]}
    assert sizes == [*by_order[order], [9]], "a larger one is alone"


def test_parameters_without_gradient_stay():
    params = matrices()
    before = [param.detach().clone() for param in params]
    optimizer = two_groups(params)
    set_gradients(params, 0)
    params[1].grad = params[5].grad = None
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, params, strict=True)]
    assert changed == [True, False, True, True, True, False]
    assert params[1] not in optimizer.state


def test_vector_in_a_group_of_muon_is_refused():
    with pytest.raises(ValueError, match=r"matrices.*\(3,\)"):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(3))], "muon": True}])


def test_update_imports_no_compiler():
    assert subprocess.run([sys.executable, "-c", STEP], timeout=60).returncode == 0
