"""Sweeps that the benchmarks measure: their trials, options and tables, and how they run."""

import logging
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.runs.folder import SweepFolder
from orchestrator.sweep import (
    tune as sweep,  # before ray: it sets what Tune reads when it is imported
)

import ray  # isort: skip

from orchestrator.cluster import connection
from orchestrator.cluster import layout as launch
from orchestrator.cluster.layout import Layout
from orchestrator.config.sweep import parse_sweep
from orchestrator.data.corpus import STDLIB
from orchestrator.data.prepare import prepare_in
from orchestrator.runs.storage import storage_root
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.space.expand import expand
from orchestrator.sweep.states import DIVERGED, DONE
from orchestrator.sweep.study import Study
from orchestrator.sweep.tree import Stage
from orchestrator.sweep.trials import data_key
from pipelines.options import Options, at_least

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


def start_ray(cpus: int) -> None:
    """Start Ray in this process with `cpus` logical CPUs, independent of the machine."""
    for key, value in connection.ENVIRONMENT.items():
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
