#!/usr/bin/env python3
"""Compare a sweep as a tree of stages with the plain Tune grid of the same trials.

    benchmarks/sweep.py [--study wsd|grid18] [--corpus FILE] [--steps 400] [--rounds 3]
                        [--layers 4] [--width 128]

wsd: two peaks × four lengths × three decay shapes. grid18: three peaks × cosine, linear, constant
and wsd with a decay of 10, 20 and 40 %, one length. The plain side is `tune.Tuner` over the same
trials. It trains each of them from step 0, with the same loop, the same evaluations and
checkpoints, in the same number of reused processes. There is no tracking. A round runs both sides,
each in a new folder; they take turns in being first. The benchmark fails if the steps that were run
are not the distinct beginnings of the trials' learning rates, or if the weights or losses of a
trial differ.
"""

import tempfile
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from studies import (
    experiment_tree,
    grid18,
    markdown,
    opened,
    parser,
    run_tree,
    spread,
    start_ray,
    wsd,
)

from orchestrator.runs import summary as summary_file
from orchestrator.runs.folder import RunFolder

from ray import tune  # isort: skip

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster import layout as launch
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.runs import journal
from orchestrator.runs.storage import storage_root
from orchestrator.sweep.branch import Branch
from orchestrator.sweep.study import Study
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from pipelines.common import run_command
from pipelines.options import at_least

# ---- the studies of this benchmark ----


STUDIES: dict[str, Callable[[int], dict[str, Any]]] = {"wsd": wsd, "grid18": grid18}


def distinct_prefixes(trials: Iterable[Branch]) -> int:
    """Count the fewest steps that train all trials by brute force: the distinct states."""
    return len({trial.key(step) for trial in trials for step in range(1, trial.steps + 1)})


# ---- running ----


class Alone(tune.Trainable):
    """Trains a trial of the plain grid from step 0 to its end."""

    def setup(
        self,
        config: dict[str, Any],
        folder: str,
        experiments: dict[str, Any],
        data_dir: str,
        cpus: int,
    ) -> None:
        self.folder = Path(folder)
        self.experiments = experiments
        self.data_dir = Path(data_dir)
        self.cpus = cpus

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        name = self.config["trial"]
        (self.folder / name).mkdir(parents=True)
        train(
            parse_experiment(self.experiments[name], name),
            RunFolder(self.folder / name),
            self.data_dir,
            Worker(cpus=self.cpus),
        )
        return {"done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: the training loop saves its own checkpoints."""

    load_checkpoint = save_checkpoint


def run_plain(study: Study, folder: Path) -> float:
    """Train every trial alone, as a grid of Tune in `folder`; return the seconds that it took."""
    experiments = {name: c.experiment.model_dump() for name, c in study.trials.items()}
    data_dir = next(iter(study.trials.values())).dataset.directory
    cpus = study.layout.cpus_per_worker
    trainable = tune.with_parameters(
        Alone, folder=str(folder), experiments=experiments, data_dir=str(data_dir), cpus=cpus
    )
    started = time.perf_counter()
    results = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([{"CPU": cpus}])),
        param_space={"trial": tune.grid_search(list(experiments))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=launch.capacity(study.layout),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:8], storage_path=str(folder / ".tune"), verbose=0
        ),
    ).fit()
    seconds = time.perf_counter() - started
    if results.errors:
        raise results.errors[0]
    return seconds


# ---- results ----
def outcomes_of_tree(study: Study) -> dict[str, tuple[str, float]]:
    """Return the hash of the weights and the last val loss of each trial."""
    return {row.trial: (row.weights_sha256, row.final) for row in study.results()}


def outcome_alone(experiment: Experiment, run_dir: Path) -> tuple[str, float]:
    """Return the same of a trial that was trained alone."""
    folder = RunFolder(run_dir)
    end = folder.checkpoint(experiment.train.max_steps)
    weights = checkpoint.weights_sha256(checkpoint.load_tensors(end, "model"))
    return weights, summary_file.last_value(journal.read(folder), "val/loss")


def best_of(outcomes: dict[str, tuple[str, float]]) -> str:
    return min(outcomes, key=lambda name: outcomes[name][1])


