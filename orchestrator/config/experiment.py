"""All settings of a run: one frozen `Experiment` from a YAML file and `section.field=value`.

Unknown fields, wrong values and fields that contradict each other raise a `UserError` before
anything is written. Values that are computed from the fields are properties and cannot be set.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from model import models
from model.optim import GROUPS, GroupSettings, OptimizerSettings
from model.schedule import Schedule
from orchestrator.config.checks import contradictions
from orchestrator.config.fields import (
    AUTO,
    Docs,
    Effect,
    Section,
    Text,
    describe_fields,
    section_class,
)
from orchestrator.config.load import read_tree
from orchestrator.config.messages import validate
from orchestrator.config.models import kind_in, with_model
from orchestrator.config.only_for import useless
from orchestrator.config.places import Compute, Tracking
from orchestrator.config.schedules import OtherSchedule, ScheduleSection
from orchestrator.config.sections import Data, Gpt2, Optim, Train
from orchestrator.config.steps import BatchSizes, Plan, Steps
from orchestrator.config.yaml_text import write_yaml
from orchestrator.errors import UserError
from orchestrator.own_code import is_own

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
        description="folder of runs and data that all nodes share, or s3://BUCKET/PREFIX: a folder "
        "of this machine with this `mirror`; null: $ESPALIER_STORAGE, else runs",
    )
    mirror: Text | None = Field(
        None,
        description="s3://BUCKET/PREFIX that gets a copy of the run and its data while it goes on; "
        "it continues from there if its folder is gone; null: `storage` if that is in a bucket",
    )
    data: Data = Data()
    model: Gpt2 = Gpt2()  # `with_model` makes a subclass for each other kind
    optim: Optim = Optim()
    schedule: ScheduleSection = ScheduleSection()
    train: Train = Train()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences per update over all workers."""
        size = self.train.global_batch_size
        return BatchSizes(tuple((self.train.batch_schedule or {0: size or 0}).items()))

    @property
    def largest_batch(self) -> int:
        """Sequences of the largest update."""
        return max(size for _, size in self.batch_sizes.stretches)

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch; the least, 1, while it is `auto`."""
        size = self.train.micro_batch_size
        return 1 if size == AUTO else size

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of the largest step over all workers (M)."""
        return self.largest_batch // self.micro_batch

    @property
    def slots(self) -> int:
        """Number of partial sums of one gradient (S); there may be as many workers.

        It does not depend on later batches, so that trials with other ones share what is before.
        """
        if self.train.reduction_slots is not None:
            return self.train.reduction_slots
        micro_batches = self.batch_sizes.at(0) // self.micro_batch
        return min(8, micro_batches & -micro_batches)  # a power of two that divides them

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens of the largest update over all workers."""
        return self.largest_batch * self.model.block_size

    def tokens(self, steps: int) -> int:
        """Return the number of tokens of the first updates."""
        return self.batch_sizes.before(steps) * self.model.block_size

    def lr_schedule(self) -> Schedule:
        """Return the learning-rate schedule; it ends at `max_steps` unless `decay_steps` is set."""
        fields = self.schedule.model_dump(exclude={"weight_decay", "momentum"})
        fields["decay_steps"] = self.schedule.decay_steps or self.train.max_steps
        fields["points"] = _pairs(self.schedule.points)
        return Schedule(**fields)

    def steps(self) -> Steps:
        """Return all settings that may change from step to step."""
        used = self.effective()
        lr = used.lr_schedule()
        decay = used.schedule.weight_decay
        momentum = used.schedule.momentum
        peak = used.optim.momentum
        final = peak if momentum.final is None else momentum.final
        plan = Plan(
            lr,
            _like(lr, decay, max_lr=1.0, min_lr_ratio=decay.min_ratio, warmup_steps=0),
            _like(
                lr,
                momentum,
                max_lr=peak,
                min_lr_ratio=final / peak if peak else 1.0,
                warmup_steps=used.optim.momentum_warmup_steps,
            ),
            self.batch_sizes,
        )
        return Steps(plan)

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
            polar_steps=section.polar_steps,
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
        """Build the model with its first weights; see `models.new_model`. Imports torch."""
        return models.new_model(self.model.kind, self.model_config_for(n_vocab), self.train.seed)

    def check_own_code(self) -> None:
        """Build and run a model and an optimizer of the user.

        Raises:
            UserError: They cannot be used; one line with the file and the line in it.
        """
        if self.own_kinds:
            from orchestrator.own_checks import check

            check(
                self.model.kind,
                self.model_config_for(n_vocab=256),
                self.optim.kind,
                self.optimizer_settings(),
                self.train.activation_checkpointing,
            )

    @property
    def own_kinds(self) -> list[str]:
        """The kinds that name a file of the user."""
        return [kind for kind in (self.model.kind, self.optim.kind) if is_own(kind)]

    def effective(self) -> Self:
        """Return the experiment with the default of each field that has no effect."""
        docs = field_docs(self.model.kind)
        unused = useless(self.flat(), docs)
        return self.replace(**{key.replace(".", "__"): docs[key].default for key in unused})

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


def _like(lr: Schedule, own: OtherSchedule, **values: Any) -> Schedule:
    """Return a schedule that takes from that of the learning rate what it does not have itself."""
    return replace(
        lr,
        kind=own.kind,
        decay_steps=own.decay_steps or lr.decay_steps,
        decay_fraction=own.decay_fraction or lr.decay_fraction,
        points=_pairs(own.points),
        **values,
    )


def _pairs(mapping: dict[int, float] | None) -> tuple[tuple[int, float], ...]:
    return tuple((mapping or {}).items())


def _flat(section: Section, start: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in vars(section).items():
        if isinstance(value, Section):
            fields |= _flat(value, f"{start}{name}.")
        else:
            fields[f"{start}{name}"] = value
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
    experiment = parse_experiment(tree, where)
    experiment.check_own_code()
    return experiment


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
