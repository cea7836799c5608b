"""Rank the settings of a sweep, and find the differences that its seeds cannot tell from chance.

Input: one `Row` per trial. Output: `Setting`s in order. A lower metric is better.

The rule for ties. The seed decides the order of the samples and the first weights. It often changes
the loss more than a setting does, and it changes the loss of all settings in a similar way. So each
setting is compared with the best one seed by seed, with the two-sided paired t-test of the
differences d_s = final(setting, s) - final(best, s) over the seeds that both have ("Student",
Biometrika 6, 1908). With one seed the spread is unknown, and only equal values tie.

Of n equal settings, one is the lowest by chance, and 5 % of the others would seem worse. So the
error of a whole ranking is held at 5 %: Holm's rule (Scandinavian Journal of Statistics 6, 1979)
over all n (n - 1) / 2 pairs, because any of them could have become the pair with the best. A tie
does not mean that two settings are equal: more seeds may tell them apart. Losses are computed in
float32, so a difference of one float32 rounding is none.

A setting has a rank only when all of its seeds have a result. Otherwise a setting whose bad seeds
failed would look better than it is.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, NamedTuple

ERROR = 0.05  # probability that a ranking calls any of equal settings worse, at most
ROUNDING = 2.0**-23  # of a float32
WORST_FIRST = ("failed", "diverged", "blocked", "stopped", "running", "waiting")


@dataclass(frozen=True)
class Row:
    """Outcome of one trial: a row of comparison.csv.

    Attributes:
        trial: Name of the trial.
        setting: Name of the trial without its seed.
        seed: `train.seed` of the trial.
        fields: Values of the fields that the sweep varies, by `section.field`.
        steps: Length of the trial.
        state: A state of `sweep.states`.
        metric: Name of the metric that the sweep compares.
        final: Last value of the metric; None unless the trial is done.
        best: Lowest value of the metric so far.
        val_bits_per_byte: Last value; None unless the trial is done.
        train_loss: Last value.
        weights_sha256: Hash of the final weights; None unless the trial is done.
        reason: Why the trial has no result.
    """

    trial: str
    setting: str
    seed: int
    fields: Mapping[str, Any]
    steps: int
    state: str
    metric: str
    final: float | None
    best: float | None = None
    val_bits_per_byte: float | None = None
    train_loss: float | None = None
    weights_sha256: str | None = None
    reason: str | None = None

    @property
    def has_result(self) -> bool:
        """Whether the trial is done with a finite final value."""
        return self.state == "done" and self.final is not None and math.isfinite(self.final)


@dataclass(frozen=True)
class Setting:
    """Outcome of one setting over its seeds.

    Attributes:
        name: Name of the setting.
        trials: One row per seed.
        rank: 1 is the best; equal means share a rank. None if a seed has no result.
        ties: Whether the seeds cannot tell it from the best; False for the best itself.
    """

    name: str
    trials: list[Row]
    rank: int | None = None
    ties: bool = False

    @cached_property
    def values(self) -> dict[int, float]:
        """Final value of each seed that has a result, by seed."""
        found = {row.seed: row.final for row in self.trials if row.has_result}
        return {seed: value for seed, value in sorted(found.items()) if value is not None}

    @property
    def mean(self) -> float:
        """Mean of the final values; infinite without any."""
        return fmean(self.values.values()) if self.values else math.inf

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of the final values; None below two."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def state(self) -> str:
        """State of the worst trial."""
        states = {row.state for row in self.trials}
        return next((state for state in WORST_FIRST if state in states), "done")

    @property
    def reason(self) -> str | None:
        """Why the worst trials have no result, and how many they are."""
        if self.state == "done":
            complete = len(self.values) == len(self.trials)
            return None if complete else f"no finite {self.trials[0].metric}"
        worst = [row for row in self.trials if row.state == self.state]
        parts = []
        if len(self.trials) > 1:
            parts.append(f"{len(worst)} of {len(self.trials)} seeds")
        parts += [row.reason for row in worst if row.reason][:1]
        return ": ".join(parts) or None


def rank(rows: Iterable[Row]) -> list[Setting]:
    """Return all settings, the best first.

    Settings without a rank come last, those with some results before those without any.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setting, []).append(row)
    settings = [Setting(name, group) for name, group in groups.items()]
    settings.sort(key=lambda s: s.mean)
    complete = [s for s in settings if len(s.values) == len(s.trials)]
    incomplete = [s for s in settings if len(s.values) < len(s.trials)]

    means = [s.mean for s in complete]
    ranked = [replace(s, rank=means.index(s.mean) + 1) for s in complete]
    if ranked:
        best, *others = ranked
        ties = _ties(best, others)
        ranked = [best, *(replace(s, ties=s.name in ties) for s in others)]
    return ranked + incomplete


def _ties(best: Setting, others: list[Setting]) -> set[str]:
    """Return the names of the settings that the seeds cannot tell from the best, by Holm's rule."""
    p_values = {s.name: p_value(s.values, best.values) for s in others}
    pairs = len(others) * (len(others) + 1) // 2
    ties = set(p_values)
    for number, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > ERROR / (pairs - number):
            break
        ties.discard(name)
    return ties


def p_value(values: Mapping[int, float], best: Mapping[int, float]) -> float:
    """Return the p-value of the paired t-test; 1 if the seeds cannot tell; see the module's rule.

    Args:
        values: Final values of a setting, by seed.
        best: Final values of the best setting, by seed.
    """
    if len(values) == len(best) == 1:
        return float(list(values.values()) == list(best.values()))
    common = sorted(values.keys() & best.keys())
    if len(common) < 2:
        return 1.0
    # Imported here because scipy takes half a second, and a sweep with one seed does not need it.
    from scipy.special import stdtr  # what scipy.stats.t.cdf computes; loads in half the time

    differences = [values[seed] - best[seed] for seed in common]
    mean = abs(fmean(differences))
    if mean <= ROUNDING * max(abs(best[seed]) for seed in common):
        return 1.0
    standard_error = stdev(differences) / math.sqrt(len(common))
    if standard_error == 0.0:
        return 0.0
    return 2 * float(stdtr(len(common) - 1, -mean / standard_error))


class Best(NamedTuple):
    """The best trial and its final loss."""

    trial: str
    loss: float


def lowest(losses: Mapping[str, float | None]) -> Best | None:
    """Return the trial with the lowest loss; None if no loss is known."""
    known = [(loss, name) for name, loss in losses.items() if loss is not None]
    if not known:
        return None
    loss, name = min(known)
    return Best(name, loss)
