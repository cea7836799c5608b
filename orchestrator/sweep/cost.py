"""What a sweep costs: `--dry-run`, and the estimate that its summary compares with the real cost.

For a dry run, a few seconds of training for each shape of model and batch measure the time of a
step. A sweep that starts does not wait for that: if no dry run measured it, its first steps tell
(`report/pace.py`). The time of the sweep is at least that of its longest path of stages, and that
of all stages over its slots.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.cluster import device
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.config.sections import Data
from orchestrator.cost import cache, estimate
from orchestrator.cost.measure import measure
from orchestrator.cost.timing import (
    Estimate,
    Timing,
    checkpoints,
    evaluation_seconds,
    evaluations,
    steps_seconds,
)
from orchestrator.cost.tokens import TokenCounts, token_counts
from orchestrator.data.dataset import Manifest
from orchestrator.data.prepared import find_in
from orchestrator.runs import journal
from orchestrator.runs.folder import SweepFolder
from orchestrator.runs.identity import recorded_layout
from orchestrator.runs.storage import storage_root
from orchestrator.sweep.report import view
from orchestrator.sweep.report.advice import advice
from orchestrator.sweep.source import check_sources, with_absolute_paths
from orchestrator.sweep.space.expand import Sweep
from orchestrator.sweep.states import longest_paths
from orchestrator.sweep.study import Study
from orchestrator.sweep.tree import Stage
from orchestrator.sweep.trials import PlannedTrial, data_key
from orchestrator.workers.fitting import with_auto_size

STARTS = 2  # process starts before the first step: Tune, then the workers
MOST_SHAPES = 6  # at most so many shapes of model and batch are timed

# For each `data_key`: n_vocab, and the tokens of train and val; None if unknown.
Counts = Mapping[str, TokenCounts]


# ---- dry run ----


def show(sweep: Sweep) -> int:
    """Print the tree of a sweep and its cost; what `--dry-run` does. Nothing is written or started.

    Returns:
        Exit status 0.
    """
    storage = storage_root(sweep.base)
    sweep = with_absolute_paths(sweep)
    check_sources(sweep, storage)
    experiments = sweep.experiments
    by_data = {data_key(e.data): e for e in experiments}
    counts = {key: token_counts(e) for key, e in by_data.items()}
    datasets = {key: _dataset(e.data, storage) for key, e in by_data.items()}
    folder = SweepFolder(storage / sweep.base.name)
    layout = recorded_layout(folder) or device.here(estimate.local_layout(experiments[0]))
    slots = estimate.local_slots(layout)
    layout = with_micro_batch(layout, sweep, counts, slots, here=True)
    study = Study(sweep, folder, layout, datasets)
    if not study.tree.stages:
        print(
            f"optuna will propose {sweep.settings.num_samples} trials, one after the other; there "
            "is nothing to plan yet"
        )
        return 0
    print(view.text(study.tree) + "\n")
    print("\n".join(describe(study, slots, counts)))
    return 0


def describe(study: Study, slots: int, counts: Counts) -> list[str]:
    """Return what a sweep saves, what would share more steps, and what it costs.

    Args:
        study: The sweep.
        slots: Number of stages that can run at the same time.
        counts: Tokens and vocabulary of each dataset.
    """
    schedules = {name: c.experiment.lr_schedule() for name, c in study.trials_and_probes.items()}
    expected = estimate_of(study, slots, counts)
    if isinstance(expected, str):
        cost = f"expected time, memory and disk are unknown: {expected}"
    else:
        line = estimate.expected_line(expected)
        cost = f"expected: {line} at most (checkpoints), {slots} stage(s) at a time"
    return [*view.summary(study.tree), *study.notes(), *advice(study.tree, schedules), cost]


def with_micro_batch(
    layout: Layout, sweep: Sweep, counts: Counts, slots: int, here: bool = False
) -> Layout:
    """Return `with_auto_size` for all trials. The run that a sweep branches off has the number.

    Args:
        layout: Workers of each stage.
        sweep: The sweep.
        counts: Tokens and vocabulary of each dataset.
        slots: Number of stages that can run at the same time.
        here: Measure on this machine, without Ray.
    """
    if sweep.settings.from_ is not None:
        return layout
    trials = [(e, counts[data_key(e.data)].n_vocab) for e in sweep.experiments]
    return with_auto_size(layout, trials, slots, here)


def _dataset(data: Data, storage: Path) -> Manifest:
    """Return the prepared dataset, or one without tokens that has only its name."""
    prepared = find_in(data, storage, read=False)
    return prepared or Manifest(storage, {"name": data_key(data)}, {})


# ---- estimate ----


def announce(study: Study, slots: int, counts: Counts) -> Estimate | None:
    """Print and return what a sweep that starts takes; None if that was not measured before."""
    made = estimate_of(study, slots, counts, lambda *shape: cache.read(*shape) or "not measured")
    if isinstance(made, str):
        return None
    print(f"expected: {estimate.expected_line(made)}", flush=True)
    return made


def estimate_of(
    study: Study,
    slots: int,
    counts: Counts,
    timing_of: Callable[[Experiment, int, Layout], Timing | str] = measure,
) -> Estimate | str:
    """Return what the sweep takes, or why that is unknown.

    Args:
        study: The sweep.
        slots: Number of stages that can run at the same time.
        counts: Tokens and vocabulary of each dataset.
        timing_of: Returns the timing of an experiment, or why it is unknown.

    Returns:
        `time_s`; `memory_gib` of a worker; `disk_bytes`, the most that checkpoints take at a time.
    """
    shapes: dict[str, Path] = {}  # of each trial: equal if their steps cost the same
    examples: dict[Path, tuple[Experiment, int]] = {}
    for name, trial in study.trials_and_probes.items():
        n_vocab = counts[data_key(trial.experiment.data)].n_vocab
        if n_vocab is None:
            return "the vocabulary is the corpus's characters; run pipelines/prepare.py first"
        shapes[name] = cache.file_of(trial.experiment, n_vocab, study.layout)
        examples[shapes[name]] = (trial.experiment, n_vocab)
    if len(examples) > MOST_SHAPES:
        return (
            f"the sweep has {len(examples)} shapes of model and batch, and at most {MOST_SHAPES} "
            "are timed"
        )
    timings: dict[Path, Timing] = {}
    for shape, (experiment, n_vocab) in examples.items():
        timing = timing_of(experiment, n_vocab, study.layout)
        if isinstance(timing, str):
            return timing
        timings[shape] = timing

    by_trial = {name: timings[shape] for name, shape in shapes.items()}
    tree = study.tree
    seconds = {id_: _seconds(study, tree.by_id[id_], by_trial, counts) for id_ in tree.to_run}
    longest = max(longest_paths(tree, seconds).values(), default=0.0)
    start = STARTS * max(t.startup_s for t in timings.values()) if tree.to_run else 0.0
    checkpoint_bytes = max(t.checkpoint_bytes for t in timings.values())
    return {
        "time_s": start + max(sum(seconds.values()) / slots, longest),
        "memory_gib": max(t.memory_gib for t in timings.values()),
        "disk_bytes": disk_bytes(study, slots, checkpoint_bytes),
    }


def disk_bytes(study: Study, slots: int, checkpoint_bytes: float) -> float:
    """Return the most that checkpoints take: one more is being written by each stage that runs."""
    return (_kept_checkpoints(study) + slots) * checkpoint_bytes


def learn(study: Study) -> None:
    """Compare the timings with the steps that were run; see `cache.learn`."""
    lines: dict[Path, list[journal.Line]] = {}
    trials: dict[Path, PlannedTrial] = {}
    for id_ in study.tree.to_run:
        trial = study.trials_and_probes[study.tree.by_id[id_].example]
        n_vocab = trial.dataset.tokenizer["n_vocab"]
        shape = cache.file_of(trial.experiment, n_vocab, study.layout)
        trials[shape] = trial
        lines.setdefault(shape, []).extend(journal.read(study.folder.stage(id_)))
    for shape, trial in trials.items():
        n_vocab = trial.dataset.tokenizer["n_vocab"]
        cache.learn(trial.experiment, n_vocab, study.layout, lines[shape])


def _seconds(study: Study, stage: Stage, timings: Mapping[str, Timing], counts: Counts) -> float:
    """Return the time of a stage: its steps, its evaluations and its checkpoints."""
    experiment = study.trials_and_probes[stage.example].experiment
    timing = timings[stage.example]
    steps = study.tree.cost(stage)
    first = stage.stop - steps
    tokens = counts[data_key(experiment.data)]
    evaluation_s = evaluation_seconds(experiment, tokens.val or 0, tokens.train or 0, timing)
    return (
        steps_seconds(experiment, timing, first, stage.stop)
        + evaluations(experiment, first, stage.stop) * evaluation_s
        + checkpoints(experiment, first, stage.stop) * timing.checkpoint_s
    )


def _kept_checkpoints(study: Study) -> int:
    """Return the number of checkpoints that all stages keep at their ends."""
    tree = study.tree
    count = 0
    for stage in tree.stages:
        if stage.id not in tree.to_run | tree.stored:
            continue
        experiment = study.trials_and_probes[stage.example].experiment
        written = checkpoints(experiment, stage.start, stage.stop)
        count += min(written, experiment.train.keep) if stage.ends else 1
    return count
