"""The dry run of a sweep: its tree, and what it costs, before anything is written or started; and how wrong that was.

Eats a sweep; yields text and a picture. Times come from a few seconds of training for each shape of model and batch that
the sweep has (`calibrate.py`); the tree is then played through on a clock of paper (`forecast.py`).
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.cluster import layout as launch
from orchestrator.cost import estimate as plan
from orchestrator.cost import measure as calibrate
from orchestrator.cost.measure import Timing
from orchestrator.data.dataset import Manifest
from orchestrator.data.prepared import dataset_dir, find_prepared
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import storage_root
from orchestrator.sweep.forecast import forecast
from orchestrator.sweep.report import figures as sweep_figures
from orchestrator.sweep.report import view as tree_view
from orchestrator.sweep.space import Sweep
from orchestrator.sweep.study import Study, check_sources, data_key, with_absolute_paths
from orchestrator.sweep.tree import Stage
from orchestrator.sweep.trials import Candidate

STARTS = (
    2  # process starts before the first step: Tune's own, then those of the workers, side by side
)
MOST_SHAPES = (
    6  # of models and batches to time: a sweep over more of them says that its time is not known
)


def show(sweep: Sweep) -> int:
    """Print what `--dry-run` promises."""
    storage, sweep = storage_root(sweep.base), with_absolute_paths(sweep)
    check_sources(sweep, storage)
    experiments = [spec.experiment for spec in sweep.trials] or [sweep.base]
    counts = {data_key(e.data): plan.token_counts(e) for e in experiments}
    datasets = {data_key(e.data): _dataset(e, storage) for e in experiments}
    layout = RunFolder(storage / sweep.base.name).recorded_layout() or plan.local_layout(
        experiments[0]
    )
    study = Study.open(sweep, storage / sweep.base.name, layout, datasets)
    if not study.plan.stages:
        print(
            f"optuna will ask for {sweep.settings.num_samples} trials, one after the other; there is nothing to plan yet"
        )
        return 0
    slots = plan.local_slots(layout)
    print(tree_view.text(study.plan) + "\n\n" + "\n".join(describe(study, slots, counts)))
    print(f"picture: {_picture(study)}")
    return 0


def describe(study: Study, slots: int, counts: Mapping[str, dict]) -> list[str]:
    """The steps, what would share more, and the cost."""
    schedules = {name: c.experiment.lr_schedule() for name, c in study.everyone.items()}
    estimate, where = estimate_of(study, slots, counts), f"{slots} stage(s) at a time"
    cost = (
        ["expected time, memory and disk are unknown: " + estimate]
        if isinstance(estimate, str)
        else [f"expected: {plan.expected_line(estimate)} at most (checkpoints), {where}"]
    )
    return [*tree_view.summary(study.plan), *tree_view.advice(study.plan, schedules), *cost]


def estimate_of(study: Study, slots: int, counts: Mapping[str, dict]) -> dict[str, float] | str:
    """What running the plan takes: `time_s`, `memory_gib` of a worker, `disk_bytes` of checkpoints; or why nobody knows."""
    shapes: dict[Path, Candidate] = {}
    for c in study.everyone.values():
        n_vocab = counts[data_key(c.experiment.data)]["n_vocab"]
        if n_vocab is None:
            return "the vocabulary is the corpus's characters; run pipelines/prepare.py first"
        shapes.setdefault(_shape(c, n_vocab, study.layout), c)
    if len(shapes) > MOST_SHAPES:
        return f"the sweep has {len(shapes)} shapes of model and batch, and more than {MOST_SHAPES} are not timed"
    a = study.layout
    timings = {
        shape: calibrate.measure(
            c.experiment,
            counts[data_key(c.experiment.data)]["n_vocab"],
            a.num_workers,
            a.cpus_per_worker,
            a.use_gpu,
        )
        for shape, c in shapes.items()
    }
    if None in timings.values():
        return "this machine has no room for a step, or not the devices"
    by_name = {
        name: timings[_shape(c, counts[data_key(c.experiment.data)]["n_vocab"], a)]
        for name, c in study.everyone.items()
    }
    seen = forecast(
        study.plan,
        slots,
        _seconds(study, by_name, counts),
        _results(study),
        study.sweep.settings.keep_branches,
    )
    start = STARTS * max(timing.startup_s for timing in timings.values())
    return {
        "time_s": (start if study.plan.to_run else 0.0) + seen.seconds,
        "memory_gib": max(t.memory_gib for t in timings.values()),
        "disk_bytes": seen.checkpoints * max(t.checkpoint_bytes for t in timings.values()),
    }


def _shape(c: Candidate, n_vocab: int, layout: launch.Layout) -> Path:
    return calibrate.cache_file(
        c.experiment, n_vocab, layout.num_workers, layout.cpus_per_worker, layout.use_gpu
    )


def _seconds(
    study: Study, timings: Mapping[str, Timing], counts: Mapping[str, dict]
) -> Callable[[Stage], float]:
    """Seconds of a stage: its steps, its evaluations, its checkpoints."""

    def seconds(stage: Stage) -> float:
        c = study.everyone[(stage.ends or stage.trials)[0]]
        t, timing, tokens = c.experiment.train, timings[c.name], counts[data_key(c.experiment.data)]
        steps = study.plan.cost(stage)
        first = stage.stop - steps
        evaluations = _due(t.eval_interval, first, stage.stop) + (first == 0)
        evaluations += bool(stage.ends) and stage.stop % t.eval_interval != 0
        checkpoints = _due(t.checkpoint_interval, first, stage.stop - 1) + 1
        each = calibrate.evaluation_seconds(
            c.experiment, tokens["val"] or 0, tokens["train"] or 0, timing
        )
        return (
            calibrate.steps_seconds(steps, timing)
            + evaluations * each
            + checkpoints * timing.checkpoint_s
        )

    return seconds


def _due(interval: int | None, after: int, upto: int) -> int:
    return upto // interval - after // interval if interval else 0


def _results(study: Study) -> Callable[[Stage], int]:
    """Checkpoints that the last stage of a trial leaves: the latest `train.keep` that it made, and perhaps a better one."""

    def results(stage: Stage) -> int:
        t = study.everyone[stage.ends[0]].experiment.train
        made = _due(t.checkpoint_interval, stage.start, stage.stop - 1) + 1
        return min(made, t.keep)

    return results


def _dataset(experiment, storage: Path) -> Manifest:
    """The prepared dataset; where there is none yet, one without tokens that only says which it would be."""
    directory = dataset_dir(experiment.data, storage)
    return find_prepared(experiment.data, directory) or Manifest(
        directory, {"name": str(directory)}, {}
    )


def _picture(study: Study) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"espalier-{study.folder.name}-"))
    sweep_figures.tree(study.plan).savefig(folder / "tree.png")
    return folder / "tree.png"
