"""`modern` equals a plain implementation and other forms of itself, with each of its parts."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.modern import Modern
from model.modern_config import ModernConfig
from model.protocol import HasCache, HasFlops, HasParameterGroups

EVERYTHING = {
    "n_kv_head": 2,
    "bias": True,
    "norm_gains": True,
    "rotary_share": 1.0,
    "window": "SL",
    "window_size": 5,
    "value_embeddings": "alternate",
    "layer_smear": True,
    "layer_scalars": True,
    "logit_cap": 4.0,
    "loss_chunk": 5,
}
NOTHING = {"smear": False, "value_embeddings": None, "rotary_share": 0.0}
VARIANTS = [{}, EVERYTHING, NOTHING]


def small(**overrides) -> Modern:
    """Build a small model in eval mode; no tensor is all zeros or ones."""
    torch.manual_seed(1)
    shape = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embd": 32}
    model = Modern(ModernConfig(**{**shape, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def some_tokens(batch: int = 3, steps: int = 16) -> Tensor:
    return torch.randint(61, (batch, steps), generator=torch.Generator().manual_seed(2))


def every_logit(model: Modern, tokens: Tensor) -> Tensor:
    """Return the logits after each prefix: (B, T) -> (B, T, V)."""
    with torch.no_grad():
        prefixes = [model(tokens[:, : end + 1]) for end in range(tokens.size(1))]
    return torch.cat(prefixes, dim=1)


def reference_logits(model: Modern, tokens: Tensor) -> Tensor:
    """Compute the model in float64 without fused operations: (B, T) -> (B, T, V)."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    steps = tokens.size(1)
    d = config.n_embd // config.n_head

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def norm(x: Tensor, name: str) -> Tensor:
        return rms(x) * weights.get(f"{name}.gain", 1)

    def turned(x: Tensor) -> Tensor:
        result = x.clone()
        turning = int(d // 2 * config.rotary_share)
        for position in range(steps):
            for pair in range(turning):
                exponent = pair / (turning - 1) if turning > 1 else 0
                angle = position * config.rotary_base**-exponent
                a, b = x[:, position, 2 * pair], x[:, position, 2 * pair + 1]
                result[:, position, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                result[:, position, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return result

    def attention(x: Tensor, i: int) -> Tensor:
        name = f"blocks.{i}.attention"
        q, k, v = (linear(x, f"{name}.{part}") for part in ("query", "key", "value"))
        if f"{name}.value_embedding.weight" in weights:
            v = v + 0.5 * weights[f"{name}.value_embedding.weight"][tokens]
        is_short = config.window is not None and i < 2 and config.window[i % 2] == "S"
        heads = []
        for h in range(config.n_head):
            kv = h // (config.n_head // (config.n_kv_head or config.n_head))
            head_q = turned(rms(q[..., h * d : (h + 1) * d]))
            head_k = turned(rms(k[..., kv * d : (kv + 1) * d]))
            scores = head_q @ head_k.transpose(-2, -1) * config.attention_scale / math.sqrt(d)
            for query in range(steps):
                for key in range(steps):
                    if key > query or (is_short and key <= query - config.window_size):
                        scores[:, query, key] = -math.inf
            heads.append(scores.softmax(-1) @ v[..., kv * d : (kv + 1) * d])
        return linear(torch.cat(heads, dim=-1), f"{name}.projection")

    def smeared(x: Tensor, name: str) -> Tensor:
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        return x + weights.get(name, 0) * before

    x = smeared(weights["embedding.weight"][tokens], "smear")
    x = embedded = norm(x, "embedding_norm")
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        residual, first = weights.get("layer_scalars", torch.tensor([[1, 0]] * 3))[i]
        x = residual * x + first * embedded
        y = smeared(norm(x, f"{block}.attention_norm"), f"{block}.attention_smear")
        x = x + attention(y, i)
        y = smeared(norm(x, f"{block}.mlp_norm"), f"{block}.mlp_smear")
        hidden = linear(y, f"{block}.mlp.expand").clamp(min=0) ** 2
        x = x + linear(hidden, f"{block}.mlp.projection")
    logits = linear(norm(x, "head_norm"), "head")
    return config.logit_cap * (logits / config.logit_cap).tanh() if config.logit_cap else logits


@pytest.mark.parametrize("options", VARIANTS)
def test_logits_equal_plain_implementation(options):
    model = small(**options)
    tokens = some_tokens()
    expected = reference_logits(model, tokens)
    assert expected.std() > 0.5  # otherwise all logits would be within the tolerance
    torch.testing.assert_close(every_logit(model, tokens).double(), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("options", VARIANTS)
def test_gradient_equals_that_of_plain_operations(options, monkeypatch):
    model = small(**options).double()
    tokens = some_tokens()
    model(tokens, tokens).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(
        "model.modern.normalize", lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    )
    monkeypatch.setattr("model.operations._SquaredReLU.apply", lambda x: x.clamp(min=0).square())
    model.zero_grad()
    model(tokens, tokens).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-12, rtol=1e-9)


def test_losses_are_negative_log_likelihoods_of_the_targets():
    model = small()
    tokens = some_tokens()
    targets = tokens.roll(-1, dims=1)
    targets[0, 3:] = -1
    targets[2] = -1
    likelihoods = reference_logits(model, tokens).log_softmax(-1)
    each = -likelihoods.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * (targets >= 0)
    with torch.no_grad():
        mean = model(tokens, targets)
        total = model(tokens, targets, reduction="sum")
        windows = model(tokens, targets, reduction="window")
    assert (mean.dtype, mean.shape) == (total.dtype, total.shape) == (torch.float32, ())
    assert (windows.dtype, windows.shape) == (torch.float64, (3,))
    torch.testing.assert_close(windows, each.sum(1), atol=1e-4, rtol=0)
    assert total.item() == pytest.approx(each.sum().item(), abs=1e-4)
    assert mean.item() == pytest.approx((each.sum() / (targets >= 0).sum()).item(), abs=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("prompt", [1, 4, 9, 15])
def test_cached_logits_equal_full_logits(options, prompt):
    model = small(**options)
    tokens = some_tokens()
    whole = every_logit(model, tokens)
    cache = model.new_cache(16)
    with torch.no_grad():
        found = [model(tokens[:, :prompt], cache=cache)]
        for at in range(prompt, 16):
            assert cache.length == at
            found.append(model(tokens[:, at : at + 1], cache=cache))
    torch.testing.assert_close(torch.cat(found, dim=1), whole[:, prompt - 1 :], atol=2e-5, rtol=0)


def test_gradients_of_equal_inputs_have_equal_bits():
    tokens = some_tokens()
    found = []
    for _ in range(2):
        model = small(**EVERYTHING)
        model(tokens, tokens).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("options", [{}, {"logit_cap": 4.0, "bias": True}])
def test_loss_in_chunks_equals_loss_of_all_logits(options):
    tokens = some_tokens()
    models = [small(**options), small(**options, loss_chunk=7)]
    for reduction in ("mean", "sum", "window"):
        with torch.no_grad():
            losses = [model(tokens, tokens, reduction=reduction) for model in models]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-6)
    for model in models:
        model(tokens, tokens).backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_model_is_float32(dtype):
    tokens = some_tokens()
    loss = small(**EVERYTHING).to(dtype)(tokens, tokens)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(small(**EVERYTHING)(tokens, tokens).item(), rel=0.02)


def test_cache_takes_several_tokens_at_a_time():
    model = small(**EVERYTHING)
    tokens = some_tokens()
    cache = model.new_cache(16)
    with torch.no_grad():
        for part in tokens.split([7, 6, 3], dim=1):
            last = model(part, cache=cache)
        torch.testing.assert_close(last, model(tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        (EVERYTHING, "eager"),
        pytest.param(EVERYTHING, "aot_eager", marks=pytest.mark.slow),
        pytest.param({}, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_model_is_one_graph_with_same_loss(options, backend):
    model = small(n_layer=2, **options)
    tokens = some_tokens()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    loss = compiled(tokens, tokens)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    eager = model(tokens, tokens)
    eager.backward()
    assert loss.item() == pytest.approx(eager.item(), abs=1e-5)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)


def test_loss_is_float32_under_autocast():
    model = small(**EVERYTHING)
    tokens = some_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)
        assert small()(tokens).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(tokens, tokens).item(), rel=0.02)


def test_initial_weights_depend_only_on_global_seed():
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = Modern(ModernConfig(block_size=8, vocab_size=32, n_layer=2, n_head=1, n_embd=8))
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


def test_initial_blocks_and_head_add_nothing():
    torch.manual_seed(0)
    config = ModernConfig(block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=128)
    model = Modern(config)
    tokens = some_tokens()
    assert model(tokens, tokens).item() == pytest.approx(math.log(64), abs=1e-6)
    for name, parameter in model.named_parameters():
        if name.endswith(("projection.weight", "head.weight", "smear")):
            assert not parameter.any(), name
        else:
            deviation = math.sqrt(0.33 / parameter.size(1))
            if name.endswith("embedding.weight"):
                deviation = 1.0 if name == "embedding.weight" else 0.2
            assert parameter.std().item() == pytest.approx(deviation, rel=0.05), name


def test_dropout_depends_on_seed_and_is_off_in_eval():
    model = small(dropout=0.3)
    tokens = some_tokens()
    without = small()(tokens, tokens)
    assert torch.equal(model(tokens, tokens), without)
    model.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(tokens, tokens))
    assert torch.equal(drawn[0], drawn[1])
    assert len({drawn[0].item(), drawn[2].item(), without.item()}) == 3


def test_size_is_that_of_the_gpt_of_shakespeare_char():
    config = ModernConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128)
    count = sum(parameter.numel() for parameter in Modern(config).parameters())
    assert count == 811_520 == pytest.approx(804_096, rel=0.01)


@pytest.mark.parametrize("options", VARIANTS)
def test_every_parameter_is_in_one_group(options):
    model = small(**options)
    assert isinstance(model, HasParameterGroups) and isinstance(model, HasCache)
    groups = model.parameter_groups()
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(groups["matrix"]) == 3 * 6  # query, key, value, three others
    assert all(model.get_parameter(name).dim() == 2 for name in groups["matrix"])
    assert groups["head"] == ["head.weight"]


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 1, "value_embeddings": "alternate"}])
def test_flops_equal_torch_flop_counter(options):
    model = small(block_size=64, n_embd=64, **options)
    assert isinstance(model, HasFlops)
    tokens = some_tokens(2, 64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() / tokens.numel() == model.flops_per_token(64)


def test_layers_with_window_have_fewer_flops():
    full = small().flops_per_token(16)
    assert full - small(window="SL", window_size=5).flops_per_token(16) == 12 * 32 * (16 - 5)
    assert small().flops_per_token(8) == full - 3 * 12 * 32 * 8


@pytest.mark.parametrize(
    ("window", "size", "seen"),
    [
        (None, None, [64, 64, 64, 64, 64]),
        ("SSSL", None, [16, 16, 16, 64, 64]),
        ("S", 8, [8, 8, 8, 8, 64]),
        ("LS", 99, [64, 64, 64, 64, 64]),
    ],
)
def test_window_repeats_over_layers_and_last_layer_sees_all(window, size, seen):
    config = ModernConfig(block_size=64, n_layer=5, window=window, window_size=size)
    assert [config.window_of(layer) for layer in range(5)] == seen


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="17 tokens.*block_size=16"):
        small()(some_tokens(steps=17))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"n_embd": 770}, "n_embd=770.*n_head=6"),
        ({"n_kv_head": 4}, "n_head=6.*n_kv_head=4"),
        ({"n_head": 2, "n_embd": 6}, "n_embd=6.*n_head=2.*even"),
        ({"n_layer": 0}, "n_layer.*0"),
        ({"n_head": True}, "n_head.*True"),
        ({"window_size": 0, "window": "S"}, "window_size.*0"),
        ({"window_size": 5}, "window_size=5 needs window"),
        ({"window": "SX"}, "window.*SX"),
        ({"window": ""}, "window.*''"),
        ({"dropout": 1.0}, "dropout.*1.0"),
        ({"rotary_share": 1.5}, "rotary_share.*1.5"),
        ({"rotary_base": 0.0}, "rotary_base.*0.0"),
        ({"attention_scale": math.nan}, "attention_scale.*nan"),
        ({"logit_cap": -1.0}, "logit_cap.*-1.0"),
        ({"loss_chunk": 0}, "loss_chunk.*0"),
    ],
)
def test_settings_that_no_model_can_have_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        ModernConfig(**wrong)


def test_every_setting_has_a_help_line():
    for setting in dataclasses.fields(ModernConfig):
        assert len(setting.metadata["help"]) > 10, setting.name


def test_settings_import_no_torch():
    code = "import sys, model.modern_config, model.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
