"""Everything that a user can set: one frozen `Experiment` out of a YAML file and `section.field=value` words.

Every field has a default, a type and a unit. Unknown keys, wrong values and fields that contradict each other end in a
`UserError` before anything is touched. What follows from the fields by arithmetic is a property here and set nowhere.
"""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from model.gpt import GPTConfig
from model.schedule import Schedule
from orchestrator.errors import UserError
from orchestrator.plain_yaml import read_yaml, write_yaml
from orchestrator.refusals import explain


def _integral(value: Any) -> Any:
    """`6e5` is a number of steps as good as 600000; 0.5 is not, and is left for pydantic to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# 2^53: beyond it a float is no exact number of anything, and torch takes no seed above 2^63.
Int = Annotated[int, BeforeValidator(_integral), Field(le=2**53)]
Steps = Annotated[Int, Field(ge=1)]
Interval = Annotated[Steps | None, Field()]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Data(Section):
    """Where the text comes from and how it becomes tokens."""

    corpus: Text | Annotated[list[Text], Field(min_length=1)] = Field("builtin:stdlib", description=(
        "text to train on: files, globs or directories (.txt, .md, .py …, .jsonl, .parquet), https://…#sha256=HEX, or "
        "builtin:stdlib (the running Python's own library); one or a list"))
    dir: Text | None = Field(None, description="folder of the token shards; null: <storage>/data/<fingerprint>")
    text_field: Text = Field("text", description="field of JSON lines or column of Parquet that holds the text")
    tokenizer: Text = Field("gpt2", description="any tiktoken encoding (gpt2, cl100k_base, o200k_base …), byte or char")
    split: Literal["tail", "hash"] = Field("tail", description=(
        "which part is val: the last characters of the corpus, or documents by the hash of their content"))
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the corpus that is val, 0–1")
    append_eot: bool = Field(False, description="end every document with the tokenizer's end-of-text token")


class Model(Section):
    """GPT-2's shape. The vocabulary follows from the tokenizer."""

    block_size: Int = Field(1024, ge=1, description="context length, tokens")
    n_layer: Int = Field(12, ge=1, description="transformer blocks")
    n_head: Int = Field(12, ge=1, description="attention heads per block; divides n_embd")
    n_embd: Int = Field(768, ge=1, description="width of the residual stream")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, 0–1; 0 for pretraining")
    bias: bool = Field(False, description="biases in Linear and LayerNorm, as GPT-2 has them")
    activation: Literal["gelu", "gelu_tanh"] = Field("gelu", description=(
        "gelu_tanh is what OpenAI's GPT-2 weights expect"))
    pad_vocab_to: Int = Field(128, ge=1, description=(
        "vocab_size is the tokenizer's n_vocab rounded up to a multiple of this"))


class Optim(Section):
    kind: Literal["adamw"] = Field("adamw", description="optimizer")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled, on tensors of two or more dimensions")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the global gradient norm to this; null: never")


class ScheduleSection(Section):
    kind: Literal["cosine", "linear", "wsd", "constant"] = Field("cosine", description="shape of the learning rate")
    max_lr: float = Field(6e-4, gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="floor as a share of the peak, 0–1")
    warmup_steps: Int = Field(0, ge=0, description="linear warmup, steps")
    decay_steps: Steps | None = Field(None, description="step at which the decay ends; null: train.max_steps")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of decay_steps that its decay takes, 0–1")
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = Field("linear", description="wsd: shape of its decay")


class Train(Section):
    max_steps: Steps = Field(2000, description="optimizer updates")
    micro_batch_size: Steps = Field(12, description="sequences per worker per forward")
    global_batch_size: Steps = Field(12, description="sequences per update over all workers")
    reduction_slots: Steps | None = Field(None, description=(
        "canonical summands of a gradient, a power of two; workers divide it; null: the largest up to 8 that fits"))
    seed: Int = Field(1337, ge=0, description="of weights, sample order and dropout")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("float32", description="of matrix products (autocast)")
    compile: bool = Field(False, description="torch.compile the model: minutes at the start, faster steps on a GPU")
    log_interval: Interval = Field(10, description="steps between two logged losses (also at the end); null: only there")
    eval_interval: Interval = Field(250, description="steps between two evaluations (also at both ends); null: off")
    eval_tokens: Annotated[Int, Field(ge=2)] | None = Field(None, description="first N tokens of val; null: all of it")
    checkpoint_interval: Interval = Field(250, description="steps between two checkpoints (also at the end); null: off")
    keep: Steps = Field(2, description=(
        "latest checkpoints that stay, beside the best of those at whose step val was evaluated"))
    init_from: Text = Field("scratch", description=(
        "scratch, gpt2|gpt2-medium|gpt2-large|gpt2-xl, a Hugging Face folder, a nanoGPT ckpt.pt, a run or checkpoint"))