def check_same(tree: dict[str, tuple[str, float]], alone: dict[str, tuple[str, float]]) -> None:
    """Compare the outcomes bit for bit.

    Raises:
        RuntimeError: Weights or losses differ; the message names the trials.
    """
    differ = sorted(name for name in {*tree, *alone} if tree.get(name) != alone.get(name))
    if differ:
        raise RuntimeError(f"{len(differ)} trials differ from those alone: {', '.join(differ[:3])}")


def one_round(
    tree: dict[str, Any], layout: Layout, place: Path, tree_first: bool
) -> tuple[float, float, str]:
    """Run and compare both sides; return the seconds of tree and grid, and the best trial."""
    study = opened(tree, place / "tree", layout)
    seconds = {}
    sides = ("tree", "plain") if tree_first else ("plain", "tree")
    for side in sides:
        seconds[side] = run_tree(study)[1] if side == "tree" else run_plain(study, place / "plain")
    fewest = distinct_prefixes(c.branch for c in study.trials.values())
    if not study.progress.steps_run == study.tree.steps_in_tree == fewest:
        raise RuntimeError(
            f"{study.progress.steps_run} steps were run, {study.tree.steps_in_tree} are in the "
            f"tree, and {fewest} are distinct"
        )
    found = outcomes_of_tree(study)
    check_same(
        found,
        {n: outcome_alone(c.experiment, place / "plain" / n) for n, c in study.trials.items()},
    )
    return seconds["tree"], seconds["plain"], best_of(found)


def main(argv: list[str]) -> int:
    p = parser(__doc__, layers=4, width=128, eval_tokens=16384)
    p.add_argument("--steps", type=at_least(10), default=400, help="steps of the longest trial")
    p.add_argument("--study", choices=tuple(STUDIES), default="wsd")
    p.add_argument("--rounds", type=at_least(1), default=3)
    a = p.parse_args(argv)
    every = max(1, a.steps // 4)
    tree = experiment_tree(
        a,
        "benchmark-sweep",
        STUDIES[a.study](a.steps),
        a.steps,
        eval_interval=every,
        checkpoint_interval=every,
    )
    layout = Layout(1, 1, False)
    start_ray(a.cpus)
    study = opened(tree, None, layout)  # prepares the tokens; creates no folder
    storage = storage_root(study.sweep.base)
    rounds = []
    for number in range(a.rounds):
        with tempfile.TemporaryDirectory(dir=storage) as place:
            rounds.append(one_round(tree, layout, Path(place), tree_first=number % 2 == 0))
        tree_s, plain_s, _ = rounds[-1]
        print(f"round {number + 1}: tree {tree_s:.1f} s, plain {plain_s:.1f} s", flush=True)
    print("\n" + report(a, study, rounds))
    return 0


def report(a: Namespace, study: Study, rounds: list[tuple[float, float, str]]) -> str:
    ours, plain, winners = zip(*rounds, strict=True)
    asked = study.tree.steps_asked
    ran = study.tree.steps_in_tree
    header = [
        "study",
        "trials",
        "steps asked",
        "steps run = distinct prefixes",
        "asked ÷ run",
        "tree, s",
        "plain Tune grid, s",
        "plain ÷ tree",
        "best trial (both)",
        "trials with the same weights and loss",
    ]
    row = [
        a.study,
        len(study.trials),
        f"{asked:,}",
        f"{ran:,}",
        f"{asked / ran:.2f}",
        spread(ours, 1),
        spread(plain, 1),
        spread([b / c for b, c in zip(plain, ours, strict=True)], 2),
        ", ".join(sorted(set(winners))),
        f"{len(study.trials)} of {len(study.trials)}",
    ]
    return (
        f"{markdown(header, [row])}\n\n{a.layers} layers × {a.width}, 12 × 64 tokens a step, "
        f"{a.cpus} processes of 1 CPU; {len(rounds)} round(s), median (range); both sides without "
        "tracking. The tree's time includes hashing all weights; the grid's time does not."
    )


if __name__ == "__main__":
    run_command(main)
