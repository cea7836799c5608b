"""Sections of an experiment: every field with its type, default, limits and description."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from model.models import DEFAULT, MODELS
from model.optim import OPTIMIZERS
from orchestrator.config.fields import (
    BatchSchedule,
    Effect,
    Int,
    Interval,
    Later,
    OneOf,
    OrAuto,
    Section,
    Steps,
    Text,
)
from orchestrator.config.only_for import OnlyFor

# muon has one momentum for matrices; the head of gpt2 is its embedding.
NOT_MUON = [kind for kind in OPTIMIZERS if kind != "muon"]
BETAS_OF_MATRIX = OnlyFor(NOT_MUON, "/optim.kind", marked=("beta1", "beta2"))
HEAD = OnlyFor([kind for kind in MODELS if kind != "gpt2"], "/model.kind")


class Data(Section):
    """The text, and how it is split into tokens."""

    effect = Effect.TOKENS

    corpus: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        "builtin:stdlib",
        description="text to train on: files, globs or folders (.txt, .md, .py …; JSON lines, also "
        "as .json, .gz or .zst; .parquet), the same in a bucket, such as s3://BUCKET/folder/*.txt, "
        "https://…#sha256=HEX (a password in it is the variable $NAME), or builtin:stdlib (the "
        "source of Python's standard library); one or a list",
    )
    dir: Annotated[Text | None, Effect.NOTHING] = Field(
        None, description="folder of the token shards; null: <storage>/data/<fingerprint>"
    )
    text_field: Text = Field(
        "text", description="field of JSON lines, or column of Parquet, that holds the text"
    )
    invalid_utf8: Literal["stop", "replace"] = Field(
        "stop",
        description="text that is not UTF-8; stop: an error that names the file and the byte, "
        "replace: U+FFFD for each invalid sequence",
    )
    on_null: Literal["stop", "skip"] = Field(
        "stop",
        description="document whose text is null; stop: an error that names it, skip: leave it out",
    )
    tokenizer: Text = Field(
        "gpt2",
        description="any tiktoken encoding (gpt2, cl100k_base, o200k_base …), byte, char, or "
        "bpe:SIZE (byte pairs, trained on train alone, or on 64 MiB of it if it is larger; SIZE "
        "ids, of which 256 are bytes and one is end of text)",
    )
    encoder: Annotated[Literal["auto", "tiktoken", "gigatoken"], Effect.NOTHING] = Field(
        "auto",
        description="library that encodes, with the same ids; auto: gigatoken from 4 MiB on, if it "
        "is installed, has the tokenizer and gives the ids of tiktoken",
    )
    split: Literal["tail", "hash"] = Field(
        "tail",
        description="part that is val; tail: the last characters of the corpus, hash: documents "
        "selected by the hash of their content",
    )
    val_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the corpus that is val, 0 to 1"
    )
    append_eot: bool = Field(
        False, description="end every document with the end-of-text token of the tokenizer"
    )


class Model(Section):
    """The model. Its kind decides which fields it has."""

    kind: Annotated[str, OneOf(MODELS, "FILE.py:CLASS"), Later] = Field(
        DEFAULT, description="architecture; FILE.py:CLASS: a model of yours (docs/own-code.md)"
    )
    block_size: Int = Field(1024, ge=1, description="context length in tokens")
    pad_vocab_to: Int = Field(
        128,
        ge=1,
        description="vocab_size is the tokenizer's n_vocab, rounded up to a multiple of this",
    )


class Gpt2(Model):
    """The model, here a GPT-2. The vocabulary follows from the tokenizer."""

    n_layer: Int = Field(12, ge=1, description="transformer blocks")
    n_head: Int = Field(12, ge=1, description="attention heads per block; must divide n_embd")
    n_embd: Int = Field(768, ge=1, description="width of the residual stream")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability, 0 to 1; use 0 for pretraining"
    )
    bias: bool = Field(False, description="biases in Linear and LayerNorm; GPT-2 has them")
    activation: Literal["gelu", "gelu_tanh"] = Field(
        "gelu", description="OpenAI's GPT-2 weights need gelu_tanh"
    )
    loss_chunk: Annotated[Steps | None, Later] = Field(
        None,
        description="positions whose logits exist at a time while the loss is computed; saves "
        "memory for large vocabularies (2411.09009); null: all",
    )


class ParameterGroup(Section):
    """Settings of the optimizer for one group of parameters."""

    lr_scale: Annotated[float | None, Field(ge=0), Later] = Field(
        None, description="the learning rate is the schedule's times this; null: as optim.kind says"
    )
    weight_decay: Annotated[float | None, Field(ge=0), Later] = Field(
        None, description="null: optim.weight_decay; for scalar 0"
    )
    beta1: Annotated[float | None, Field(ge=0, lt=1), Later] = Field(
        None, description="null: optim.beta1"
    )
    beta2: Annotated[float | None, Field(ge=0, lt=1), Later] = Field(
        None, description="null: optim.beta2"
    )


class ParameterGroups(Section):
    """Settings of each group; null takes those of `optim`."""

    matrix: Annotated[ParameterGroup, BETAS_OF_MATRIX] = ParameterGroup()
    embedding: ParameterGroup = ParameterGroup()
    head: Annotated[ParameterGroup, HEAD] = ParameterGroup()
    scalar: ParameterGroup = ParameterGroup()


class Optim(Section):
    """The optimizer. It knows four groups of parameters: matrix, embedding, head and scalar."""

    kind: Annotated[str, OneOf(OPTIMIZERS, "FILE.py:FACTORY")] = Field(
        "adamw", description="optimizer; FILE.py:FACTORY: one of yours (docs/own-code.md)"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment, 0 to 1")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment, 0 to 1")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled; on all groups but scalar: biases, norms and scales"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clip the norm of the whole gradient to this; null: do not clip"
    )
    momentum: Annotated[float, OnlyFor(("muon",)), Later] = Field(
        0.95, ge=0, lt=1, description="only for muon: decay of the momentum of matrices, 0 to 1"
    )
    momentum_warmup_steps: Annotated[Int, Effect.PER_STEP, OnlyFor(("muon",)), Later] = Field(
        0, ge=0, description="only for muon: steps in which the momentum rises linearly from 0.85"
    )
    cautious: Annotated[bool, OnlyFor(("muon",)), Later] = Field(
        False,
        description="only for muon: decay a weight only where it shrinks in this update anyway "
        "(2510.12402)",
    )
    polar_steps: Annotated[Int | None, OnlyFor(("muon",)), Later] = Field(
        None,
        ge=1,
        le=5,
        description="only for muon: orthogonalise by so many iterations of Polar Express "
        "(2505.16932), 3 of which did as well as null: 5 of Newton-Schulz",
    )
    groups: ParameterGroups = ParameterGroups()


class Train(Section):
    """Steps, batches, precision, and intervals of logging, evaluation and checkpoints."""

    max_steps: Annotated[Steps, Effect.LENGTH] = Field(2000, description="optimizer updates")
    micro_batch_size: Annotated[Steps, OrAuto(), Effect.ADDITIONS] = Field(
        12,
        description="sequences per worker in one forward pass; auto: the largest power of two that "
        "fits into the memory of a worker and divides its share of the batch, on a CPU of at most "
        "4,096 tokens; measured before the first step; a run that has begun keeps its number",
    )
    global_batch_size: Steps | None = Field(
        12, description="sequences per update over all workers; null: train.batch_schedule"
    )
    batch_schedule: Annotated[BatchSchedule, Effect.PER_STEP, Later] = Field(
        None,
        description="sequences per update from each step on, such as {0: 64, 1000: 128}, in place "
        "of train.global_batch_size",
    )
    reduction_slots: Annotated[Steps | None, Effect.ADDITIONS] = Field(
        None,
        description="partial sums of one gradient, a power of two: the largest number of workers; "
        "null: the largest up to 8 that divides the micro-batches of the first update",
    )
    shard_optimizer: Annotated[bool | Literal["auto"], Effect.NOTHING] = Field(
        "auto",
        description="each worker updates a part of the parameters and has its moments (ZeRO-1), "
        "with the same bits; auto: with adamw or muon, but not with float16",
    )
    overlap_exchange: Annotated[bool | Literal["auto"], Effect.NOTHING] = Field(
        "auto",
        description="with a sharded optimizer, exchange gradients during the last backward pass of "
        "a step, with the same bits; auto: on CPUs of several nodes",
    )
    activation_checkpointing: Annotated[bool, Effect.NOTHING] = Field(
        False,
        description="compute the activations of each block again in the backward pass, with the "
        "same bits: less memory, longer steps",
    )
    ema: Annotated[float | None, Field(gt=0, lt=1), Later] = Field(
        None,
        description="decay of a moving average of the weights, such as 0.999: after each update, "
        "average = ema average + (1 - ema) weights; it is evaluated and saved; null: none",
    )
    seed: Int = Field(1337, ge=0, description="seed of weights, sample order and dropout")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="type of matrix products (autocast); auto: bfloat16 on a GPU that has it, and "
        "on a CPU with AMX or AVX512-BF16 if model.n_embd is 512 or more; float16 on an older GPU; "
        "else float32; a run that has begun keeps its type",
    )
    compile: Annotated[bool, Effect.ADDITIONS] = Field(
        False,
        description="torch.compile: each block of the model by itself on a CPU, the whole model on "
        "a GPU; up to minutes at the start, faster steps on a GPU",
    )
    log_interval: Annotated[Interval, Effect.ATTEMPT] = Field(
        10, description="log every N steps and at the end; null: only at the end"
    )
    eval_interval: Annotated[Interval, Effect.ATTEMPT] = Field(
        250, description="evaluate every N steps, at step 0 and at the end; null: never"
    )
    eval_tokens: Annotated[Int, Field(ge=2)] | None = Field(
        None, description="evaluate on the first N tokens of val; null: on all"
    )
    sample_prompt: Annotated[Text | None, Effect.NOTHING] = Field(
        None,
        description="text that the sample of each evaluation continues; null: first tokens of val",
    )
    sample_tokens: Annotated[Steps | None, Effect.NOTHING] = Field(
        None, description="tokens that the model adds to it; null: 64"
    )
    checkpoint_interval: Annotated[Interval, Effect.NOTHING] = Field(
        250, description="save a checkpoint every N steps and at the end; null: only at the end"
    )
    keep: Annotated[Steps, Effect.NOTHING] = Field(
        2, description="recent checkpoints to keep, besides the best by val loss"
    )
    on_nonfinite: Annotated[Literal["stop", "skip"], Effect.ATTEMPT] = Field(
        "stop",
        description="action after a loss or gradient that is not finite; stop: end the run, skip: "
        "go on without this update",
    )
    allow_drift: Annotated[bool, Effect.NOTHING] = Field(
        False,
        description="resume even if the last bits of the results will differ, because the machine, "
        "a version or the code computes other bits, or because compile, reduction_slots, or "
        "micro_batch_size at the same global batch changed",
    )
    restart: Annotated[bool, Effect.NOTHING] = Field(
        False,
        description="begin again at step 0 if the run had checkpoints and none is valid any more; "
        "what the run wrote is moved into a folder before-0001 and so on",
    )
    init_from: Text = Field(
        "scratch",
        description="initial weights: scratch (random), gpt2|gpt2-medium|gpt2-large|gpt2-xl, a "
        "Hugging Face folder, a nanoGPT ckpt.pt, a run or a checkpoint, also s3://… in a mirror",
    )

    @model_validator(mode="before")
    @classmethod
    def _schedule_replaces_the_default(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("batch_schedule") is not None:
            return {"global_batch_size": None, **fields}
        return fields