class Compute(Section):
    num_workers: Steps | Literal["auto"] = Field("auto", description="training processes, a divisor of the slots")
    cpus_per_worker: Steps | Literal["auto"] = Field("auto", description="CPUs, and so torch threads, of each worker")
    use_gpu: bool | Literal["auto"] = Field("auto", description="one GPU per worker; auto: if the cluster has any")


class Tracking(Section):
    uri: Text | None = Field(None, description="MLflow; null: $MLFLOW_TRACKING_URI, else sqlite under storage")
    experiment: Text = Field("espalier", description="name of the MLflow experiment")


class Experiment(Section):
    """One training run, resolved."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")] = Field(
        "quickstart", description="of the run and its folder; null or absent: the file's name")
    storage: Text | None = Field(None, description=(
        "folder of runs and data, shared by all nodes; null: $ESPALIER_STORAGE, else runs"))
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
        largest = self.micro_batches & -self.micro_batches  # the largest power of two that divides M
        return self.train.reduction_slots or min(8, largest)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.model.block_size

    def lr_schedule(self) -> Schedule:
        s = self.schedule
        return Schedule(s.kind, s.max_lr, s.min_lr_ratio, s.warmup_steps, decay_fraction=s.decay_fraction,
                        decay_shape=s.decay_shape, decay_steps=s.decay_steps or self.train.max_steps)

    def vocab_size(self, n_vocab: int) -> int:
        """Rows of the embedding: the tokenizer's `n_vocab`, rounded up."""
        pad = self.model.pad_vocab_to
        return -(-n_vocab // pad) * pad

    def gpt_config(self, n_vocab: int) -> GPTConfig:
        m = self.model
        return GPTConfig(m.block_size, self.vocab_size(n_vocab), m.n_layer, m.n_head, m.n_embd, m.dropout,
                         m.bias, m.activation)

    def flat(self) -> dict[str, Any]:
        """`{"section.field": value}` of every field, in the order of this file."""
        rows: dict[str, Any] = {}
        for key, value in self.model_dump().items():
            rows.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
        return rows

    def to_yaml(self) -> str:
        """What `parse_experiment(read_yaml(…))` reads back as an equal experiment."""
        return write_yaml(self.model_dump())

    # ---- fields that must agree ----
    @model_validator(mode="after")
    def _fields_agree(self) -> "Experiment":
        problems = [*_batch_problems(self), *_schedule_problems(self)]
        if self.name in ("data", "mlflow"):
            problems.append(f"name: '{self.name}' is a folder of the storage itself; choose another")
        if self.model.n_embd % self.model.n_head:
            problems.append(f"model.n_head: {self.model.n_head} does not divide model.n_embd={self.model.n_embd}")
        if self.data.append_eot and self.data.tokenizer == "char":
            problems.append("data.append_eot: the char tokenizer has no end-of-text token; use byte or a tiktoken one")
        if self.tracking.uri and not re.match(r"^(https?|sqlite|postgresql|mysql)[+a-z0-9]*://?.", self.tracking.uri):
            shown = re.sub("//.*@", "//…@", self.tracking.uri)
            problems.append(f"tracking.uri: '{shown}' is none of http(s)://…, sqlite:///…, postgresql://…")
        if self.tracking.uri and re.search(r"//[^/]*@", self.tracking.uri):
            problems.append("tracking.uri: holds a password or a user, and the experiment travels with every checkpoint; "
                            "set $MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _batch_problems(e: Experiment) -> list[str]:
    t, workers = e.train, e.compute.num_workers
    if t.global_batch_size % t.micro_batch_size:
        return [f"train.global_batch_size: {t.global_batch_size} is no multiple of "
                f"train.micro_batch_size={t.micro_batch_size}"]
    if t.reduction_slots and (t.reduction_slots & (t.reduction_slots - 1) or e.micro_batches % t.reduction_slots):
        return [f"train.reduction_slots: {t.reduction_slots} must be a power of two that divides the {e.micro_batches} "
                f"micro-batches of a step ({t.global_batch_size} / {t.micro_batch_size})"]
    if workers != "auto" and e.slots % workers:
        return [f"compute.num_workers: {workers} does not divide the {e.slots} reduction slots; use one of "
                f"{[w for w in range(1, e.slots + 1) if e.slots % w == 0]}, or a smaller train.micro_batch_size "
                f"(now {t.micro_batch_size} of {t.global_batch_size})"]
    return []


def _schedule_problems(e: Experiment) -> list[str]:
    s, problems = e.schedule, []
    end, label = (s.decay_steps, "schedule.decay_steps") if s.decay_steps else (e.train.max_steps, "train.max_steps")
    if s.warmup_steps >= e.train.max_steps:
        problems.append(f"schedule.warmup_steps: {s.warmup_steps} is not shorter than "
                        f"train.max_steps={e.train.max_steps}")
    elif s.kind != "constant" and s.warmup_steps >= end:
        problems.append(f"schedule.warmup_steps: {s.warmup_steps} is not shorter than {label}={end}")
    elif s.kind == "wsd" and s.warmup_steps > end - round(s.decay_fraction * end):
        problems.append(f"schedule.decay_fraction: {s.decay_fraction} of {label}={end} begins inside the warmup of "
                        f"{s.warmup_steps} steps")
    return problems


# ---- reading ----
def load_experiment(path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """Read an experiment file (None: all defaults) and apply `section.field=value` words on top.

    Raises:
        UserError: one line per mistake, each naming the field.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as an experiment ({error.__class__.__name__}); give the path of a "
                            f"YAML file") from None
        tree = read_yaml(text, str(path)) or {}
        if not isinstance(tree, dict):
            raise UserError(f"{path}: holds no sections (data:, model:, train: …)")
    for word in overrides:
        _apply(tree, word)
    tree = {key: value for key, value in tree.items() if value is not None}  # `train:` with every line commented out
    if path is not None:
        tree.setdefault("name", Path(path).stem)
    return parse_experiment(tree, str(path or "command line"))


def parse_experiment(tree: dict[str, Any], where: str) -> Experiment:
    """Validate a nested dict (a YAML file, a stored `experiment.yaml`)."""
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        lines = explain(error.errors(), field_docs())
        raise UserError("\n".join(f"{where}: {line}" for line in lines)) from None


def _apply(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals:
        raise UserError(f"'{word}': expected section.field=value, for example train.max_steps=100")
    *sections, field = key.split(".")
    if not all((field, *sections)):
        raise UserError(f"'{word}': '{key}' names no field; expected section.field=value")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"'{word}': {section} is no section")
    tree[field] = read_yaml(text, f"'{word[:80]}'")


# ---- describing ----
def _type_words(annotation: Any) -> str:
    text = str(annotation)
    if text.startswith("typing.Literal"):
        return " | ".join(json.loads("[" + text[len("typing.Literal["):-1].replace("'", '"') + "]"))
    if isinstance(annotation, type):
        return {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false"}[annotation.__name__]
    if hasattr(annotation, "__metadata__"):
        return _type_words(annotation.__origin__)
    if getattr(annotation, "__origin__", None) is list:
        return "a list of texts"
    parts = ["null" if a is type(None) else _type_words(a) for a in annotation.__args__]
    return " or ".join(dict.fromkeys(parts))


def field_docs() -> dict[str, dict[str, Any]]:
    """`{"section.field": {"type", "default", "description"}}` of every field, for --help and error messages."""
    docs: dict[str, dict[str, Any]] = {}
    for name, info in Experiment.model_fields.items():
        section = isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        for key, field in (info.annotation.model_fields.items() if section else [("", info)]):
            docs[f"{name}.{key}" if section else name] = {
                "type": _type_words(field.annotation), "default": field.default, "description": field.description}
    return docs
