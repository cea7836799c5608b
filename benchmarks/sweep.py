#!/usr/bin/env python3
"""A sweep as a tree of stages, beside the plain Tune grid of the same trials: steps, seconds, and the same weights.

    benchmarks/sweep.py [--study wsd|grid18] [--corpus FILE] [--steps 400] [--rounds 3] [--layers 4] [--width 128]

wsd: two peaks × four horizons × three decay shapes. grid18: three peaks × cosine, linear, constant and wsd with a decay of
10, 20 and 40 %, one horizon. The plain side is `tune.Tuner` over the same trials, each trained from step 0 by itself by the
same loop with the same evaluations and checkpoints, in as many reused processes of the same size. Both sides are without
tracking. A round runs both, taking turns in going first, each in a new folder. The benchmark fails where the steps that were
run are not the distinct prefixes of the trials' learning rates, or where one trial's weights or losses differ.
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
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.runs import journal
from orchestrator.runs.storage import storage_root
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.space.expand import Sweep, expand
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


# ---- what is swept ----
def wsd(steps: int) -> dict[str, Any]:
    """`sweep:` of two peaks × four horizons, the longest of `steps`, × three decay shapes."""
    return {
        "grid": {
            "schedule.max_lr": list(PEAKS[:2]),
            "schedule.decay_shape": ["linear", "cosine", "1-sqrt"],
            "train.max_steps": [steps * tenths // 10 for tenths in (4, 6, 8, 10)],
        }
    }


def grid18(steps: int) -> dict[str, Any]:
    """`sweep:` of three peaks × six schedules; every trial has the experiment's `steps`."""
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
    """A sweep's file as a dictionary: the quickstart's model and batch, or smaller ones, with `section` as its `sweep:`."""
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
    """The study of a sweep's file in `folder` (None: where `pipelines/sweep.py` has it), its tokens prepared."""
    base, settings = parse_sweep(tree, "the benchmark")
    storage = storage_root(base)
    planned = Sweep(base, settings, expand(base.model_dump(), settings))
    dataset = prepare(base.data, dataset_dir(base.data, storage))
    return Study(
        planned, SweepFolder(folder or storage / base.name), layout, {data_key(base.data): dataset}
    )


def distinct_prefixes(trials: Iterable[Branch]) -> int:
    """The fewest steps that make all trials, by brute force: states that differ, each a root and the rates that led to it."""
    return len({trial.key(step) for trial in trials for step in range(1, trial.steps + 1)})


# ---- running ----
def start_ray(cpus: int) -> None:
    """A Ray of this process, with `cpus` logical CPUs whatever the machine has."""
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
    """Run the tree, without tracking or reports; its progress, and the seconds it took. `judge`: whether probes may drop trials."""
    progress = study.progress
    progress.on_stage_end = watch
    if not judge:
        progress.judge_probes = tuple
    started = time.perf_counter()
    sweep.execute(progress, progress.folder, study.layout, launch.capacity(study.layout))
    seconds = time.perf_counter() - started
    for name in progress.trials:  # probes among them
        if (state := progress.states.of_trial(name)) not in (DONE, DIVERGED):
            raise RuntimeError(f"trial {name} is {state}: {progress.reason(name)}")
    return progress, seconds


class Alone(tune.Trainable):
    """A trial of the plain grid: from step 0 to its end, by itself."""

    def setup(
        self,
        config: dict[str, Any],
        folder: str,
        experiments: dict[str, Any],
        data_dir: str,
        cpus: int,
    ) -> None:
        self.folder, self.experiments, self.data_dir, self.cpus = (
            Path(folder),
            experiments,
            Path(data_dir),
            cpus,
        )

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
        """Nothing: training commits its own."""

    load_checkpoint = save_checkpoint


def run_plain(study: Study, folder: Path) -> float:
    """Every trial of the study by itself, in folders below `folder`, as a grid of Tune; the seconds it took."""
    experiments = {name: c.experiment.model_dump() for name, c in study.trials.items()}
    data_dir, cpus = (
        next(iter(study.trials.values())).dataset.directory,
        study.layout.cpus_per_worker,
    )
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


# ---- what came of it ----
def outcomes_of_tree(study: Study) -> dict[str, tuple[str, float]]:
    """{trial: (hash of its weights, its last val loss)}."""
    return {row.trial: (row.weights_sha256, row.final) for row in study.results()}


