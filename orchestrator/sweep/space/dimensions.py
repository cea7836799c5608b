"""One dimension of `sweep.space`: what its words mean, and random draws from it.

A draw depends only on (seed, number of the sample, field). More samples, or another field beside
this one, do not change it, on any machine.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.models import DEFAULT
from orchestrator.config.experiment import field_docs, field_value
from orchestrator.config.messages import shown
from orchestrator.errors import UserError

RANGE_WORDS = ("low", "high", "log", "step")
DIGITS = 6  # of a drawn number: few enough for names, and much finer than any effect on the loss


@dataclass(frozen=True)
class Choices:
    """A list of values."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        log: Uniform in the logarithm.
        step: Only low, low + step and so on.
        integer: Only integers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False


def dimension(
    key: str, words: list[Any] | Mapping[str, Any], model: str = DEFAULT
) -> Choices | Range:
    """Return what `sweep.space` says about a field.

    Args:
        key: The field.
        words: Its values or its range.
        model: Kind of the model.

    Raises:
        UserError: One line for each mistake; each starts with the key.
    """
    if isinstance(words, list):
        return Choices(values_of(key, words, model))
    return _range(key, words, model)


def values_of(key: str, values: list[Any], model: str = DEFAULT) -> tuple[Any, ...]:
    """Return the values as the field stores them; see `dimension`.

    Raises:
        UserError: One line for each wrong value, and for each that is given twice.
    """
    found: list[Any] = []
    problems = []
    for value in values:
        try:
            stored = field_value(key, value, model)
        except UserError as error:
            problems.append(str(error))
            continue
        if stored in found:
            problems.append(f"{key}: {shown(value)} is given twice")
        found.append(stored)
    if problems:
        raise UserError("\n".join(problems))
    return tuple(found)


def _range(key: str, words: Mapping[str, Any], model: str) -> Range:
    kind = field_docs(model)[key].type
    integer = kind.startswith("an integer")
    if not integer and not kind.startswith("a number"):
        raise UserError(
            f"{key}: a range is for numbers and the field is {kind}; give a list of choices"
        )
    for name in words:
        if name not in RANGE_WORDS:
            raise UserError(f"{key}: a range has {', '.join(RANGE_WORDS)}, and no {shown(name)}")
    for name in ("low", "high"):
        if words.get(name) is None:
            raise UserError(f"{key}: a range needs low and high, and {name} is missing")
    low = field_value(key, words["low"], model)
    high = field_value(key, words["high"], model)
    log = words.get("log", False)
    if low >= high:
        raise UserError(f"{key}: low={shown(low)} is not below high={shown(high)}")
    if not isinstance(log, bool):
        raise UserError(f"{key}: log={shown(log)} is not true or false")
    if log and low <= 0:
        raise UserError(
            f"{key}: low={shown(low)} has no logarithm; with log: true low must be above 0"
        )
    found = Range(low, high, log, None, integer)
    if words.get("step") is None:
        return found
    return Range(low, high, log, _step(key, words["step"], found), integer)


def _step(key: str, step: Any, range_: Range) -> float:
    if range_.log:
        raise UserError(f"{key}: step={shown(step)} and log: true exclude each other; drop one")
    width = range_.high - range_.low
    is_number = isinstance(step, int | float) and not isinstance(step, bool)
    # 0.3 - 0.1 is a little less than 0.2.
    if not is_number or not 0 < step <= width * (1 + 1e-9):
        raise UserError(
            f"{key}: step={shown(step)} is not a number above 0 and at most high - low = {width:g}"
        )
    if not range_.integer:
        return float(step)
    if step != int(step):
        raise UserError(f"{key}: step={shown(step)} is not whole, and the field is an integer")
    return int(step)


def draw(seed: int, number: int, dimensions: Mapping[str, Choices | Range]) -> dict[str, Any]:
    """Return the values of a random sample.

    Args:
        seed: `train.seed` of the sweep.
        number: Number of the sample, 0-based.
        dimensions: By field.
    """
    values = {}
    for key, one in dimensions.items():
        share = random.Random(f"{seed}/{number}/{key}").random()
        values[key] = pick(one, share)
    return values


def pick(dimension: Choices | Range, share: float) -> Any:
    """Return the value at `share`, 0 <= share < 1, of a dimension.

    >>> pick(Range(1, 10_000, log=True), 0.5), pick(Range(0, 1, step=0.25), 0.99)
    (100.0, 1.0)
    """
    if isinstance(dimension, Choices):
        return dimension.values[int(share * len(dimension.values))]
    low = dimension.low
    high = dimension.high
    if dimension.step:
        count = math.floor((high - low) / dimension.step + 1e-9) + 1
        value = low + int(share * count) * dimension.step
        return value if dimension.integer else min(float(f"{value:.12g}"), high)

    # Every integer has an interval of its own, also the last one.
    end = high + 1 if dimension.integer else high
    if dimension.log:
        value = math.exp(math.log(low) + share * (math.log(end) - math.log(low)))
    else:
        value = low + share * (end - low)
    value = math.floor(value) if dimension.integer else float(f"{value:.{DIGITS}g}")
    return min(max(value, low), high)
