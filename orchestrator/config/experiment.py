"""Everything that a user can set: one frozen `Experiment` out of a YAML file and `section.field=value` words.

Every field has a default, a type and a unit. Unknown keys, wrong values and fields that contradict each other end in a
`UserError` before anything is touched. What follows from the fields by arithmetic is a property here and set nowhere.
"""

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model.schedule import Schedule
from orchestrator.config.messages import contradictions, explain, type_words
from orchestrator.config.overrides import read_tree
from orchestrator.config.plain_yaml import write_yaml
from orchestrator.errors import UserError
from orchestrator.redact import redact_addresses

if TYPE_CHECKING:
    from model.gpt import GPTConfig


def _integral(value: Any) -> Any:
    """`6e5` is a number of steps as good as 600000; 0.5 is not, and is left for pydantic to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# 2^53: beyond it a float is no exact number of anything, and torch takes no seed above 2^63.
Int = Annotated[int, BeforeValidator(_integral), Field(le=2**53)]
Steps = Annotated[Int, Field(ge=1)]
Interval = Annotated[Steps | None, Field()]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Data(Section):
    """Where the text comes from and how it becomes tokens."""

    corpus: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        "builtin:stdlib",
        description=(
            "text to train on: files, globs or directories (.txt, .md, .py …, .jsonl, .parquet), https://…#sha256=HEX, or "
            "builtin:stdlib (the running Python's own library); one or a list"
        ),
    )
    dir: Text | None = Field(
        None, description="folder of the token shards; null: <storage>/data/<fingerprint>"
    )
    text_field: Text = Field(
        "text", description="field of JSON lines or column of Parquet that holds the text"
    )
    invalid_utf8: Literal["stop", "replace"] = Field(
        "stop",
        description=(
            "where text is not UTF-8: name the file and the byte, or put U+FFFD for each sequence that is none"
        ),
    )
    tokenizer: Text = Field(
        "gpt2", description="any tiktoken encoding (gpt2, cl100k_base, o200k_base …), byte or char"
    )
    split: Literal["tail", "hash"] = Field(
        "tail",
        description=(
            "which part is val: the last characters of the corpus, or documents by the hash of their content"
        ),
    )
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the corpus that is val, 0–1")
    append_eot: bool = Field(
        False, description="end every document with the tokenizer's end-of-text token"
    )


class Model(Section):
    """GPT-2's shape. The vocabulary follows from the tokenizer."""

    block_size: Int = Field(1024, ge=1, description="context length, tokens")
    n_layer: Int = Field(12, ge=1, description="transformer blocks")
    n_head: Int = Field(12, ge=1, description="attention heads per block; divides n_embd")
    n_embd: Int = Field(768, ge=1, description="width of the residual stream")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, 0–1; 0 for pretraining")
    bias: bool = Field(False, description="biases in Linear and LayerNorm, as GPT-2 has them")
    activation: Literal["gelu", "gelu_tanh"] = Field(
        "gelu", description=("gelu_tanh is what OpenAI's GPT-2 weights expect")
    )
    pad_vocab_to: Int = Field(
        128,
        ge=1,
        description=("vocab_size is the tokenizer's n_vocab rounded up to a multiple of this"),
    )


class Optim(Section):
    kind: Literal["adamw"] = Field("adamw", description="optimizer")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled, on tensors of two or more dimensions"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="clip the global gradient norm to this; null: never"
    )


class ScheduleSection(Section):
    kind: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = Field(
        "cosine", description="shape of the learning rate"
    )
    max_lr: float = Field(6e-4, gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="floor as a share of the peak, 0–1")
    warmup_steps: Int = Field(0, ge=0, description="linear warmup, steps")
    decay_steps: Steps | None = Field(
        None, description="step at which the decay ends; null: train.max_steps"
    )
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="wsd: share of decay_steps that its decay takes, 0–1"
    )
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = Field(
        "linear", description="wsd: shape of its decay"
    )


