#!/usr/bin/env python3
"""What stopping trials early saves, and what it loses: the 18-schedule grid on several seeds.

    benchmarks/stopping.py [--seeds 3] [--steps 540] [--layers 2] [--width 64] [--corpus FILE]

The whole grid (three peaks × cosine, linear, constant and wsd with a decay of 10, 20 and 40 %) is run to its end on every
seed, as one tree, together with a probe of every trunk. Training is exact, so what a rule that stops trials would have done
is then read off these same curves: a replay is what would happen. That holds for rungs at which all trials meet; Tune's ASHA
is asynchronous, and what it stops depends on which trial gets to a rung first.

asha: successive halving by a factor of 3 at the rungs that `sweep.stop: asha` has (which refuses such a grid).
anneal_probe: trials whose probe ends more than a margin above the best probe go no further than `--probe-step`. The margin is
the smallest one without regret on the first seed, rounded up to 0.01, and is judged on the others. Each seed is judged by
itself; a sweep of several seeds averages their probes.
regret: final val loss of the best trial that is left, minus that of the best trial of all.

Interrupted, it goes on where it was; run again, it prints its table from what stands in `--storage`.
"""

import math
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sweep import PEAKS, experiment_tree, grid18, markdown, opened, parser, run_tree, start_ray

from orchestrator.cluster.layout import Layout
from orchestrator.config.sweep import SweepSection
from orchestrator.errors import UserError
from orchestrator.runs import lock
from orchestrator.sweep.study import Study, asha_rule
from orchestrator.sweep.tree import Branch, grow
from pipelines.common import at_least, run_command

REDUCTION = 3
EVALUATIONS = 18  # in a run: a ninth, a third and the half of it are among them


@dataclass(frozen=True)
class Grid:
    """What was recorded on one seed, by trial: `curves` {step: val loss}, `finals`, `probes` (the loss of its trunk's probe)."""

    trials: dict[str, Branch]
    peaks: dict[str, float]
    curves: dict[str, dict[int, float]]
    finals: dict[str, float]
    probes: dict[str, float]
    probe_trials: dict[str, Branch]

    @property
    def best(self) -> str:
        return min(self.finals, key=self.finals.get)


# ---- rules, replayed ----
def rungs(first: int, longest: int, reduction: int) -> list[int]:
    """Steps before the end at which successive halving looks."""
    found = []
    while first < longest:
        found.append(first)
        first *= reduction
    return found


