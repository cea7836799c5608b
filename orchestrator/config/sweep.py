"""The `sweep:` section of a file: which trials a sweep has, and when a trial is stopped.

Only types and limits are checked here. `orchestrator.sweep` checks the fields that a sweep varies.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from model.models import DEFAULT
from orchestrator.config.checks import password_problems
from orchestrator.config.experiment import Experiment, field_docs
from orchestrator.config.fields import Docs, Section, Steps, Text, describe_fields
from orchestrator.config.messages import validate
from orchestrator.config.models import kind_in, with_model
from orchestrator.errors import UserError

Values = Annotated[list[Any], Field(min_length=1)]


class SweepSection(Section):
    """The trials of a sweep and the rule that stops some of them early."""

    grid: dict[Text, Values] = Field(
        {}, description="section.field: [values]; one trial for each combination of the values"
    )
    trials: dict[Text, dict[Text, Any]] = Field(
        {},
        description="name: {section.field: value}; more trials, which are not combined with the "
        "grid",
    )
    sampler: Literal["random", "optuna"] | None = Field(
        None, description="method that draws more trials from sweep.space"
    )
    num_samples: Steps | None = Field(
        None, description="number of trials to draw; a larger number keeps the earlier trials"
    )
    space: dict[Text, Values | dict[str, Any]] = Field(
        {},
        description="section.field: [choices] or {low, high, log: false, step}; the sampler draws "
        "from these, low and high included",
    )
    seeds: Steps = Field(
        1, description="repetitions of every trial, with train.seed, train.seed + 1, …"
    )
    skip_invalid: bool = Field(
        False,
        description="leave out trials whose fields contradict each other, and count them; false: "
        "refuse the sweep",
    )
    stop: Literal["none", "anneal_probe", "asha"] = Field(
        "none",
        description="trials to stop early; none: only diverged ones, anneal_probe: those that a "
        "short anneal shows to be worse, asha: those with a higher loss (for one schedule shape)",
    )
    probe_step: Steps | None = Field(
        None, description="only for anneal_probe: step at which the short anneals start"
    )
    probe_steps: Steps | None = Field(
        None, description="only for anneal_probe: number of steps in which the rate falls to 0"
    )
    probe_margin: float = Field(
        0.05,
        ge=0,
        description="only for anneal_probe: trials go on if their probe is at most this many nats "
        "above the best one",
    )
    diverged_above: float | None = Field(
        None,
        gt=0,
        description="a trial has diverged if a logged train/loss is above this; null: only if it "
        "is not finite",
    )
    from_: Text | None = Field(
        None,
        alias="from",
        description="RUN@STEP: all trials start from the state of this run, also s3://… in a "
        "mirror, after STEP steps; null: from step 0",
    )
    keep_branches: bool = Field(
        True,
        description="keep the checkpoints from which trials branch, so that the sweep can grow "
        "without repeating a step; false: remove each when no pending stage needs it",
    )


class SweepFile(Experiment):
    """A whole sweep file: an experiment and its `sweep:` section."""

    sweep: SweepSection = SweepSection()


def parse_sweep(tree: dict[str, Any], where: str) -> tuple[Experiment, SweepSection]:
    """Validate a sweep file.

    Returns:
        The experiment that trials change, and the section. The values that the section gives to
        fields are not validated yet.

    Raises:
        UserError: One line per mistake. Each starts with `where`.
    """
    kind = kind_in(tree)
    file = validate(with_model(SweepFile, kind), tree, where, sweep_docs(kind))
    problems = password_problems({"sweep": file.sweep.model_dump()})
    if problems:
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems))
    base = with_model(Experiment, kind).model_validate(file.model_dump(exclude={"sweep"}))
    trials = {
        name: _by_field(fields, field_docs(kind)) for name, fields in file.sweep.trials.items()
    }
    return base, file.sweep.replace(trials=trials)


def _by_field(tree: dict[str, Any], docs: Docs) -> dict[str, Any]:
    """Return the fields of a trial by whole names: schedule.momentum: {kind: wsd} is one field."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        is_section = "." in name and any(field.startswith(f"{name}.") for field in docs)
        if is_section and isinstance(value, dict):
            found |= _by_field({f"{name}.{key}": part for key, part in value.items()}, docs)
        else:
            found[name] = value
    return found


def sweep_docs(kind: str = DEFAULT) -> Docs:
    """Describe every field of a sweep file with this kind of model, for `--help` and errors."""
    return describe_fields(with_model(SweepFile, kind))
