"""Sections of an experiment: every field with its type, default, limits and description."""

from typing import Annotated, Literal

from pydantic import Field

from model.models import DEFAULT, MODELS
from model.optim import OPTIMIZERS
from model.schedule import DECAY_SHAPES, SCHEDULES
from orchestrator.config.fields import (
    Effect,
    Int,
    Interval,
    Later,
    OneOf,
    Section,
    Steps,
    Text,
)


class Data(Section):
    """The text, and how it is split into tokens."""

    effect = Effect.TOKENS

    corpus: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        "builtin:stdlib",
        description="text to train on: files, globs or folders (.txt, .md, .py …; JSON lines, also "
        "as .json, .gz or .zst; .parquet), https://…#sha256=HEX (a password in it is the variable "
        "$NAME), or builtin:stdlib (the source of Python's standard library); one or a list",
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
        "gpt2", description="any tiktoken encoding (gpt2, cl100k_base, o200k_base …), byte or char"
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

    kind: Annotated[str, OneOf(MODELS), Later] = Field(DEFAULT, description="architecture")
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

    matrix: ParameterGroup = ParameterGroup()
    embedding: ParameterGroup = ParameterGroup()
    head: ParameterGroup = ParameterGroup()
    scalar: ParameterGroup = ParameterGroup()


class Optim(Section):
    """The optimizer. It knows four groups of parameters: matrix, embedding, head and scalar."""

    kind: Annotated[str, OneOf(OPTIMIZERS)] = Field("adamw", description="optimizer")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment, 0 to 1")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment, 0 to 1")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled; on all groups but scalar: biases, norms and scales"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clip the norm of the whole gradient to this; null: do not clip"
    )
    momentum: Annotated[float, Later] = Field(
        0.95, ge=0, lt=1, description="only for muon: decay of the momentum of matrices, 0 to 1"
    )
    momentum_warmup_steps: Annotated[Int, Later] = Field(
        0, ge=0, description="only for muon: steps in which the momentum rises linearly from 0.85"
    )
    cautious: Annotated[bool, Later] = Field(
        False,
        description="only for muon: decay a weight only where it shrinks in this update anyway "
        "(2510.12402)",
    )
    groups: ParameterGroups = ParameterGroups()


class ScheduleSection(Section):
    """The learning rate of every step."""

    effect = Effect.RATES

    kind: Annotated[str, OneOf(SCHEDULES)] = Field(
        "cosine", description="shape of the learning rate after warmup"
    )
    max_lr: float = Field(6e-4, gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="lowest learning rate as a share of the peak, 0 to 1"
    )
    warmup_steps: Int = Field(0, ge=0, description="steps of linear warmup")
    decay_steps: Steps | None = Field(
        None, description="step at which the decay ends; null: train.max_steps"
    )
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="only for wsd: share of decay_steps that decays, 0 to 1"
    )
    decay_shape: Annotated[str, OneOf(DECAY_SHAPES)] = Field(
        "linear", description="only for wsd: shape of the decay"
    )


class Train(Section):
    """Steps, batches, precision, and intervals of logging, evaluation and checkpoints."""

    max_steps: Annotated[Steps, Effect.LENGTH] = Field(2000, description="optimizer updates")
    micro_batch_size: Annotated[Steps, Effect.ADDITIONS] = Field(
        12, description="sequences per worker in one forward pass"
    )
    global_batch_size: Steps = Field(12, description="sequences per update over all workers")
    reduction_slots: Annotated[Steps | None, Effect.ADDITIONS] = Field(
        None,
        description="partial sums of one gradient, a power of two that the number of workers "
        "divides; null: the largest up to 8 that divides the micro-batches of an update",
    )
    seed: Int = Field(1337, ge=0, description="seed of weights, sample order and dropout")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="type of matrix products (autocast); auto: bfloat16 on a GPU that has it, and "
        "on a CPU with AMX or AVX512-BF16 if model.n_embd is 512 or more; float16 on an older GPU; "
        "else float32; a run that has begun keeps its type",
    )
    compile: Annotated[bool, Effect.ADDITIONS] = Field(
        False, description="torch.compile the model: minutes at the start, faster steps on a GPU"
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
        "Hugging Face folder, a nanoGPT ckpt.pt, a run or a checkpoint",
    )


class Compute(Section):
    """Workers and their devices."""

    effect = Effect.NOTHING

    num_workers: Steps | Literal["auto"] = Field(
        "auto",
        description="training processes; must divide the reduction slots; auto: the largest "
        "divisor for which there are GPUs, or 1 without GPUs",
    )
    cpus_per_worker: Steps | Literal["auto"] = Field(
        "auto",
        description="CPUs and torch threads of each worker; auto: all for one worker without a "
        "GPU, else 1",
    )
    hang_after_s: float = Field(
        30.0,
        gt=0,
        description="a worker hangs if one phase of a step takes more than this many seconds and "
        "more than ten times its longest duration so far",
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="one GPU per worker; auto: if the cluster has GPUs"
    )


class Tracking(Section):
    """The MLflow server."""

    effect = Effect.NOTHING

    uri: Text | None = Field(
        None,
        description="MLflow tracking URI; null: $MLFLOW_TRACKING_URI, else sqlite in the storage",
    )
    experiment: Text = Field("espalier", description="name of the MLflow experiment")