class Train(Section):
    max_steps: Steps = Field(2000, description="optimizer updates")
    micro_batch_size: Steps = Field(12, description="sequences per worker per forward")
    global_batch_size: Steps = Field(12, description="sequences per update over all workers")
    reduction_slots: Steps | None = Field(
        None,
        description=(
            "canonical summands of a gradient, a power of two; workers divide it; null: the largest up to 8 that fits"
        ),
    )
    seed: Int = Field(1337, ge=0, description="of weights, sample order and dropout")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "float32", description="of matrix products (autocast)"
    )
    compile: bool = Field(
        False, description="torch.compile the model: minutes at the start, faster steps on a GPU"
    )
    log_interval: Interval = Field(
        10, description="steps between two logged losses (also at the end); null: only there"
    )
    eval_interval: Interval = Field(
        250, description="steps between two evaluations (also at both ends); null: off"
    )
    eval_tokens: Annotated[Int, Field(ge=2)] | None = Field(
        None, description="first N tokens of val; null: all of it"
    )
    checkpoint_interval: Interval = Field(
        250, description="steps between two checkpoints (also at the end); null: off"
    )
    keep: Steps = Field(
        2,
        description=(
            "latest checkpoints that stay, beside the best of those at whose step val was evaluated"
        ),
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description=(
            "what a loss or gradient that is not finite does: end the run, or leave that update out and go on"
        ),
    )
    allow_drift: bool = Field(
        False,
        description=(
            "go on where the last bits cannot stay those of the run so far: another processor or GPU, number of CPUs per worker, "
            "version of torch, compile, reduction_slots, or micro_batch_size of the same global batch"
        ),
    )
    init_from: Text = Field(
        "scratch",
        description=(
            "scratch, gpt2|gpt2-medium|gpt2-large|gpt2-xl, a Hugging Face folder, a nanoGPT ckpt.pt, a run or checkpoint"
        ),
    )


class Compute(Section):
    num_workers: Steps | Literal["auto"] = Field(
        "auto", description="training processes, a divisor of the slots"
    )
    cpus_per_worker: Steps | Literal["auto"] = Field(
        "auto", description="CPUs, and so torch threads, of each worker"
    )
    hang_after_s: float = Field(
        30.0,
        gt=0,
        description=(
            "seconds that a step may take, or ten times the longest one of its kind so far, before its workers count as hung"
        ),
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="one GPU per worker; auto: if the cluster has any"
    )


class Tracking(Section):
    uri: Text | None = Field(
        None, description="MLflow; null: $MLFLOW_TRACKING_URI, else sqlite under storage"
    )
    experiment: Text = Field("espalier", description="name of the MLflow experiment")


