"""Weights of other GPT-2s under our names, and ours under theirs: dict of tensors in, dict of tensors out.

Ours are nanoGPT's names without its second name for the tied embedding (`lm_head.weight`). Hugging Face's GPT-2 keeps
the four matrices of a block transposed (its Conv1D computes x W, a Linear x W^T) and always has biases.
Nothing here reads files: the caller loads and saves. Tensors are shared with the input where nothing changes.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from model.gpt import GPTConfig

StateDict = dict[str, Tensor]

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_IN_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks that older versions stored as buffers

GPT2_SIZES: dict[str, GPTConfig] = {
    name: GPTConfig(
        vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd, activation="gelu_tanh"
    )
    for name, n_layer, n_head, n_embd in (
        ("gpt2", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    )
}

_ACTIVATION_FROM_HF = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_ACTIVATION_TO_HF = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
# What GPT-2 of Hugging Face can be and ours cannot, with the one value (theirs by default) that is ours.
_FIXED_IN_HF = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


def from_nanogpt(state_dict: StateDict) -> StateDict:
    """The "model" entry of nanoGPT's ckpt.pt (compiled or not) under our names.

    Raises ValueError that names a missing or unexpected key, or a head that differs from the embedding.
    """
    ours = {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}
    ours = _without_masks(_without_head(ours))
    _check_names(ours)
    return ours


def from_huggingface(state_dict: StateDict) -> StateDict:
    """Weights of Hugging Face's GPT2LMHeadModel or GPT2Model (names without "transformer.") under our names.

    Raises ValueError that names a missing or unexpected key, or a head that differs from the embedding.
    """
    prefixed = {
        name if name == HEAD or name.startswith("transformer.") else f"transformer.{name}": tensor
        for name, tensor in state_dict.items()
    }
    ours = _without_masks(_without_head(prefixed))
    _check_names(ours)
    return _transpose(ours)


def to_huggingface(state_dict: StateDict) -> StateDict:
    """Ours under the names and layout of GPT2LMHeadModel; a model without biases gets biases of zero.

    The tied head is left out, as save_pretrained does: safetensors stores no tensor twice. Raises ValueError that
    names a missing or unexpected key.
    """
    _check_names(state_dict)
    theirs = _transpose(state_dict)
    for module in _modules(state_dict):
        weight = state_dict[f"{module}.weight"]  # (out, in), or (C,) in a LayerNorm
        if f"{module}.bias" not in theirs:
            theirs[f"{module}.bias"] = torch.zeros_like(
                weight[:, 0] if weight.dim() == 2 else weight
            )
    return theirs


def config_from_huggingface(config: dict) -> GPTConfig:
    """Shape of the model that a GPT-2 config.json of Hugging Face describes.

    Dropout is 0: it is a choice of the training to come, not a property of the weights. Raises ValueError that quotes
    any setting which our model does not have.
    """
    for key, ours in _FIXED_IN_HF.items():
        if config.get(key, ours) != ours:
            raise ValueError(f"config.json has {key}={config[key]!r}; only {ours!r} can be loaded")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATION_FROM_HF:
        raise ValueError(
            f"config.json has activation_function={activation!r}, not {', '.join(_ACTIVATION_FROM_HF)}"
        )
    n_embd = config.get("n_embd", 768)
    if config.get("n_inner") not in (None, 4 * n_embd):
        raise ValueError(
            f"config.json has n_inner={config['n_inner']!r}; only 4 * n_embd = {4 * n_embd} can be loaded"
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


def config_to_huggingface(config: GPTConfig) -> dict:
    """The config.json under which Hugging Face's GPT2LMHeadModel computes what GPT(config) does."""
    return {
        **_FIXED_IN_HF,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": _ACTIVATION_TO_HF[config.activation],
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
    }


def pad_vocab(state_dict: StateDict, vocab_size: int) -> StateDict:
    """Our state dict with `vocab_size` rows in the embedding: cut, or grown by rows that are the mean of the others.

    Why the mean: the embedding is also the head, and a row of zeros means a logit of 0, while GPT-2 gives its real
    tokens logits far below 0: padding would win every prediction. A mean row's logit is the mean logit, so that
    the loss grows by ln(1 + added / old) at most, 0.0009 for 50,257 -> 50,304 (Jensen; Hewitt, "Initializing New Word
    Embeddings for Pretrained Language Models", 2021). Cutting afterwards restores the tensor.

    Raises ValueError for vocab_size < 1 and where the embedding is missing.
    """
    if EMBEDDING not in state_dict:
        raise ValueError(f"no {EMBEDDING} among the weights")
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    rows = state_dict[EMBEDDING]  # (V, C)
    added = vocab_size - rows.size(0)
    if added > 0:
        mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)  # (1, C)
        rows = torch.cat((rows, mean.expand(added, -1)))
    return {**state_dict, EMBEDDING: rows[:vocab_size].clone()}


def _without_head(state_dict: StateDict) -> StateDict:
    """Drop the head's second name for the embedding, once it is sure that it is one."""
    head, embedding = state_dict.get(HEAD), state_dict.get(EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError(f"{HEAD} differs from {EMBEDDING}: an untied head cannot be loaded")
    return {name: tensor for name, tensor in state_dict.items() if name != HEAD}


def _without_masks(state_dict: StateDict) -> StateDict:
    return {name: tensor for name, tensor in state_dict.items() if not name.endswith(_MASKS)}


def _transpose(state_dict: StateDict) -> StateDict:
    return {
        name: t.t().contiguous() if name.endswith(_TRANSPOSED) else t
        for name, t in state_dict.items()
    }


def _modules(state_dict: StateDict) -> list[str]:
    """Names of all modules with a weight and, in a model with biases, a bias, for as many blocks as are there."""
    found = {
        match[1] for name in state_dict if (match := re.match(r"transformer\.h\.(\d+)\.", name))
    }
    blocks = [f"transformer.h.{i}.{part}" for i in range(len(found)) for part in _IN_BLOCK]
    return [*blocks, "transformer.ln_f"]


def _check_names(state_dict: StateDict):
    """ValueError unless the names are exactly those of a GPT, with biases everywhere or nowhere."""
    modules = _modules(state_dict)
    expected = {EMBEDDING, "transformer.wpe.weight", *(f"{module}.weight" for module in modules)}
    if any(name.endswith(".bias") for name in state_dict):
        expected |= {f"{module}.bias" for module in modules}
    missing, unexpected = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    if missing or unexpected:
        raise ValueError(
            f"not the weights of a GPT-2: missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    if len(modules) == 1:
        raise ValueError("not the weights of a GPT-2: there is no transformer.h.0")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
