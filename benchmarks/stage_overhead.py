#!/usr/bin/env python3
"""What a stage of a sweep costs besides its steps: (seconds of N stages - seconds of the same steps in one) / (N - 1).

    benchmarks/stage_overhead.py [--workers 1|2] [--stages 6] [--seconds 3] [--chains 1] [--corpus FILE] [--rounds 5]

Each round runs the same trials twice, as a chain of N stages of about `--seconds` each and as one stage, taking turns in
going first. The seconds of a chain go from the first line of its journal, step 0, to the end of its last stage, so that
the start of its process is in neither. What is left is all that a stage brings: Tune's round trip, reading the parent's
checkpoint, building the model, evaluation sets, the checkpoint at its end. The part outside of `run_stage` is measured by
itself, as the time between two ends less the `seconds` of the later stage's result.json. With `--chains 2`, as many run side
by side, in a process each, and share the machine with each other and with the driver. Without tracking.
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
from pipelines.common import at_least, run_command

CALIBRATION_STEPS, WINDOW = 60, 20


def chains_tree(a: Namespace, steps: int) -> dict[str, Any]:
    """A sweep's file: `--chains` trials of `steps` steps that share none."""
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
    """`study`, each of whose trials now is a chain of stages of `length` steps."""
    trials = study.tree.branches
    study.tree = StageTree(
        trials, tuple(grow(trials, {t.name: range(length, t.steps, length) for t in trials}))
    )
    return study


def measure(study: Study) -> tuple[float, float]:
    """Run it; seconds of a chain, and of these the ones between two stages, outside of `run_stage`: means over the chains."""
    ended: dict[str, float] = {}
    progress, _ = run_tree(study, lambda stage: ended.update({stage.id: time.time()}))
    spans, gaps = [], []
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
    """Seconds of a step as these workers make it, the first window, which holds the warm-up, left out."""
    study = opened(chains_tree(a, CALIBRATION_STEPS), place / "calibration", layout)
    run_tree(study)
    lines = [line for c in study.trials.values() for line in study.curve(c)]
    return statistics.median(line["perf/step_time_s"] for line in lines if line["step"] > WINDOW)


def per_stage(many: float, one: float, stages: int) -> float:
    """Of `many` seconds of `stages` stages and `one` of the same steps in one stage: what a stage after the first costs."""
    return (many - one) / (stages - 1)


def one_round(
    a: Namespace, layout: Layout, place: Path, length: int, many_first: bool
) -> tuple[float, float]:
    """(cost of a stage, of it outside of run_stage), in new folders of `place`."""
    found = {}
    for side in ("many", "one") if many_first else ("one", "many"):
        study = opened(chains_tree(a, length * a.stages), place / side, layout)
        found[side] = measure(cut(study, length) if side == "many" else study)
    (many, gap), (one, _) = found["many"], found["one"]
    return per_stage(many, one, a.stages), gap


def main(argv: list[str]) -> int:
    p = parser(__doc__, layers=4, width=128, eval_tokens=16384)
    p.add_argument("--workers", type=int, choices=(1, 2, 4), default=1, help="of a stage")
    p.add_argument("--stages", type=at_least(2), default=6, help="of a chain")
    p.add_argument("--seconds", type=at_least(0.1), default=3.0, help="of a stage's steps")
    p.add_argument(
        "--steps", type=at_least(1), default=None, help="of a stage, in place of --seconds"
    )
    p.add_argument("--chains", type=at_least(1), default=1, help="side by side")
    p.add_argument("--rounds", type=at_least(1), default=5)
    a = p.parse_args(argv)
    if a.chains * a.workers > a.cpus:
        raise UserError(
            f"--chains {a.chains} of --workers {a.workers} need {a.chains * a.workers} CPUs, and --cpus is {a.cpus}"
        )
    layout, costs = Layout(a.workers, 1, False), []
    start_ray(a.cpus)
    storage = storage_root(
        opened(chains_tree(a, CALIBRATION_STEPS), None, layout).sweep.base
    )  # prepares the tokens
    with tempfile.TemporaryDirectory(dir=storage) as place:
        step = step_seconds(a, layout, Path(place))
    length = a.steps or max(1, round(a.seconds / step))
    for number in range(a.rounds):
        with tempfile.TemporaryDirectory(dir=storage) as place:
            costs.append(one_round(a, layout, Path(place), length, many_first=number % 2 == 0))
        print(
            f"round {number + 1}: {costs[-1][0]:.3f} s a stage, {costs[-1][1]:.3f} s of it outside of run_stage",
            flush=True,
        )
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
        f"{markdown(header, [row])}\n\n{a.layers} layers × {a.width}, 12 × 64 tokens a step, {step * 1e3:.1f} ms a step, "
        f"{a.cpus} CPUs; {len(costs)} round(s), median (range); without tracking."
    )


if __name__ == "__main__":
    run_command(main)
