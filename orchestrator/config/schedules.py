"""The section `schedule`: the learning rate of every step, and what else changes."""

from typing import Annotated

from pydantic import Field

from model.schedule import DECAY_SHAPES, SCHEDULES
from orchestrator.config.fields import (
    Effect,
    Int,
    Later,
    OneOf,
    Points,
    Section,
    Steps,
)
from orchestrator.config.only_for import OnlyFor

ANY_KIND = ("kind", "weight_decay.kind", "momentum.kind")
LATE = ("wsd", "power")
FALLING = tuple(kind for kind in SCHEDULES if kind not in ("constant", "piecewise"))
ENDING = tuple(kind for kind in SCHEDULES if SCHEDULES[kind].has_end)


class OtherSchedule(Section):
    """A schedule besides that of the learning rate, from which it takes what is null or absent."""

    effect = Effect.PER_STEP

    kind: Annotated[str, OneOf(SCHEDULES), Later] = Field(
        "constant", description="shape, as in schedule.kind"
    )
    decay_steps: Annotated[Steps | None, OnlyFor(ENDING), Later] = Field(
        None, description="step at which the decay ends; null: that of the learning rate"
    )
    decay_fraction: Annotated[float | None, Field(gt=0, le=1), OnlyFor(LATE), Later] = Field(
        None,
        description="only for wsd and power: share of decay_steps that decays; null: that of the "
        "learning rate",
    )
    points: Annotated[Points, OnlyFor(("piecewise",)), Later] = Field(
        None, description="only for piecewise: factor by step, as in schedule.points"
    )


class WeightDecaySchedule(OtherSchedule):
    """A factor, at first 1, of the weight decay of every group."""

    min_ratio: Annotated[float, OnlyFor(FALLING), Later] = Field(
        0.0, ge=0, le=1, description="lowest factor, 0 to 1"
    )


class MomentumSchedule(OtherSchedule):
    """The momentum after its warmup; its peak is optim.momentum."""

    kind: Annotated[str, OneOf(SCHEDULES), OnlyFor(("muon",), "/optim.kind"), Later] = Field(
        "constant", description="only for muon: shape, as in schedule.kind"
    )
    final: Annotated[float | None, Field(ge=0, lt=1), OnlyFor(FALLING), Later] = Field(
        None, description="momentum at the end of the decay; null: optim.momentum"
    )


class ScheduleSection(Section):
    """The learning rate of every step, and what else changes from step to step."""

    effect = Effect.PER_STEP

    kind: Annotated[str, OneOf(SCHEDULES)] = Field(
        "cosine", description="shape of the learning rate after warmup"
    )
    max_lr: float = Field(6e-4, gt=0, description="peak learning rate")
    min_lr_ratio: Annotated[float, OnlyFor(FALLING)] = Field(
        0.1, ge=0, le=1, description="lowest learning rate as a share of the peak, 0 to 1"
    )
    warmup_steps: Int = Field(0, ge=0, description="steps of linear warmup")
    decay_steps: Annotated[Steps | None, OnlyFor(ENDING, *ANY_KIND)] = Field(
        None, description="step at which the decay ends; null: train.max_steps"
    )
    decay_fraction: Annotated[float, OnlyFor(LATE, *ANY_KIND)] = Field(
        0.2,
        gt=0,
        le=1,
        description="only for wsd and power: share of decay_steps that decays, 0 to 1",
    )
    decay_shape: Annotated[str, OneOf(DECAY_SHAPES), OnlyFor(("wsd",), *ANY_KIND)] = Field(
        "linear", description="only for wsd: shape of the decay"
    )
    exponent: Annotated[float, OnlyFor(("power",), *ANY_KIND), Later] = Field(
        1.2, gt=0, description="only for power: exponent of the decay"
    )
    points: Annotated[Points, OnlyFor(("piecewise",)), Later] = Field(
        None,
        description="only for piecewise: factor of the peak by step, such as {0: 1, 800: 1, 1000: "
        "0.1}, with straight lines between them",
    )
    weight_decay: WeightDecaySchedule = WeightDecaySchedule()
    momentum: MomentumSchedule = MomentumSchedule()
