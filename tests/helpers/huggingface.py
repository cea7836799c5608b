"""Conversion of our models to Hugging Face's format, to test the import."""

from typing import Any

from torch import Tensor

from model.gpt_config import GPTConfig
from model.weights import _FIXED_IN_HF, _modules, _transpose


def to_huggingface(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert our weights to names and layout of Hugging Face's GPT2LMHeadModel.

    A model without biases gets biases of zero. The tied head is left out, as in their files.
    """
    theirs = _transpose(state_dict)
    for module in _modules(state_dict):
        if f"{module}.bias" in theirs:
            continue
        weight = state_dict[f"{module}.weight"]  # (out, in), or (C,) in a LayerNorm
        theirs[f"{module}.bias"] = weight.new_zeros(weight.size(0))
    return theirs


def config_to_huggingface(config: GPTConfig) -> dict[str, Any]:
    """Return the config.json of a GPT2LMHeadModel of Hugging Face that equals GPT(config)."""
    return {
        **_FIXED_IN_HF,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
    }
