"""The model equals a plain implementation, other forms of itself, and published numbers."""

import math

import pytest
import torch
from torch import Tensor

from model.gpt import GPT
from model.gpt_config import GPTConfig

GPT2_124M = GPTConfig(bias=False)


def reference_logits(model: GPT, tokens: Tensor) -> Tensor:
    """Compute GPT-2 in float64 without fused operations: (B, T) -> (B, T, V)."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    steps = tokens.size(1)
    head_size = config.n_embd // config.n_head
    future = torch.ones(steps, steps).triu(1).bool()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)

    def gelu(x: Tensor) -> Tensor:
        if config.activation == "gelu_tanh":
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(x, f"{name}.c_attn").chunk(3, dim=-1)
        heads = []
        for h in range(config.n_head):
            part = slice(h * head_size, (h + 1) * head_size)
            scores = q[..., part] @ k[..., part].transpose(-2, -1) / math.sqrt(head_size)
            scores = scores.masked_fill(future, -math.inf).exp()
            heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., part])
        return linear(torch.cat(heads, dim=-1), f"{name}.c_proj")

    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:steps]
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        x = x + attention(norm(x, f"{block}.ln_1"), f"{block}.attn")
        x = x + linear(
            gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj"
        )
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def some_tokens(model: GPT, batch: int = 3, steps: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(
        model.config.vocab_size, (batch, steps or model.config.block_size), generator=generator
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_logits_equal_plain_implementation(small_gpt, bias, activation):
    model = small_gpt(bias=bias, activation=activation)
    tokens = some_tokens(model)
    logits = model.logits(tokens)
    expected = reference_logits(model, tokens)
    assert expected.std() > 0.5  # otherwise all logits would be within the tolerance
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)


def test_loss_is_the_mean_negative_log_likelihood_in_nats(small_gpt):
    model = small_gpt()
    tokens = some_tokens(model)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    probabilities = reference_logits(model, tokens[:, :-1]).softmax(-1)
    likelihoods = probabilities.gather(-1, tokens[:, 1:, None])
    assert loss.item() == pytest.approx(-likelihoods.log().mean().item(), abs=1e-5)


def test_target_minus_one_is_ignored(small_gpt):
    model = small_gpt()
    tokens = some_tokens(model)
    targets = tokens.clone()
    targets[0, 3:] = -1
    targets[2] = -1
    log_likelihoods = model.logits(tokens).double().log_softmax(-1)
    losses = -log_likelihoods.gather(-1, tokens[..., None]).squeeze(-1)  # (B, T)
    counted = targets != -1
    windows = model(tokens, targets, reduction="window")
    assert windows.dtype == torch.float64
    torch.testing.assert_close(windows, (losses * counted).sum(dim=1), atol=1e-5, rtol=0)
    total = losses[counted].sum().item()
    assert model(tokens, targets, reduction="sum").item() == pytest.approx(total, rel=1e-6)
    assert model(tokens, targets).item() == pytest.approx(total / counted.sum().item(), rel=1e-6)


def test_without_targets_only_last_position_has_logits(small_gpt):
    model = small_gpt()
    tokens = some_tokens(model, steps=9)
    last = model(tokens)
    every = model.logits(tokens)
    assert last.shape == (3, 1, model.config.vocab_size)
    torch.testing.assert_close(last, every[:, -1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunked_loss_has_the_loss_and_gradients_of_the_full_one(small_gpt, reduction):
    full, chunked = small_gpt(), small_gpt(loss_chunk=5)
    chunked.load_state_dict(full.state_dict())
    tokens = torch.randint(full.config.vocab_size, (3, 8))
    targets = torch.randint(-1, full.config.vocab_size, (3, 8))
    losses = [model(tokens, targets, reduction=reduction) for model in (full, chunked)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = [[p.grad for p in model.parameters()] for model in (full, chunked)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        windows = [model(tokens, targets, reduction="window") for model in (full, chunked)]
    torch.testing.assert_close(*windows)


def test_token_does_not_change_earlier_positions(small_gpt):
    model = small_gpt()
    tokens = some_tokens(model, batch=1)
    before = model.logits(tokens)
    for t in range(model.config.block_size):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % model.config.vocab_size
        after = model.logits(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulated_micro_batches_equal_the_full_batch(small_gpt, micro_batches):
    model = small_gpt()
    tokens, targets = some_tokens(model, batch=8, steps=15).unsqueeze(0).repeat(2, 1, 1)
    model(tokens, targets).backward()
    full = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for micro_tokens, micro_targets in zip(
        tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True
    ):
        (model(micro_tokens, micro_targets) / micro_batches).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, full[name], atol=1e-6, rtol=1e-4)


def test_gpt2_has_known_number_of_parameters():
    with torch.device("meta"):
        model = GPT(GPT2_124M)
    assert model.num_parameters() == 124_373_760
    assert model.num_parameters(positions=False) == 123_587_328


def test_tied_head_has_one_name(small_gpt):
    model = small_gpt()
    names = [name for name, _ in model.named_parameters()]
    assert names == list(model.state_dict())
    assert "lm_head.weight" not in names
    assert {
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.ln_f.bias",
    } <= set(names)


def test_initial_loss_is_that_of_uniform_guess():
    torch.manual_seed(1337)
    model = GPT(GPT2_124M)
    tokens = some_tokens(model, batch=1, steps=129)
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:])
    assert 10.8 < loss.item() < 11.15  # ln 50,304 = 10.826


def test_initialization_is_that_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=2, n_embd=128))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == float(".ln_" in name and name.endswith("weight"))).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_initial_weights_depend_only_on_global_seed():
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=1, n_embd=8))
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


def test_dropout_depends_on_seed_and_is_off_in_eval(small_gpt):
    model = small_gpt(dropout=0.3)
    tokens = some_tokens(model)
    without = small_gpt().logits(tokens)
    assert torch.equal(model.logits(tokens), without)
    model.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.logits(tokens))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], without)


def test_loss_is_float32_under_autocast(small_gpt):
    model = small_gpt()
    tokens = some_tokens(model)
    exact = model(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(tokens)
        mean = model(tokens, tokens)
        windows = model(tokens, tokens, reduction="window")
    assert logits.dtype == torch.bfloat16
    assert mean.dtype == torch.float32
    from_its_logits = -logits.double().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(windows, from_its_logits.sum(dim=1), atol=1e-4, rtol=0)
    assert mean.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_model_is_float32(small_gpt, dtype):
    model = small_gpt().to(dtype)
    tokens = some_tokens(model)
    logits = model.logits(tokens)
    loss = model(tokens, tokens)
    from_its_logits = -logits.double().log_softmax(-1).gather(-1, tokens[..., None]).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(from_its_logits.item(), abs=1e-5)


def test_compiled_model_is_one_graph_with_same_loss(small_gpt):
    model = small_gpt()
    tokens = some_tokens(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, tokens)
    assert loss.item() == pytest.approx(model(tokens, tokens).item(), abs=1e-6)


def test_too_many_tokens_are_refused(small_gpt):
    model = small_gpt()
    with pytest.raises(ValueError, match="17 tokens.*block_size=16"):
        model(some_tokens(model, steps=17))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"n_embd": 770}, "n_head: 12.*n_embd=770"),
        ({"n_layer": 0}, "n_layer.*0"),
        ({"vocab_size": -5}, "vocab_size.*-5"),
        ({"block_size": 1.5}, "block_size.*1.5"),
        ({"n_head": True}, "n_head.*True"),
    ],
)
def test_invalid_shapes_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        GPTConfig(**wrong)