def outcome_alone(experiment: Experiment, run_dir: Path) -> tuple[str, float]:
    """The same of a trial that ran by itself."""
    end = checkpoint.path_of(run_dir / "checkpoints", experiment.train.max_steps)
    return checkpoint.weights_sha256(
        checkpoint.load_tensors(end, "model")
    ), summary_file.last_value(journal.read(RunFolder(run_dir)), "val/loss")


def best_of(outcomes: dict[str, tuple[str, float]]) -> str:
    return min(outcomes, key=lambda name: outcomes[name][1])


def check_same(tree: dict[str, tuple[str, float]], alone: dict[str, tuple[str, float]]) -> None:
    """Raises RuntimeError, naming the trials, where weights or losses differ in a single bit."""
    if differ := sorted(name for name in {*tree, *alone} if tree.get(name) != alone.get(name)):
        raise RuntimeError(
            f"{len(differ)} trials are not what they are alone: {', '.join(differ[:3])}"
        )


def one_round(
    tree: dict[str, Any], layout: Layout, place: Path, tree_first: bool
) -> tuple[float, float, str]:
    """Both sides in new folders of `place`, compared; (seconds as a tree, seconds as a plain grid, the winner)."""
    study, seconds = opened(tree, place / "tree", layout), {}
    for side in ("tree", "plain") if tree_first else ("plain", "tree"):
        seconds[side] = run_tree(study)[1] if side == "tree" else run_plain(study, place / "plain")
    fewest = distinct_prefixes(c.branch for c in study.trials.values())
    if not study.progress.steps_run == study.tree.steps_in_tree == fewest:
        raise RuntimeError(
            f"{study.progress.steps_run} steps were run, {study.tree.steps_in_tree} are in the tree, and "
            f"{fewest} are distinct"
        )
    found = outcomes_of_tree(study)
    check_same(
        found,
        {n: outcome_alone(c.experiment, place / "plain" / n) for n, c in study.trials.items()},
    )
    return seconds["tree"], seconds["plain"], best_of(found)


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as RESULTS.md has them."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines).replace(" --- ", "---")


def spread(values: Sequence[float], digits: int) -> str:
    """`median (least – largest)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def parser(doc: str, *, layers: int, width: int, eval_tokens: int) -> Options:
    """The options that all benchmarks of sweeps have, with their defaults."""
    p = Options(doc)
    p.add_argument(
        "--corpus", default=STDLIB, help="a file of text; default: the running Python's own library"
    )
    p.add_argument(
        "--storage",
        default=None,
        help="folder of tokens and rounds; default: $ESPALIER_STORAGE, else runs",
    )
    p.add_argument(
        "--cpus", type=at_least(1), default=2, help="logical CPUs of the cluster that it starts"
    )
    p.add_argument("--layers", type=at_least(1), default=layers)
    p.add_argument(
        "--width", type=at_least(4), default=width, help="a multiple of 4, the number of heads"
    )
    p.add_argument(
        "--eval-tokens",
        type=at_least(2),
        default=eval_tokens,
        help="of val (and as many of train) per evaluation",
    )
    return p


def main(argv: list[str]) -> int:
    p = parser(__doc__, layers=4, width=128, eval_tokens=16384)
    p.add_argument("--steps", type=at_least(10), default=400, help="of the longest trial")
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
    study, rounds = opened(tree, None, layout), []  # prepares the tokens; its folder stays unmade
    storage = storage_root(study.sweep.base)
    for number in range(a.rounds):
        with tempfile.TemporaryDirectory(dir=storage) as place:
            rounds.append(one_round(tree, layout, Path(place), tree_first=number % 2 == 0))
        print(
            f"round {number + 1}: tree {rounds[-1][0]:.1f} s, plain {rounds[-1][1]:.1f} s",
            flush=True,
        )
    print("\n" + report(a, study, rounds))
    return 0


def report(a: Namespace, study: Study, rounds: list[tuple[float, float, str]]) -> str:
    ours, plain, winners = zip(*rounds, strict=True)
    asked, ran = study.tree.steps_asked, study.tree.steps_in_tree
    header = [
        "study",
        "trials",
        "steps asked",
        "steps run = distinct prefixes",
        "asked ÷ run",
        "tree, s",
        "plain Tune grid, s",
        "plain ÷ tree",
        "winner (both)",
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
        f"{markdown(header, [row])}\n\n{a.layers} layers × {a.width}, 12 × 64 tokens a step, {a.cpus} processes of 1 CPU; "
        f"{len(rounds)} round(s), median (range); both sides without tracking. The tree's seconds include the hash of every "
        f"trial's weights, the plain grid's do not."
    )


if __name__ == "__main__":
    run_command(main)
