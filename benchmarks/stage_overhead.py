#!/usr/bin/env python3
"""Measure what a stage of a sweep costs besides its steps.

    benchmarks/stage_overhead.py [--workers 1|2] [--stages 6] [--seconds 3] [--chains 1]
                                 [--corpus FILE] [--rounds 5]

The cost is (seconds of N stages - seconds of the same steps in one stage) / (N - 1). Each round
runs the same trials twice, as a chain of N stages of about `--seconds` each and as one stage; the
two take turns in being first. The time of a chain is measured from the first line of its journal,
step 0, to the end of its last stage, so the start of its process does not count. The cost has all
parts of a stage: the round trip to Tune, reading the parent's checkpoint, building the model and
the evaluation sets, and the checkpoint at the end. The part outside of `run_stage` is measured
separately, as the time between two ends minus the `seconds` in the later stage's result.json. With
`--chains 2`, two chains run side by side, each in its own process, and share the machine with the
driver. There is no tracking.
"""

import statistics
import tempfile
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sweep import experiment_tree, markdown, opened, parser, run_tree, spread, start_ray

from orchestrator.cluster.layout import Layout
from orchestrator.errors import UserError
from orchestrator.runs import journal
from orchestrator.runs.storage import storage_root
from orchestrator.sweep.study import Study
from orchestrator.sweep.tree import StageTree, grow
from pipelines.common import run_command
from pipelines.options import at_least

CALIBRATION_STEPS = 60
WINDOW = 20  # steps between two log lines


def chains_tree(a: Namespace, steps: int) -> dict[str, Any]:
    """Return the configuration of a sweep: `--chains` trials that share no step."""
    section = {"grid": {"schedule.max_lr": [1e-3 / (n + 1) for n in range(a.chains)]}}
    tree = experiment_tree(
        a,
        "benchmark-stages",
        section,
        steps,
        eval_interval=steps,
        checkpoint_interval=None,
        log_interval=WINDOW,
        micro_batch_size=12 // a.workers,
        reduction_slots=a.workers,
    )
    return tree | {"schedule": {"kind": "constant"}}


def cut(study: Study, length: int) -> Study:
    """Cut each trial of a study into stages of `length` steps."""
    trials = study.tree.branches
    cuts = {t.name: range(length, t.steps, length) for t in trials}
    study.tree = StageTree(trials, tuple(grow(trials, cuts)))
    return study


def measure(study: Study) -> tuple[float, float]:
    """Run a study; return the seconds of a chain, and those between two stages, as means."""
    ended: dict[str, float] = {}
    progress, _ = run_tree(study, lambda stage: ended.update({stage.id: time.time()}))
    spans: list[float] = []
    gaps: list[float] = []
    for name in study.trials:
        path = study.tree.stages_of(name)
        first = journal.read(progress.folder.stage(path[0].id))[0]["timestamp"] / 1000
        spans.append(ended[path[-1].id] - first)
        gaps += [
            ended[s.id] - ended[before.id] - progress.stored.results[s.id].seconds
            for before, s in pairwise(path)
        ]
    return statistics.mean(spans), statistics.mean(gaps or [0.0])


def step_seconds(a: Namespace, layout: Layout, place: Path) -> float:
    """Return the seconds of a step; the first log window is left out, because of the warm-up."""
    study = opened(chains_tree(a, CALIBRATION_STEPS), place / "calibration", layout)
    run_tree(study)
    lines = [line for trial in study.trials.values() for line in study.curve(trial)]
    return statistics.median(line["perf/step_time_s"] for line in lines if line["step"] > WINDOW)


def per_stage(many: float, one: float, stages: int) -> float:
    """Return the cost of a stage.

    Args:
        many: Seconds of a chain of stages.
        one: Seconds of the same steps in one stage.
        stages: Number of stages in the chain.
    """
    return (many - one) / (stages - 1)


def one_round(
    a: Namespace, layout: Layout, place: Path, length: int, many_first: bool
) -> tuple[float, float]:
    """Return the cost of a stage, and its part outside of `run_stage`; uses folders in `place`."""
    found = {}
    sides = ("many", "one") if many_first else ("one", "many")
    for side in sides:
        study = opened(chains_tree(a, length * a.stages), place / side, layout)
        found[side] = measure(cut(study, length) if side == "many" else study)
    (many, gap), (one, _) = found["many"], found["one"]
    return per_stage(many, one, a.stages), gap


def main(argv: list[str]) -> int:
    p = parser(__doc__, layers=4, width=128, eval_tokens=16384)
    p.add_argument("--workers", type=int, choices=(1, 2, 4), default=1, help="workers of a stage")
    p.add_argument("--stages", type=at_least(2), default=6, help="stages of a chain")
    p.add_argument("--seconds", type=at_least(0.1), default=3.0, help="time of a stage's steps")
    p.add_argument(
        "--steps", type=at_least(1), default=None, help="steps of a stage, instead of --seconds"
    )
    p.add_argument("--chains", type=at_least(1), default=1, help="chains that run side by side")
    p.add_argument("--rounds", type=at_least(1), default=5)
    a = p.parse_args(argv)
    if a.chains * a.workers > a.cpus:
        raise UserError(
            f"--chains {a.chains} with --workers {a.workers} need {a.chains * a.workers} CPUs, but "
            f"--cpus is {a.cpus}; lower one or raise --cpus"
        )
    layout = Layout(a.workers, 1, False)
    start_ray(a.cpus)
    study = opened(chains_tree(a, CALIBRATION_STEPS), None, layout)  # prepares the tokens
    storage = storage_root(study.sweep.base)
    costs = []
    with tempfile.TemporaryDirectory(dir=storage) as place:
        step = step_seconds(a, layout, Path(place))
    length = a.steps or max(1, round(a.seconds / step))
    for number in range(a.rounds):
        with tempfile.TemporaryDirectory(dir=storage) as place:
            costs.append(one_round(a, layout, Path(place), length, many_first=number % 2 == 0))
        cost, gap = costs[-1]
        line = f"round {number + 1}: {cost:.3f} s a stage, {gap:.3f} s of it outside of run_stage"
        print(line, flush=True)
    print("\n" + report(a, step, length, costs))
    return 0


def report(a: Namespace, step: float, length: int, costs: list[tuple[float, float]]) -> str:
    whole, outside = zip(*costs, strict=True)
    header = [
        "workers",
        "chains",
        "stages × steps",
        "a stage's steps, s",
        "cost of a stage, s",
        "of it outside of run_stage, s",
    ]
    row = [
        a.workers,
        a.chains,
        f"{a.stages} × {length}",
        f"{length * step:.2f}",
        spread(whole, 3),
        spread(outside, 3),
    ]
    return (
        f"{markdown(header, [row])}\n\n{a.layers} layers × {a.width}, 12 × 64 tokens a step, "
        f"{step * 1e3:.1f} ms a step, {a.cpus} CPUs; {len(costs)} round(s), median (range); no "
        "tracking."
    )


if __name__ == "__main__":
    run_command(main)
