"""All settings of a run: one frozen `Experiment` from a YAML file and `section.field=value`.

Every field has a default, a type and a unit. Unknown fields, wrong values and fields that
contradict each other end in a `UserError` before anything is written. Values that follow from the
fields by arithmetic are properties and cannot be set.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from model.models import MODELS
from model.optim import OPTIMIZERS
from model.schedule import DECAY_SHAPES, SCHEDULES, Schedule
from orchestrator.config.checks import contradictions
from orchestrator.config.fields import (
    Docs,
    Int,
    Interval,
    OneOf,
    Section,
    Steps,
    Text,
    describe_fields,
    section_class,
)
from orchestrator.config.load import read_tree, write_yaml
from orchestrator.config.messages import validate
from orchestrator.errors import UserError
from orchestrator.redact import redact_addresses

if TYPE_CHECKING:
    from model.gpt import GPT, GPTConfig

# Fields, or prefixes of fields, that may change between two attempts of a run. All others decide
# the weights: they are the identity of the run.
FREE = (
    "name",
    "storage",
    "data.dir",
    "train.max_steps",
    "train.log_interval",
    "train.eval_interval",
    "train.checkpoint_interval",
    "train.keep",
    "train.on_nonfinite",
    "train.allow_drift",
    "compute.",
    "tracking.",
)


class Data(Section):
    """The text, and how it becomes tokens."""

    corpus: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        "builtin:stdlib",
        description="text to train on: files, globs or folders (.txt, .md, .py …, .jsonl, "
        ".parquet), https://…#sha256=HEX, or builtin:stdlib (the source of Python's standard "
        "library); one or a list",
    )
    dir: Text | None = Field(
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
    tokenizer: Text = Field(
        "gpt2", description="any tiktoken encoding (gpt2, cl100k_base, o200k_base …), byte or char"
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
    """The shape of the model. The vocabulary follows from the tokenizer."""

    # A second entry of MODELS makes this a field with `OneOf(MODELS)`.
    kind: ClassVar[str] = "gpt"

    block_size: Int = Field(1024, ge=1, description="context length in tokens")
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
    pad_vocab_to: Int = Field(
        128,
        ge=1,
        description="vocab_size is the tokenizer's n_vocab, rounded up to a multiple of this",
    )


class Optim(Section):
    """The optimizer."""

    kind: Annotated[str, OneOf(OPTIMIZERS)] = Field("adamw", description="optimizer")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment, 0 to 1")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment, 0 to 1")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled; only on tensors of two or more dimensions"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clip the norm of the whole gradient to this; null: do not clip"
    )


class ScheduleSection(Section):
    """The learning rate of every step."""

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
    """Steps, batches, precision, and what is logged, evaluated and kept."""

    max_steps: Steps = Field(2000, description="optimizer updates")
    micro_batch_size: Steps = Field(12, description="sequences per worker in one forward pass")
    global_batch_size: Steps = Field(12, description="sequences per update over all workers")
    reduction_slots: Steps | None = Field(
        None,
        description="partial sums of one gradient, a power of two; the number of workers must "
        "divide it; null: the largest up to 8 that divides the micro-batches of an update",
    )
    seed: Int = Field(1337, ge=0, description="seed of weights, sample order and dropout")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "float32", description="type of matrix products (autocast)"
    )
    compile: bool = Field(
        False, description="torch.compile the model: minutes at the start, faster steps on a GPU"
    )
    log_interval: Interval = Field(
        10, description="log every N steps and at the end; null: only at the end"
    )
    eval_interval: Interval = Field(
        250, description="evaluate every N steps, at step 0 and at the end; null: never"
    )
    eval_tokens: Annotated[Int, Field(ge=2)] | None = Field(
        None, description="evaluate on the first N tokens of val; null: on all"
    )
    checkpoint_interval: Interval = Field(
        250, description="save a checkpoint every N steps and at the end; null: only at the end"
    )
    keep: Steps = Field(2, description="recent checkpoints to keep, besides the best by val loss")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="action after a loss or gradient that is not finite; stop: end the run, skip: "
        "go on without this update",
    )
    allow_drift: bool = Field(
        False,
        description="resume even if the last bits of the results will differ, because one of these "
        "changed: processor or GPU, CPUs per worker, version of torch, compile, reduction_slots, "
        "or micro_batch_size at the same global batch",
    )
    init_from: Text = Field(
        "scratch",
        description="first weights: scratch (random), gpt2|gpt2-medium|gpt2-large|gpt2-xl, a "
        "Hugging Face folder, a nanoGPT ckpt.pt, a run or a checkpoint",
    )


class Compute(Section):
    """Workers and their devices."""

    num_workers: Steps | Literal["auto"] = Field(
        "auto",
        description="training processes, a divisor of the reduction slots; auto: the largest one "
        "for which there are GPUs, 1 on CPUs",
    )
    cpus_per_worker: Steps | Literal["auto"] = Field(
        "auto",
        description="CPUs, and so torch threads, of each worker; auto: 1 with several workers, "
        "else all",
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

    uri: Text | None = Field(
        None,
        description="MLflow tracking URI; null: $MLFLOW_TRACKING_URI, else sqlite in the storage",
    )
    experiment: Text = Field("espalier", description="name of the MLflow experiment")


class Experiment(Section):
    """Configuration of one training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")] = Field(
        "quickstart",
        description="name of the run and of its folder; null or absent: the name of the file",
    )
    storage: Text | None = Field(
        None,
        description="folder of runs and data that all nodes share; null: $ESPALIER_STORAGE, else "
        "runs",
    )
    data: Data = Data()
    model: Model = Model()
    optim: Optim = Optim()
    schedule: ScheduleSection = ScheduleSection()
    train: Train = Train()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of one step over all workers (M)."""
        return self.train.global_batch_size // self.train.micro_batch_size

    @property
    def slots(self) -> int:
        """Number of partial sums of one gradient (S); the number of workers divides it."""
        if self.train.reduction_slots is not None:
            return self.train.reduction_slots
        largest_power_of_two = self.micro_batches & -self.micro_batches
        return min(8, largest_power_of_two)

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens of one update over all workers."""
        return self.train.global_batch_size * self.model.block_size

    def lr_schedule(self) -> Schedule:
        """Return the learning-rate schedule; it ends at `max_steps` unless `decay_steps` is set."""
        fields = self.schedule.model_dump()
        fields["decay_steps"] = self.schedule.decay_steps or self.train.max_steps
        return Schedule(**fields)

    def vocab_size(self, n_vocab: int) -> int:
        """Return the rows of the embedding: the tokenizer's `n_vocab`, rounded up."""
        multiple = self.model.pad_vocab_to
        return -(-n_vocab // multiple) * multiple

    def gpt_config(self, n_vocab: int) -> "GPTConfig":
        """Return the shape of the model for a tokenizer of `n_vocab` tokens. Imports torch."""
        fields = self.model.model_dump(exclude={"pad_vocab_to"})
        return MODELS[self.model.kind].shape(vocab_size=self.vocab_size(n_vocab), **fields)

    def new_model(self, n_vocab: int) -> "GPT":
        """Build the model. Its weights are drawn from torch's global generator."""
        return MODELS[self.model.kind].build(self.gpt_config(n_vocab))

    def flat(self) -> dict[str, Any]:
        """Return `{"section.field": value}` of every field, in the order of this file."""
        fields: dict[str, Any] = {}
        for name, value in self.model_dump().items():
            if isinstance(value, dict):
                fields |= {f"{name}.{key}": part for key, part in value.items()}
            else:
                fields[name] = value
        return fields

    def to_yaml(self) -> str:
        """Return a file that reads back as an equal experiment, except passwords in addresses."""
        return write_yaml(redact_addresses(self.model_dump()))

    @model_validator(mode="after")
    def _check_fields_together(self) -> "Experiment":
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def load_experiment(
    path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()
) -> Experiment:
    """Read an experiment file (None: all defaults) and apply `section.field=value` overrides.

    Raises:
        UserError: One line per mistake. Each names the field.
    """
    tree, where = read_tree(path, overrides)
    if "sweep" in tree:
        raise UserError(
            f"{where}: describes a sweep (sweep: …), not one run; run pipelines/sweep.py with it"
        )
    return parse_experiment(tree, where)


def parse_experiment(tree: dict[str, Any], where: str) -> Experiment:
    """Validate nested sections, such as those of a stored experiment.yaml.

    Raises:
        UserError: One line per mistake. Each starts with `where`.
    """
    return validate(Experiment, tree, where, field_docs())


def field_value(key: str, value: Any) -> Any:
    """Return `value` as the field "section.field" stores it: 6e5 steps become 600000.

    Raises:
        UserError: The field does not accept the value. The message names no place.
    """
    section, _, field = key.partition(".")
    model = section_class(Experiment.model_fields[section])
    assert model is not None, key
    checked = validate(model, {field: value}, "", field_docs(), section)
    return getattr(checked, field)


def field_docs() -> Docs:
    """Describe every field of an experiment, for `--help` and error messages."""
    return describe_fields(Experiment)
