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

import logging
import os
import statistics
import tempfile
import time
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.runs import summary as summary_file
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep import (
    tune as sweep,  # before ray: it sets what Tune reads when it is imported
)

import ray  # isort: skip
from ray import tune  # isort: skip

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster import layout as launch
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.config.sweep import parse_sweep
from orchestrator.data.corpus import STDLIB
from orchestrator.data.prepare import prepare_in
from orchestrator.runs import journal
from orchestrator.runs.storage import storage_root
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.space.expand import expand
from orchestrator.sweep.states import DIVERGED, DONE
from orchestrator.sweep.study import Study, data_key
from orchestrator.sweep.tree import Branch, Stage
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from pipelines.common import Options, at_least, run_command

PEAKS = (1e-3, 3e-3, 1e-2)
SHAPES = {
    "cosine": {"kind": "cosine"},
    "linear": {"kind": "linear"},
    "constant": {"kind": "constant"},
    **{
        f"wsd-{percent}": {"kind": "wsd", "decay_fraction": percent / 100}
        for percent in (10, 20, 40)
    },
}


# ---- studies ----
def wsd(steps: int) -> dict[str, Any]:
    """Return the `sweep` section: two peaks × four lengths up to `steps` × three decay shapes."""
    return {
        "grid": {
            "schedule.max_lr": list(PEAKS[:2]),
            "schedule.decay_shape": ["linear", "cosine", "1-sqrt"],
            "train.max_steps": [steps * tenths // 10 for tenths in (4, 6, 8, 10)],
        }
    }


def grid18(steps: int) -> dict[str, Any]:
    """Return the `sweep` section: three peaks × six schedules, all of the experiment's length."""
    return {
        "trials": {
            f"{name}_{peak:g}": {
                "schedule.max_lr": peak,
                **{f"schedule.{k}": v for k, v in shape.items()},
            }
            for peak in PEAKS
            for name, shape in SHAPES.items()
        }
    }


STUDIES: dict[str, Callable[[int], dict[str, Any]]] = {"wsd": wsd, "grid18": grid18}


def experiment_tree(
    a: Namespace, name: str, section: dict[str, Any], steps: int, **train_fields: Any
) -> dict[str, Any]:
    """Return the configuration of a sweep: the quickstart's model and batch, or smaller ones."""
    corpus = a.corpus if a.corpus.startswith("builtin:") else str(Path(a.corpus).absolute())
    return {
        "name": name,
        "storage": a.storage,
        "data": {"corpus": corpus, "tokenizer": "byte"},
        "optim": {"beta2": 0.99},
        "model": {
            "block_size": 64,
            "n_layer": a.layers,
            "n_head": 4,
            "n_embd": a.width,
            "pad_vocab_to": 1,
        },
        "schedule": {"kind": "wsd", "warmup_steps": steps // 20},
        "train": {
            "micro_batch_size": 12,
            "global_batch_size": 12,
            "log_interval": 100,
            "eval_tokens": a.eval_tokens,
            "max_steps": steps,
            "keep": 1,
            **train_fields,
        },
        "sweep": section,
    }


def opened(tree: dict[str, Any], folder: Path | None, layout: Layout) -> Study:
    """Prepare the tokens and plan a sweep in `folder`; None: where `pipelines/sweep.py` has it."""
    base, settings = parse_sweep(tree, "the benchmark")
    storage = storage_root(base)
    planned = expand(base.model_dump(), settings)
    dataset = prepare_in(base.data, storage)
    sweep_folder = SweepFolder(folder or storage / base.name)
    return Study(planned, sweep_folder, layout, {data_key(base.data): dataset})


def distinct_prefixes(trials: Iterable[Branch]) -> int:
    """Count the fewest steps that train all trials by brute force: the distinct states."""
    return len({trial.key(step) for trial in trials for step in range(1, trial.steps + 1)})


# ---- running ----
def start_ray(cpus: int) -> None:
    """Start Ray in this process with `cpus` logical CPUs, independent of the machine."""
    for key, value in launch.ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": launch.worker_environment()},
    )
    logging.getLogger("ray.train").setLevel(logging.WARNING)


def run_tree(
    study: Study, watch: Callable[[Stage], None] = lambda stage: None, judge: bool = True
) -> tuple[Progress, float]:
    """Run the tree without tracking or reports; return its progress and the seconds that it took.

    Args:
        study: The sweep.
        watch: Called with each stage that has ended.
        judge: Whether probes may drop trials.
    """
    progress = study.progress
    progress.on_stage_end = watch
    if not judge:
        progress.judge_probes = tuple
    started = time.perf_counter()
    sweep.execute(study, launch.capacity(study.layout))
    seconds = time.perf_counter() - started
    for name in progress.trials:  # probes included
        state = progress.states.of_trial(name)
        if state not in (DONE, DIVERGED):
            raise RuntimeError(f"trial {name} is {state}: {progress.reason(name)}")
    return progress, seconds


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


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown, as in RESULTS.md."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines).replace(" --- ", "---")


def spread(values: Sequence[float], digits: int) -> str:
    """Return `median (least – largest)`."""
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def parser(doc: str, *, layers: int, width: int, eval_tokens: int) -> Options:
    """Return a parser with the options that all benchmarks of sweeps have."""
    p = Options(doc)
    p.add_argument(
        "--corpus", default=STDLIB, help="a text file; default: the library of the running Python"
    )
    p.add_argument(
        "--storage",
        default=None,
        help="folder for tokens and runs; default: $ESPALIER_STORAGE, else runs",
    )
    p.add_argument("--cpus", type=at_least(1), default=2, help="logical CPUs of Ray")
    p.add_argument("--layers", type=at_least(1), default=layers)
    p.add_argument(
        "--width",
        type=at_least(4),
        default=width,
        help="n_embd, a multiple of 4, the number of heads",
    )
    p.add_argument(
        "--eval-tokens",
        type=at_least(2),
        default=eval_tokens,
        help="tokens of val, and of train, per evaluation",
    )
    return p


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