def halving(
    curves: Mapping[str, Mapping[int, float]], at: Sequence[int], reduction: int
) -> dict[str, int]:
    """{trial: the rung at which it is stopped}; the others run to their ends. A trial without a loss there is the worst."""
    left, stopped = list(curves), {}
    for rung in at:
        ranked = sorted(left, key=lambda name: curves[name].get(rung, math.inf))
        keep = max(1, len(left) // reduction)
        stopped |= dict.fromkeys(ranked[keep:], rung)
        left = ranked[:keep]
    return stopped


def outside(probes: Mapping[str, float], margin: float) -> list[str]:
    """The trials whose probe ends more than `margin` above the best."""
    least = min(probes.values())
    return [name for name, loss in probes.items() if loss > least + margin]


def least_margin(grid: Grid) -> float:
    """The smallest margin, rounded up to 0.01, that does not drop the best trial."""
    exact = grid.probes[grid.best] - min(grid.probes.values())
    return math.ceil(round(exact * 100, 9)) / 100


def regret(finals: Mapping[str, float], stopped: Collection[str]) -> tuple[float, int]:
    """(loss of the best trial that ran to its end minus the best of all, its rank among all, from 1)."""
    picked = min(loss for name, loss in finals.items() if name not in stopped)
    return picked - min(finals.values()), 1 + sum(loss < picked for loss in finals.values())


def steps_shared(
    trials: Mapping[str, Branch], stopped: Mapping[str, int], more: Collection[Branch] = ()
) -> int:
    """Steps of the tree of trials that end where they were stopped, and of `more`."""
    cut = [replace(t, rates=t.rates[: stopped.get(name, t.steps)]) for name, t in trials.items()]
    return sum(stage.steps for stage in grow([*cut, *more]))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks, ties at their mean rank; NaN where all of one side are equal."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    below, equal = values[:, None] > values[None], values[:, None] == values[None]
    return below.sum(1) + (equal.sum(1) + 1) / 2


# ---- running ----
def study_of(a: Namespace, layout: Layout) -> Study:
    """The grid on every seed, with the probes."""
    section = grid18(a.steps) | {
        "seeds": a.seeds,
        "stop": "anneal_probe",
        "probe_step": a.probe_step or a.steps // 3,
        "probe_steps": a.probe_steps or a.steps // 9,
    }
    every = a.steps // EVALUATIONS
    return opened(
        experiment_tree(
            a,
            "benchmark-stopping",
            section,
            a.steps,
            eval_interval=every,
            checkpoint_interval=a.steps // 3,
        ),
        None,
        layout,
    )


def recorded(study: Study) -> dict[int, Grid]:
    """{seed: what was recorded}."""
    seeds = sorted({c.seed for c in study.trials.values()})
    return {
        seed: _grid(study, [n for n, c in study.trials.items() if c.seed == seed]) for seed in seeds
    }


def _grid(study: Study, names: list[str]) -> Grid:
    """A trial or probe that diverged has an infinite loss."""
    candidates = {name: study.trials[name] for name in names}
    curves = {
        name: {r["step"]: r["val/loss"] for r in study.curve(c) if "val/loss" in r}
        for name, c in candidates.items()
    }
    finals = {name: curves[name].get(c.branch.steps, math.inf) for name, c in candidates.items()}
    probes = {name: study.probes[name] for name in names}
    ends = {
        p.name: {r["step"]: r.get("val/loss") for r in study.curve(p)}.get(p.branch.steps)
        for p in probes.values()
    }
    losses = {
        name: math.inf if ends[p.name] is None else ends[p.name] for name, p in probes.items()
    }
    return Grid(
        {name: c.branch for name, c in candidates.items()},
        {name: c.experiment.schedule.max_lr for name, c in candidates.items()},
        curves,
        finals,
        losses,
        {p.name: p.branch for p in probes.values()},
    )


def asha_rungs(study: Study) -> list[int]:
    """Those of `sweep.stop: asha` on trials of this length."""
    longest = max(trial.branch.steps for trial in study.trials.values())
    rule = asha_rule(study.metric, longest, study.sweep.base.train.eval_interval)
    assert rule.reduction_factor == REDUCTION
    return rungs(rule.grace_period, rule.max_t, REDUCTION)


# ---- the tables ----
def rows(
    grids: Mapping[int, Grid], at: Sequence[int], probe_step: int, margin: float
) -> list[list[Any]]:
    """A line for each rule and seed."""
    fitted, found = next(iter(grids)), []
    default = SweepSection.model_fields["probe_margin"].default
    for rule, allowed in (
        ("none", None),
        ("asha", None),
        ("anneal_probe", margin),
        ("anneal_probe", default),
    ):
        for seed, grid in grids.items():
            stopped, more = {}, ()
            if rule == "asha":
                stopped = halving(grid.curves, at, REDUCTION)
            elif rule == "anneal_probe":
                stopped, more = (
                    dict.fromkeys(outside(grid.probes, allowed), probe_step),
                    grid.probe_trials.values(),
                )
            loss, rank = regret(grid.finals, stopped)
            ran = steps_shared(grid.trials, stopped, more)
            alone, shared = (
                sum(t.steps for t in grid.trials.values()),
                steps_shared(grid.trials, {}),
            )
            note = " (margin chosen here)" if allowed == margin and seed == fitted else ""
            name = (
                rule
                if allowed is None
                else f"{rule}, margin {allowed:.2f}{' (default)' if allowed == default else ''}"
            )
            found.append(
                [
                    name,
                    f"{seed}{note}",
                    f"{loss:.4f}",
                    f"{rank} of {len(grid.finals)}",
                    len(grid.finals) - len(stopped),
                    f"{ran:,}",
                    f"{ran / alone:.2f}",
                    f"{ran / shared:.2f}",
                ]
            )
    return found


def correlations(grids: Mapping[int, Grid], half: int) -> list[list[str]]:
    """A line for each peak: the rank correlation of the losses half-way and at the end, of each seed."""
    return [
        [f"{peak:g}", *(f"{_correlation(grid, half, peak):+.2f}" for grid in grids.values())]
        for peak in PEAKS
    ]


def _correlation(grid: Grid, half: int, peak: float) -> float:
    names = [name for name in grid.finals if grid.peaks[name] == peak]
    return rank_correlation(
        [grid.curves[n].get(half, math.inf) for n in names], [grid.finals[n] for n in names]
    )


def report(a: Namespace, study: Study, grids: Mapping[int, Grid]) -> str:
    at, probe_step = asha_rungs(study), study.sweep.settings.probe_step
    margin = least_margin(next(iter(grids.values())))
    header = [
        "rule",
        "seed",
        "regret, nats",
        "rank of the pick",
        "trials run to the end",
        "steps run",
        "÷ all trials alone",
        "÷ all trials as a tree",
    ]
    first = markdown(header, rows(grids, at, probe_step, margin))
    second = markdown(
        ["peak", *(f"seed {seed}" for seed in grids)], correlations(grids, a.steps // 2)
    )
    return (
        f"{first}\n\n{a.layers} layers × {a.width}, 12 × 64 tokens a step, {a.steps} steps. asha: rungs at "
        f"{', '.join(map(str, at))} steps, factor {REDUCTION}; a replay, with all trials meeting at each rung. anneal_probe: "
        f"at step {probe_step}, {study.sweep.settings.probe_steps} steps long (their steps are in 'steps run'). "
        f"Steps run: every rule shares what its trials have in common.\n\n"
        f"Rank correlation (Spearman) of val loss at step {a.steps // 2} and at the end, within one peak:\n\n{second}"
    )


def main(argv: list[str]) -> int:
    p = parser(__doc__, layers=2, width=64, eval_tokens=16384)
    p.add_argument(
        "--steps",
        type=at_least(EVALUATIONS),
        default=540,
        help=f"of every trial, a multiple of {EVALUATIONS}",
    )
    p.add_argument("--seeds", type=at_least(1), default=3)
    p.add_argument(
        "--probe-step", type=at_least(1), default=None, help="default: a third of the steps"
    )
    p.add_argument(
        "--probe-steps",
        type=at_least(1),
        default=None,
        help="length of a probe; default: a ninth of the steps",
    )
    a = p.parse_args(argv)
    if a.steps % EVALUATIONS:
        raise UserError(
            f"--steps {a.steps}: give a multiple of {EVALUATIONS}, so that every rung is an evaluation"
        )
    start_ray(a.cpus)
    study = study_of(a, Layout(1, 1, False))
    with lock.held(study.folder.driver_lock):
        print(
            f"{study.tree.steps_to_run:,} of {study.tree.steps_in_tree:,} steps to run, in {study.folder.path}",
            flush=True,
        )
        run_tree(
            study,
            lambda stage: print(f"{study.progress.steps_run:,} steps run", end="\r", flush=True),
            judge=False,
        )
    print("\n" + report(a, study, recorded(study)))
    return 0


if __name__ == "__main__":
    run_command(main)
