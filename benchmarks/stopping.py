#!/usr/bin/env python3
"""Measure what stopping trials early saves and loses, on the 18-schedule grid with several seeds.

    benchmarks/stopping.py [--seeds 3] [--steps 540] [--layers 2] [--width 64] [--corpus FILE]

The whole grid (three peaks × cosine, linear, constant and wsd with a decay of 10, 20 and 40 %) is
trained to its end with every seed, as one tree, together with all probes. Training is exact, so the
decisions of a stopping rule can be computed from these curves. This assumes that all trials reach a
rung before a decision. Tune's ASHA is asynchronous: its decisions depend on which trial reports
first.

asha: successive halving by a factor of 3 at the rungs of `sweep.stop: asha` (which refuses this
grid).
anneal_probe: a trial whose probe ends more than a margin above the best probe stops at
`--probe-step`. The margin is the smallest one without regret on the first seed, rounded up to 0.01;
the other seeds test it. Each seed is judged alone, while a sweep of several seeds averages their
probes.
regret: final val loss of the best trial that is left, minus that of the best trial of all.

If it is interrupted, run it again: it resumes, and prints the table from the results in
`--storage`.
"""

import math
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stopping_rules import (
    Grid,
    halving,
    least_margin,
    outside,
    rank_correlation,
    regret,
    rungs,
    steps_shared,
)
from studies import PEAKS, experiment_tree, grid18, markdown, opened, parser, run_tree, start_ray

from orchestrator.cluster.layout import Layout
from orchestrator.config.sweep import SweepSection
from orchestrator.errors import UserError
from orchestrator.runs import lock
from orchestrator.sweep.branch import Branch
from orchestrator.sweep.study import Study
from orchestrator.sweep.tree import Stage
from orchestrator.sweep.tune import ASHA_REDUCTION, asha_first_rung
from pipelines.common import run_command
from pipelines.options import at_least

EVALUATIONS = 18  # of a run; a ninth, a third and a half of its steps are among them