class Experiment(Section):
    """One training run, resolved."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")] = Field(
        "quickstart", description="of the run and its folder; null or absent: the file's name"
    )
    storage: Text | None = Field(
        None,
        description=(
            "folder of runs and data, shared by all nodes; null: $ESPALIER_STORAGE, else runs"
        ),
    )
    data: Data = Data()
    model: Model = Model()
    optim: Optim = Optim()
    schedule: ScheduleSection = ScheduleSection()
    train: Train = Train()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()

    # ---- what follows by arithmetic ----
    @property
    def micro_batches(self) -> int:
        """M: micro-batches of one step over all workers."""
        return self.train.global_batch_size // self.train.micro_batch_size

    @property
    def slots(self) -> int:
        """S: canonical summands of one gradient; the numbers of workers are its divisors."""
        largest = (
            self.micro_batches & -self.micro_batches
        )  # the largest power of two that divides M
        return self.train.reduction_slots or min(8, largest)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.model.block_size

    def lr_schedule(self) -> Schedule:
        s = self.schedule
        return Schedule(
            s.kind,
            s.max_lr,
            s.min_lr_ratio,
            s.warmup_steps,
            decay_fraction=s.decay_fraction,
            decay_shape=s.decay_shape,
            decay_steps=s.decay_steps or self.train.max_steps,
        )

    def vocab_size(self, n_vocab: int) -> int:
        """Rows of the embedding: the tokenizer's `n_vocab`, rounded up."""
        pad = self.model.pad_vocab_to
        return -(-n_vocab // pad) * pad

    def gpt_config(self, n_vocab: int) -> "GPTConfig":
        from model.gpt import GPTConfig  # torch takes a second: who is refused need not wait for it

        m = self.model
        return GPTConfig(
            m.block_size,
            self.vocab_size(n_vocab),
            m.n_layer,
            m.n_head,
            m.n_embd,
            m.dropout,
            m.bias,
            m.activation,
        )

    def flat(self) -> dict[str, Any]:
        """`{"section.field": value}` of every field, in the order of this file."""
        rows: dict[str, Any] = {}
        for key, value in self.model_dump().items():
            rows.update(
                {f"{key}.{k}": v for k, v in value.items()}
                if isinstance(value, dict)
                else {key: value}
            )
        return rows

    def to_yaml(self) -> str:
        """What `parse_experiment(read_yaml(…))` reads back as an equal experiment, but for passwords in addresses."""
        return write_yaml(redact_addresses(self.model_dump()))

    # ---- fields that must agree ----
    @model_validator(mode="after")
    def _fields_agree(self) -> "Experiment":
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


class SweepSection(Section):
    """Which trials a sweep has, and when one of them is stopped. What it may say of other fields: `space.py`."""

    grid: dict[Text, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description=("section.field: [values]; a trial for every combination of all of them")
    )
    trials: dict[Text, dict[Text, Any]] = Field(
        {},
        description=("name: {section.field: value}; trials beside the grid, not combined with it"),
    )
    sampler: Literal["random", "optuna"] | None = Field(
        None, description="who draws trials from sweep.space, beside the grid"
    )
    num_samples: Steps | None = Field(
        None, description="trials to draw; growing it keeps the earlier ones"
    )
    space: dict[Text, Annotated[list[Any], Field(min_length=1)] | dict[str, Any]] = Field(
        {},
        description=(
            "section.field: [choices] or {low, high, log: false, step}; what the sampler draws from, both ends included"
        ),
    )
    seeds: Steps = Field(
        1, description="repetitions of every trial, with train.seed, train.seed + 1, …"
    )
    stop: Literal["none", "anneal_probe", "asha"] = Field(
        "none",
        description=(
            "none: only what diverged; anneal_probe: what a short anneal shows to be worse; asha: only for one schedule shape"
        ),
    )
    probe_step: Steps | None = Field(None, description="anneal_probe: the step at which it forks")
    probe_steps: Steps | None = Field(
        None, description="anneal_probe: steps in which the rate falls to zero"
    )
    probe_margin: float = Field(
        0.05, ge=0, description="anneal_probe: nats above the best probe that still go on"
    )
    diverged_above: float | None = Field(
        None,
        gt=0,
        description=(
            "a logged train/loss above it is a diverged trial; null: only one that is no finite number"
        ),
    )
    from_: Text | None = Field(
        None,
        alias="from",
        description=(
            "RUN@STEP: trials branch off this run's state after STEP steps; null: all begin at step 0"
        ),
    )
    keep_branches: bool = Field(
        True,
        description=(
            "keep the checkpoints at branch points, so that the sweep can grow without running a step again; false: each goes "
            "once no pending stage needs it"
        ),
    )


class SweepFile(Experiment):
    """An experiment and what of it is swept: the whole of a sweep's file."""

    sweep: SweepSection = SweepSection()


# ---- reading ----
def load_experiment(
    path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = ()
) -> Experiment:
    """Read an experiment file (None: all defaults) and apply `section.field=value` words on top.

    Raises:
        UserError: one line per mistake, each naming the field.
    """
    tree, where = read_tree(path, overrides)
    if "sweep" in tree:
        raise UserError(
            f"{where}: describes a sweep (sweep: …), not one run; run pipelines/sweep.py with it"
        )
    return parse_experiment(tree, where)


def parse_experiment(tree: dict[str, Any], where: str) -> Experiment:
    """Validate a nested dict (a YAML file, a stored `experiment.yaml`)."""
    return _parse(Experiment, tree, where)


def parse_sweep(tree: dict[str, Any], where: str) -> tuple[Experiment, SweepSection]:
    """What all trials begin from, and what is swept; its words on other fields are not looked at yet."""
    whole = _parse(SweepFile, tree, where)
    return Experiment.model_validate(whole.model_dump(exclude={"sweep"})), whole.sweep


def field_value(key: str, value: Any) -> Any:
    """`value` as the field `section.field` holds it: 6e5 steps are 600000. Raises UserError, without a place."""
    section, _, field = key.partition(".")
    checked = _parse(Experiment.model_fields[section].annotation, {field: value}, "", section)
    return getattr(checked, field)


def _parse(model: type[Section], tree: dict[str, Any], where: str, *loc: str) -> Any:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        found = [{**e, "loc": (*loc, *e["loc"])} for e in error.errors()]
        lines = explain(found, field_docs(model if issubclass(model, Experiment) else Experiment))
        raise UserError(
            "\n".join(f"{where}: {line}" if where else line for line in lines)
        ) from None


# ---- describing ----
def field_docs(whole: type[Experiment] = Experiment) -> dict[str, dict[str, Any]]:
    """`{"section.field": {"type", "default", "description"}}` of every field, for --help and error messages."""
    docs: dict[str, dict[str, Any]] = {}
    for name, info in whole.model_fields.items():
        section = isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        for key, field in info.annotation.model_fields.items() if section else [("", info)]:
            docs[f"{name}.{field.alias or key}" if section else name] = {
                "type": type_words(field.annotation),
                "default": field.default,
                "description": field.description,
            }
    return docs


def sweep_docs() -> dict[str, dict[str, Any]]:
    """`field_docs` of a sweep's file."""
    return field_docs(SweepFile)
