"""One dimension of a search space: `sweep.space`'s words for a field in, what can be drawn from it out.

A draw is a function of (seed, number of the sample, field) and of nothing else: more samples, or another field beside it,
leave it as it is, on every machine.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config.experiment import field_docs, field_value
from orchestrator.config.messages import shown
from orchestrator.errors import UserError

RANGE = ("low", "high", "log", "step")
DIGITS = (
    6  # of a drawn number: short in names and files, far finer than what a sweep can tell apart
)


@dataclass(frozen=True)
class Choices:
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """`low` to `high`, both included. `log`: even in the logarithm. `step`: only low, low + step, …"""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False


def dimension(key: str, words: list | Mapping[str, Any]) -> Choices | Range:
    """What `sweep.space` says of the field `key`. Raises UserError, a line per mistake, each opening with `key`."""
    return Choices(values_of(key, words)) if isinstance(words, list) else _range(key, words)


def values_of(key: str, values: list) -> tuple[Any, ...]:
    """The values as the field holds them. Raises UserError for wrong ones and for one given twice."""
    found, problems = [], []
    for value in values:
        try:
            own = field_value(key, value)
        except UserError as error:
            problems.append(str(error))
            continue
        if own in found:
            problems.append(f"{key}: {shown(value)} is given twice")
        found.append(own)
    if problems:
        raise UserError("\n".join(problems))
    return tuple(found)


def _range(key: str, words: Mapping[str, Any]) -> Range:
    kind = field_docs()[key].type
    if not kind.startswith(("an integer", "a number")):
        raise UserError(
            f"{key}: a range is for numbers and the field is {kind}; give a list of choices"
        )
    for name in words:
        if name not in RANGE:
            raise UserError(f"{key}: a range has {', '.join(RANGE)}, and no {shown(name)}")
    for name in ("low", "high"):
        if words.get(name) is None:
            raise UserError(f"{key}: a range needs low and high, and {name} is missing")
    low, high = field_value(key, words["low"]), field_value(key, words["high"])
    log, step, integer = words.get("log", False), words.get("step"), kind.startswith("an integer")
    if low >= high:
        raise UserError(f"{key}: low={shown(low)} is not below high={shown(high)}")
    if not isinstance(log, bool):
        raise UserError(f"{key}: log={shown(log)} is not true or false")
    if log and low <= 0:
        raise UserError(
            f"{key}: low={shown(low)} has no logarithm; with log: true low must be above 0"
        )
    return Range(
        low,
        high,
        log,
        None if step is None else _step(key, step, high - low, log, integer),
        integer,
    )


def _step(key: str, step: Any, width: float, log: bool, integer: bool) -> float:
    if log:
        raise UserError(
            f"{key}: step={shown(step)} and log: true exclude each other; leave one out"
        )
    if (
        isinstance(step, bool)
        or not isinstance(step, int | float)
        or not 0 < step <= width * (1 + 1e-9)
    ):
        raise UserError(
            f"{key}: step={shown(step)} is not a number above 0 and at most high - low = {width:g}"
        )
    if integer and step != int(step):
        raise UserError(
            f"{key}: step={shown(step)} is not whole, and the field is {field_docs()[key].type}"
        )
    return int(step) if integer else float(step)


def draw(seed: int, number: int, dimensions: Mapping[str, Choices | Range]) -> dict[str, Any]:
    """The values of random sample `number`, 0-based, of the sweep whose `train.seed` is `seed`."""
    return {
        key: pick(one, random.Random(f"{seed}/{number}/{key}").random())
        for key, one in dimensions.items()
    }


def pick(one: Choices | Range, share: float) -> Any:
    """The value that lies at `share`, 0 <= share < 1, of the dimension.

    >>> pick(Range(1, 10_000, log=True), 0.5), pick(Range(0, 1, step=0.25), 0.99), pick(Choices(("a", "b")), 0.5)
    (100.0, 1.0, 'b')
    """
    if isinstance(one, Choices):
        return one.values[int(share * len(one.values))]
    if one.step:
        count = math.floor((one.high - one.low) / one.step + 1e-9) + 1
        value = one.low + int(share * count) * one.step
        return value if one.integer else min(float(f"{value:.12g}"), one.high)
    high = (
        one.high + 1 if one.integer else one.high
    )  # every integer has a stretch of its own, the last one too
    if one.log:
        value = math.exp(math.log(one.low) + share * (math.log(high) - math.log(one.low)))
    else:
        value = one.low + share * (high - one.low)
    value = math.floor(value) if one.integer else float(f"{value:.{DIGITS}g}")
    return min(max(value, one.low), one.high)
