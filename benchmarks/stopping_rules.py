"""Which trials a rule stops, what that saves, and what it loses; computed from whole curves."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

from orchestrator.sweep.branch import Branch
from orchestrator.sweep.tree import grow


@dataclass(frozen=True)
class Grid:
    """Results of one seed, by the name of the trial.

    Attributes:
        trials: The trials.
        peaks: Peak learning rates.
        curves: Val loss by step.
        finals: Final val losses.
        probes: Final losses of the probes.
        probe_trials: The probes, by their own names.
    """

    trials: dict[str, Branch]
    peaks: dict[str, float]
    curves: dict[str, dict[int, float]]
    finals: dict[str, float]
    probes: dict[str, float]
    probe_trials: dict[str, Branch]

    @property
    def best(self) -> str:
        return min(self.finals, key=self.finals.get)


# ---- stopping rules ----
def rungs(first: int, longest: int, reduction: int) -> list[int]:
    """Return the steps at which successive halving stops trials."""
    found = []
    while first < longest:
        found.append(first)
        first *= reduction
    return found


def halving(
    curves: Mapping[str, Mapping[int, float]], at: Sequence[int], reduction: int
) -> dict[str, int]:
    """Return the rung at which each stopped trial stops. A trial without a loss is the worst."""
    left = list(curves)
    stopped: dict[str, int] = {}
    for rung in at:
        ranked = sorted(left, key=lambda name: curves[name].get(rung, math.inf))
        keep = max(1, len(left) // reduction)
        stopped |= dict.fromkeys(ranked[keep:], rung)
        left = ranked[:keep]
    return stopped


def outside(probes: Mapping[str, float], margin: float) -> list[str]:
    """Return the trials whose probe ends more than `margin` above the best."""
    least = min(probes.values())
    return [name for name, loss in probes.items() if loss > least + margin]


def least_margin(grid: Grid) -> float:
    """Return the smallest margin, rounded up to 0.01, that does not drop the best trial."""
    exact = grid.probes[grid.best] - min(grid.probes.values())
    return math.ceil(round(exact * 100, 9)) / 100


def regret(finals: Mapping[str, float], stopped: Collection[str]) -> tuple[float, int]:
    """Return how much worse the best trial that is left is than the best of all, and its rank."""
    picked = min(loss for name, loss in finals.items() if name not in stopped)
    rank = 1 + sum(loss < picked for loss in finals.values())
    return picked - min(finals.values()), rank


def steps_shared(
    trials: Mapping[str, Branch], stopped: Mapping[str, int], more: Collection[Branch] = ()
) -> int:
    """Return the steps of the tree of trials that end where they are stopped, and of `more`."""
    cut = [t.first(stopped.get(name, t.steps)) for name, t in trials.items()]
    return sum(stage.steps for stage in grow([*cut, *more]))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN if all values of one side are equal."""
    if len(set(a)) == 1 or len(set(b)) == 1:
        return math.nan
    return float(spearmanr(a, b).statistic)
