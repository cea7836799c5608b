"""All settings of a run: one frozen `Experiment` from a YAML file and `section.field=value`.

Unknown fields, wrong values and fields that contradict each other raise a `UserError` before
anything is written. Values that are computed from the fields are properties and cannot be set.
"""

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from model import models
from model.optim import GROUPS, GroupSettings, OptimizerSettings
from model.schedule import Schedule
from orchestrator.config.checks import contradictions
from orchestrator.config.fields import Docs, Effect, Section, Text, describe_fields, section_class
from orchestrator.config.load import read_tree, write_yaml
from orchestrator.config.messages import validate
from orchestrator.config.models import kind_in, with_model
from orchestrator.config.sections import (
    Compute,
    Data,
    Gpt2,
    Optim,
    ScheduleSection,
    Tracking,
    Train,
)
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from model.protocol import Config, LanguageModel


class Experiment(Section):
    """Configuration of one training run."""

    effect = Effect.NOTHING

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
    model: Gpt2 = Gpt2()  # `with_model` makes a subclass for each other kind
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

    def optimizer_settings(self) -> OptimizerSettings:
        """Return the values that the optimizer is built from."""
        section = self.optim
        return OptimizerSettings(
            max_lr=self.schedule.max_lr,
            beta1=section.beta1,
            beta2=section.beta2,
            weight_decay=section.weight_decay,
            momentum=section.momentum,
            cautious=section.cautious,
            groups={
                name: GroupSettings(**getattr(section.groups, name).model_dump()) for name in GROUPS
            },
        )

    def vocab_size(self, n_vocab: int) -> int:
        """Return the number of rows of the embedding: the tokenizer's `n_vocab`, rounded up."""
        multiple = self.model.pad_vocab_to
        return -(-n_vocab // multiple) * multiple

    def model_config_for(self, n_vocab: int) -> "Config":
        """Return the settings of the model for a tokenizer of `n_vocab` tokens."""
        fields = self.model.model_dump(exclude={"pad_vocab_to"})
        return models.new_config({**fields, "vocab_size": self.vocab_size(n_vocab)})

    def new_model(self, n_vocab: int) -> "LanguageModel":
        """Build the model. Its weights are drawn from torch's global generator. Imports torch."""
        return models.new_model(self.model.kind, self.model_config_for(n_vocab))

    def flat(self) -> dict[str, Any]:
        """Return `{"section.field": value}` of all fields, in the order of their definition."""
        return _flat(self)

    def to_yaml(self) -> str:
        """Return YAML that reads back as an equal experiment."""
        return write_yaml(self.model_dump())

    @model_validator(mode="after")
    def _check_fields_together(self) -> "Experiment":
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _flat(section: Section) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, Section):
            fields |= {f"{name}.{key}": part for key, part in _flat(value).items()}
        else:
            fields[name] = value
    return fields


def load_experiment(
    path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()
) -> Experiment:
    """Read an experiment file (None: all defaults) and apply `section.field=value` overrides.

    Raises:
        UserError: One line per mistake. Each names the field.
    """
    tree, where = read_tree(path, overrides, field_docs)
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
    kind = kind_in(tree)
    return validate(with_model(Experiment, kind), tree, where, field_docs(kind))


def field_value(key: str, value: Any, kind: str = models.DEFAULT) -> Any:
    """Return `value` as the field "section.field" stores it: 6e5 steps become 600000.

    Args:
        key: The field.
        value: Its value in a file.
        kind: Kind of the model.

    Raises:
        UserError: The field does not accept the value. The message does not name a file.
    """
    *sections, field = key.split(".")
    model: type[Section] | None = with_model(Experiment, kind)
    for section in sections:
        assert model is not None, key
        model = section_class(model.model_fields[section])
    assert model is not None, key
    checked = validate(model, {field: value}, "", field_docs(kind), ".".join(sections))
    return getattr(checked, field)


@functools.cache
def fields_with(*effects: Effect) -> tuple[str, ...]:
    """Return the fields that have one of these effects."""
    return tuple(key for key, doc in field_docs().items() if doc.effect in effects)


@functools.cache
def field_docs(kind: str = models.DEFAULT) -> Docs:
    """Describe every field of an experiment with this kind of model, for `--help` and errors."""
    return describe_fields(with_model(Experiment, kind))
