"""Weights give the same logits in Hugging Face's GPT-2 and in ours; wrong names are refused."""

import math

import pytest
import torch
from torch import Tensor

from model.gpt import GPT
from model.gpt_config import GPT2_SIZES, GPTConfig
from model.weights import (
    config_from_huggingface,
    from_huggingface,
    from_nanogpt,
    pad_vocab,
)
from tests.helpers.huggingface import config_to_huggingface, to_huggingface

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(30).view(2, 15)


@pytest.fixture
def huggingface():
    """Return a function that builds small GPT2LMHeadModels, in eval mode, with random tensors."""

    def make(**overrides):
        torch.manual_seed(4)
        shape = {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **overrides}))
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        return theirs.eval()

    return make


def our_logits(config: GPTConfig, weights: dict[str, Tensor]) -> Tensor:
    model = GPT(config).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.logits(TOKENS)


def their_logits(theirs) -> Tensor:
    with torch.no_grad():
        return theirs(TOKENS).logits


def assert_equal_logits(actual: Tensor, expected: Tensor):
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_huggingface_weights_give_huggingface_logits(huggingface, activation):
    theirs = huggingface(activation_function=activation)
    config = config_from_huggingface(theirs.config.to_dict())
    assert_equal_logits(
        our_logits(config, from_huggingface(theirs.state_dict())), their_logits(theirs)
    )


def test_other_activation_gives_other_logits(huggingface):
    theirs = huggingface(activation_function="gelu_new")
    exact = GPTConfig(16, 61, 3, 4, 32, activation="gelu")
    difference = our_logits(exact, from_huggingface(theirs.state_dict())) - their_logits(theirs)
    assert difference.abs().max() > 1e-4


def test_huggingface_weights_without_head_or_prefix_are_equal(huggingface):
    theirs = huggingface()
    with_head = from_huggingface(theirs.state_dict())
    without = from_huggingface(theirs.transformer.state_dict())
    assert with_head.keys() == without.keys()
    assert all(torch.equal(with_head[name], without[name]) for name in without)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_our_weights_give_our_logits_in_huggingface(small_gpt, bias, activation):
    ours = small_gpt(bias=bias, activation=activation)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**config_to_huggingface(ours.config))
    ).eval()
    missing, unexpected = theirs.load_state_dict(to_huggingface(ours.state_dict()), strict=False)
    theirs.tie_weights()
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert_equal_logits(their_logits(theirs), our_logits(ours.config, ours.state_dict()))


def test_export_loads_with_from_pretrained(small_gpt, tmp_path):
    from safetensors.torch import save_file

    ours = small_gpt(bias=False)
    transformers.GPT2Config(**config_to_huggingface(ours.config)).save_pretrained(tmp_path)
    save_file(
        to_huggingface(ours.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_equal_logits(their_logits(theirs), our_logits(ours.config, ours.state_dict()))


def test_huggingface_round_trip_is_identity(small_gpt):
    weights = small_gpt().state_dict()
    back = from_huggingface(to_huggingface(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_huggingface_config_round_trip_is_identity(activation):
    config = GPTConfig(64, 300, 2, 3, 24, activation=activation)
    assert config_from_huggingface(config_to_huggingface(config)) == config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_sizes_have_huggingface_names_and_shapes(name, parameters):
    config = GPT2_SIZES[name]
    with torch.device("meta"):
        ours = GPT(config)
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**config_to_huggingface(config))
        )
    assert ours.num_parameters() == parameters
    assert config_from_huggingface(theirs.config.to_dict()) == config
    expected = {
        key: tensor.shape for key, tensor in theirs.state_dict().items() if key != "lm_head.weight"
    }
    assert {
        key: tensor.shape for key, tensor in to_huggingface(ours.state_dict()).items()
    } == expected


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint_is_converted(small_gpt, prefix, bias):
    ours = small_gpt(bias=bias).state_dict()
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(3)}
    theirs = {**ours, **masks, "lm_head.weight": ours["transformer.wte.weight"].clone()}
    loaded = from_nanogpt({prefix + name: tensor for name, tensor in theirs.items()})
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)


@pytest.mark.parametrize("load", [from_nanogpt, from_huggingface])
def test_error_names_missing_and_unexpected_weights(small_gpt, load):
    weights = small_gpt().state_dict()
    lacking = {
        name: tensor for name, tensor in weights.items() if name != "transformer.h.1.mlp.c_fc.bias"
    }
    with pytest.raises(
        ValueError, match=r"missing transformer\.h\.1\.mlp\.c_fc\.bias; unexpected nothing"
    ):
        load(lacking)
    with pytest.raises(ValueError, match=r"missing nothing; unexpected transformer\.extra"):
        load({**weights, "transformer.extra": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"missing transformer\.h\.2.*unexpected transformer\.h\.9"
    ):
        load({name.replace("h.2.", "h.9."): tensor for name, tensor in weights.items()})
    with pytest.raises(ValueError, match="missing"):
        load({})


@pytest.mark.parametrize("load", [from_nanogpt, from_huggingface])
def test_untied_head_is_refused(small_gpt, load):
    weights = small_gpt().state_dict()
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load({**weights, "lm_head.weight": weights["transformer.wte.weight"] + 1})


@pytest.mark.parametrize(
    "wrong",
    [
        {"activation_function": "relu"},
        {"n_inner": 999},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"model_type": "llama"},
    ],
)
def test_unsupported_huggingface_settings_are_refused(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{key}={value!r}"):
        config_from_huggingface({**transformers.GPT2Config().to_dict(), **wrong})


def test_vocabulary_padding_keeps_logits_and_nearly_keeps_loss(small_gpt):
    model = small_gpt()
    with torch.no_grad():
        model.transformer.wte.weight += 0.5
        model.transformer.ln_f.bias -= 0.5  # logits far below 0, as in GPT-2
    padded = GPT(GPTConfig(**{**vars(model.config), "vocab_size": 64}))
    padded.load_state_dict(pad_vocab(model.state_dict(), 64))
    padded.eval()
    before, loss = model.logits(TOKENS), model(TOKENS, TOKENS)
    after, padded_loss = padded.logits(TOKENS), padded(TOKENS, TOKENS)
    assert before.mean() < -5
    torch.testing.assert_close(after[..., :61], before, atol=1e-5, rtol=0)
    assert loss < padded_loss < loss + math.log(1 + 3 / 61)


def test_padding_and_cutting_vocabulary_is_identity(small_gpt):
    weights = small_gpt().state_dict()
    back = pad_vocab(pad_vocab(weights, 128), 61)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
