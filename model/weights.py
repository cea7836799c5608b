"""Conversion of state dicts of nanoGPT and Hugging Face to our names.

Our names are those of nanoGPT, except `lm_head.weight`, a second name of the tied embedding.
Hugging Face stores the four matrices of a block transposed (its Conv1D computes x W, a Linear
x W^T) and always has biases. This module reads no files. Tensors that need no conversion are not
copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.gpt_config import GPTConfig

StateDict = dict[str, Tensor]

HEAD = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"
POSITIONS = "transformer.wpe.weight"
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_IN_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks that older versions stored as buffers


_ACTIVATION_FROM_HF = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Settings of Hugging Face's GPT-2 that our model does not have. Only these values, which are the
# defaults, give the same results as our model.
_FIXED_IN_HF = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


def from_nanogpt(state_dict: StateDict) -> StateDict:
    """Convert the "model" entry of nanoGPT's ckpt.pt to our names.

    Raises:
        ValueError: A name is missing or unexpected, or the head differs from the embedding.
    """
    return _parameters({_plain(name): tensor for name, tensor in state_dict.items()})


def from_huggingface(state_dict: StateDict) -> StateDict:
    """Convert weights of Hugging Face's GPT2LMHeadModel or GPT2Model to our names.

    Raises:
        ValueError: A name is missing or unexpected, or the head differs from the embedding.
    """
    prefixed: StateDict = {}
    for name, tensor in state_dict.items():
        name = _plain(name)
        # GPT2Model has names without "transformer.".
        if name != HEAD and not name.startswith("transformer."):
            name = f"transformer.{name}"
        prefixed[name] = tensor
    return _transpose(_parameters(prefixed))


def _plain(name: str) -> str:
    """Return a name without the prefixes of torch.compile and DistributedDataParallel."""
    return re.sub(r"^((_orig_mod|module)\.)+", "", name)


def check_values(state_dict: StateDict) -> None:
    """Raise ValueError unless all weights are finite floating-point numbers."""
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} is {kind}; save the weights as float32, float16 or bfloat16, without "
                "quantization"
            )
        if not tensor.float().isfinite().all():
            raise ValueError(f"{name} has values that are not finite; use other weights")


def config_from_huggingface(config: Mapping[str, Any]) -> GPTConfig:
    """Return the shape that a GPT-2 config.json of Hugging Face describes.

    Dropout is 0: it is a setting of training, not of the weights.

    Raises:
        ValueError: Our model does not support one of the settings.
    """
    for key, ours in _FIXED_IN_HF.items():
        if config.get(key, ours) != ours:
            raise ValueError(f"config.json has {key}={config[key]!r}; only {ours!r} can be loaded")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATION_FROM_HF:
        raise ValueError(
            f"config.json has activation_function={activation!r}; only "
            f"{', '.join(_ACTIVATION_FROM_HF)} can be loaded"
        )
    n_embd = config.get("n_embd", 768)
    if config.get("n_inner") not in (None, 4 * n_embd):
        raise ValueError(
            f"config.json has n_inner={config['n_inner']!r}; only 4 * n_embd = {4 * n_embd} can be "
            "loaded"
        )
    return GPTConfig(
        block_size=config.get("n_positions", 1024),
        vocab_size=config.get("vocab_size", 50257),
        n_layer=config.get("n_layer", 12),
        n_head=config.get("n_head", 12),
        n_embd=n_embd,
        bias=True,
        activation=_ACTIVATION_FROM_HF[activation],
    )


def pad_vocab(state_dict: StateDict, vocab_size: int) -> StateDict:
    """Return our state dict with `vocab_size` rows in the embedding.

    Rows are cut off, or added as the mean of the old rows. The embedding is also the head: a row of
    zeros would give a logit of 0, while GPT-2's logits are far below 0, so padding would have the
    highest probability. A mean row gives the mean logit: the loss grows by at most
    ln(1 + added / old), 0.0009 for 50,257 -> 50,304 (Jensen's inequality).
    Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021.
    """
    rows = state_dict[EMBEDDING]  # (V, C)
    added = vocab_size - rows.size(0)
    if added > 0:
        mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)  # (1, C)
        rows = torch.cat((rows, mean.expand(added, -1)))
    return {**state_dict, EMBEDDING: rows[:vocab_size].clone()}


def _parameters(state_dict: StateDict) -> StateDict:
    """Drop the causal masks and the head. Check the other names, and that the head is tied."""
    head = state_dict.get(HEAD)
    embedding = state_dict.get(EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}; only a tied head can be loaded")
    parameters = {
        name: tensor
        for name, tensor in state_dict.items()
        if name != HEAD and not name.endswith(_MASKS)
    }
    _check_names(parameters)
    return parameters


def _transpose(state_dict: StateDict) -> StateDict:
    return {
        name: tensor.t().contiguous() if name.endswith(_TRANSPOSED) else tensor
        for name, tensor in state_dict.items()
    }


def _modules(state_dict: StateDict) -> list[str]:
    """Return the names of all modules with a weight and perhaps a bias."""
    found = set()
    for name in state_dict:
        match = re.match(r"transformer\.h\.(\d+)\.", name)
        if match:
            found.add(match[1])
    blocks = [f"transformer.h.{i}.{part}" for i in range(len(found)) for part in _IN_BLOCK]
    return [*blocks, "transformer.ln_f"]


def _check_names(state_dict: StateDict) -> None:
    """Raise ValueError unless the names are those of a GPT with all biases or with none."""
    modules = _modules(state_dict)
    expected = {EMBEDDING, POSITIONS, *(f"{module}.weight" for module in modules)}
    if any(name.endswith(".bias") for name in state_dict):
        expected |= {f"{module}.bias" for module in modules}
    missing = sorted(expected - set(state_dict))
    unexpected = sorted(set(state_dict) - expected)
    if missing or unexpected:
        raise ValueError(
            f"not the weights of a GPT-2: missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    if len(modules) == 1:
        raise ValueError("not the weights of a GPT-2: there is no transformer.h.0")


def _some(names: list[str]) -> str:
    """Return up to three names and the number of the others."""
    if not names:
        return "nothing"
    shown = ", ".join(names[:3])
    if len(names) > 3:
        return f"{shown} and {len(names) - 3} more"
    return shown