# ---- running ----
def study_of(a: Namespace, layout: Layout) -> Study:
    """Plan the grid with every seed, and the probes."""
    section = grid18(a.steps) | {
        "seeds": a.seeds,
        "stop": "anneal_probe",
        "probe_step": a.probe_step or a.steps // 3,
        "probe_steps": a.probe_steps or a.steps // 9,
    }
    every = a.steps // EVALUATIONS
    intervals = {"eval_interval": every, "checkpoint_interval": a.steps // 3}
    tree = experiment_tree(a, "benchmark-stopping", section, a.steps, **intervals)
    return opened(tree, None, layout)


def recorded(study: Study) -> dict[int, Grid]:
    """Return the results of each seed."""
    seeds = sorted({c.seed for c in study.trials.values()})
    return {
        seed: _grid(study, [n for n, c in study.trials.items() if c.seed == seed]) for seed in seeds
    }


def _grid(study: Study, names: list[str]) -> Grid:
    """Return the results of one seed. The loss of a trial or probe that diverged is infinite."""
    candidates = {name: study.trials[name] for name in names}
    curves = {
        name: {r["step"]: r["val/loss"] for r in study.curve(c) if "val/loss" in r}
        for name, c in candidates.items()
    }
    finals = {name: curves[name].get(c.branch.steps, math.inf) for name, c in candidates.items()}
    probes = {name: study.probes[name] for name in names}
    probe_finals = {}
    for probe in probes.values():
        losses = {r["step"]: r["val/loss"] for r in study.curve(probe) if "val/loss" in r}
        probe_finals[probe.name] = losses.get(probe.branch.steps, math.inf)
    return Grid(
        trials={name: c.branch for name, c in candidates.items()},
        peaks={name: c.experiment.schedule.max_lr for name, c in candidates.items()},
        curves=curves,
        finals=finals,
        probes={name: probe_finals[probe.name] for name, probe in probes.items()},
        probe_trials={probe.name: probe.branch for probe in probes.values()},
    )


def asha_rungs(study: Study) -> list[int]:
    """Return the rungs of `sweep.stop: asha` for trials of this length."""
    longest = max(trial.branch.steps for trial in study.trials.values())
    first = asha_first_rung(longest, study.sweep.base.train.eval_interval)
    return rungs(first, longest, ASHA_REDUCTION)


# ---- the tables ----
def rows(
    grids: Mapping[int, Grid], at: Sequence[int], probe_step: int, margin: float
) -> list[list[Any]]:
    """Return a line for each rule and seed.

    Args:
        grids: Results of each seed.
        at: Rungs of asha.
        probe_step: Step of the probes.
        margin: Margin that was chosen on the first seed.
    """
    default = SweepSection.model_fields["probe_margin"].default
    fitted = next(iter(grids))
    lines = [_row("none", seed, grid, {}) for seed, grid in grids.items()]
    for seed, grid in grids.items():
        lines.append(_row("asha", seed, grid, halving(grid.curves, at, ASHA_REDUCTION)))
    for allowed in (margin, default):
        rule = f"anneal_probe, margin {allowed:.2f}" + (" (default)" if allowed == default else "")
        for seed, grid in grids.items():
            stopped = dict.fromkeys(outside(grid.probes, allowed), probe_step)
            chosen = allowed == margin and seed == fitted
            note = f"{seed} (margin chosen here)" if chosen else seed
            lines.append(_row(rule, note, grid, stopped, grid.probe_trials.values()))
    return lines


def _row(
    rule: str,
    seed: int | str,
    grid: Grid,
    stopped: Mapping[str, int],
    probes: Collection[Branch] = (),
) -> list[Any]:
    loss, rank = regret(grid.finals, stopped)
    steps = steps_shared(grid.trials, stopped, probes)
    alone = sum(trial.steps for trial in grid.trials.values())
    return [
        rule,
        str(seed),
        f"{loss:.4f}",
        f"{rank} of {len(grid.finals)}",
        len(grid.finals) - len(stopped),
        f"{steps:,}",
        f"{steps / alone:.2f}",
        f"{steps / steps_shared(grid.trials, {}):.2f}",
    ]


def correlations(grids: Mapping[int, Grid], half: int) -> list[list[str]]:
    """Return a line per peak: rank correlation of the losses half-way and at the end, per seed."""
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
    at = asha_rungs(study)
    settings = study.sweep.settings
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
    first = markdown(header, rows(grids, at, settings.probe_step, margin))
    second = markdown(
        ["peak", *(f"seed {seed}" for seed in grids)], correlations(grids, a.steps // 2)
    )
    return (
        f"{first}\n\n{a.layers} layers × {a.width}, 12 × 64 tokens a step, {a.steps} steps. "
        f"asha: rungs at {', '.join(map(str, at))} steps, factor {ASHA_REDUCTION}, "
        f"computed from the curves. anneal_probe: at step {settings.probe_step}, "
        f"{settings.probe_steps} steps long; "
        "'steps run' includes the probes. With every rule, trials share their common steps.\n\n"
        f"Rank correlation (Spearman) of val loss at step {a.steps // 2} and at the end, for each "
        f"peak:\n\n{second}"
    )


def main(argv: list[str]) -> int:
    p = parser(__doc__, layers=2, width=64, eval_tokens=16384)
    p.add_argument(
        "--steps",
        type=at_least(EVALUATIONS),
        default=540,
        help=f"steps of every trial, a multiple of {EVALUATIONS}",
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
            f"--steps {a.steps}: give a multiple of {EVALUATIONS}, so that rungs have evaluations"
        )
    start_ray(a.cpus)
    study = study_of(a, Layout(1, 1, False))
    with lock.held(study.folder.driver_lock):
        tree = study.tree
        folder = study.folder.path
        print(f"{tree.steps_to_run:,} of {tree.steps_in_tree:,} steps to run, in {folder}")

        def print_progress(stage: Stage) -> None:
            print(f"{study.progress.steps_run:,} steps run", end="\r", flush=True)

        run_tree(study, print_progress, judge=False)
    print("\n" + report(a, study, recorded(study)))
    return 0


if __name__ == "__main__":
    run_command(main)
