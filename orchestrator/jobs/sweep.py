"""The sweep: an experiment with a `sweep` section in; every trial trained, tracked and compared, and an exit status out.

Everything that must outlive this process is in the sweep's folder before it is needed, so that running the same command
again goes on, and running it with more trials runs only what is new.

    sweep.yaml     the resolved sweep            stages/<id>/    stretches of steps that trials share
    plan.txt       its tree                      trials/<name>/  one folder a trial, like a lone run's
    comparison.csv, figures/                     summary.json    how it ended
    events.jsonl   what happened on the way      stop.json       a stop that was asked for
"""

import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from orchestrator.cluster import layout as launch
from orchestrator.config.experiment import Data, Experiment
from orchestrator.cost.estimate import TokenCounts, expected_line
from orchestrator.cost.timing import Estimate
from orchestrator.data.dataset import Manifest, load_manifest
from orchestrator.data.order import windows_per_epoch
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.errors import EXIT_AGAIN, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, UserError
from orchestrator.files import read_json
from orchestrator.runs import lock, signals, stop
from orchestrator.runs.ending import Ending, Kind
from orchestrator.runs.facts import model_facts
from orchestrator.runs.folder import SweepFolder
from orchestrator.runs.storage import check_writable, storage_root
from orchestrator.sweep import cost as sweep_plan
from orchestrator.sweep.report import view as tree_view
from orchestrator.sweep.report.files import Report
from orchestrator.sweep.report.summary import show
from orchestrator.sweep.report.table import Table
from orchestrator.sweep.space.expand import Sweep
from orchestrator.sweep.states import BLOCKED, DONE, FAILED, STOPPED
from orchestrator.sweep.study import Study, check_sources, data_key, with_absolute_paths
from orchestrator.track.server import resolve_uri
from orchestrator.track.sweep import SweepTracker, resend_sweep_metrics
from orchestrator.train import init_from
from orchestrator.workers.watch import Watch

_KINDS: dict[int, Kind] = {
    EXIT_DONE: "done",
    EXIT_FAILED: "failed",
    EXIT_AGAIN: "again",
    EXIT_INTERRUPTED: "interrupted",
}


def run(sweep: Sweep) -> int:
    """Plan, run what is missing, compare; returns the exit status of the driver."""
    storage = storage_root(sweep.base)
    folder, uri = storage / sweep.base.name, resolve_uri(sweep.base, storage)
    sweep = with_absolute_paths(sweep)
    check_sources(sweep, storage)
    check_writable(storage)
    if (folder / "experiment.yaml").exists():
        raise UserError(
            f"name: {folder} is the folder of a run; give the sweep another name (name=…)"
        )
    if study := _finished(sweep, storage, folder):
        return _show_again(study, uri)
    with lock.held(SweepFolder(folder).driver_lock):
        return _run(sweep, storage, folder, uri)


def _run(sweep: Sweep, storage: Path, folder: Path, uri: str) -> int:
    print("starting Ray …", flush=True)
    with signals.while_ray_starts():
        launch.connect(launch.worker_environment())
    launch.check_storage(sweep.base.storage or os.environ.get("ESPALIER_STORAGE") or "runs")
    layout = _layout(sweep, SweepFolder(folder).recorded_layout())
    datasets = {
        key: prepare(data, dataset_dir(data, storage)) for key, data in _data_of(sweep).items()
    }
    _check_shapes(sweep, datasets)
    study = Study(sweep, SweepFolder(folder), layout, datasets)
    stop.clear(SweepFolder(folder))
    # A cluster that grows does so for what waits: then everything that may run asks for its place.
    slots = max(
        1,
        launch.capacity(layout),
        len(study.tree.to_run) if os.environ.get("ESPALIER_AUTOSCALING") else 0,
    )
    estimate = _describe(study, slots)
    return _execute(
        study, slots, SweepTracker(study.folder, uri, sweep.base.tracking.experiment), estimate
    )


def _describe(study: Study, slots: int) -> Estimate | None:
    """Say what will be run and what it will cost; the estimate, where there is one."""
    print("\n".join(tree_view.summary(study.tree)))
    print(
        f"{slots} stage(s) at a time, {study.layout.num_workers} worker(s) each, in {study.folder.path}",
        flush=True,
    )
    if not study.tree.to_run:
        return None
    counts = {key: TokenCounts.of(dataset) for key, dataset in study.datasets.items()}
    try:
        estimate = sweep_plan.estimate_of(study, slots, counts)
    except Exception as error:  # no estimate is worth a sweep
        estimate = f"{error.__class__.__name__}: {error}"
    known = isinstance(estimate, dict)
    print(
        f"expected: {expected_line(estimate)}" if known else f"no estimate of the cost: {estimate}",
        flush=True,
    )
    return estimate if known else None


def _execute(study: Study, slots: int, tracker: SweepTracker, estimate: Estimate | None) -> int:
    """From the plan to the last line of the comparison."""
    started, code = time.monotonic(), None
    step_s = (
        estimate["time_s"] * slots / study.tree.steps_to_run
        if estimate and study.tree.steps_to_run
        else None
    )
    progress = study.progress
    table = Table(progress, slots, study.best, step_s)
    progress.tick = table.tick
    report = Report(study, progress, estimate)
    progress.on_stage_end = lambda stage: (report.stage_ended(stage), table.stage_ended(stage))
    report.begin()
    try:
        tracker.start()
        from orchestrator.sweep import tune as sweep  # imports Tune

        with (
            Watch(study.folder, progress.running),
            signals.asking_to_stop(lambda: stop.request(study.folder, "SIGTERM")),
        ):
            sweep.execute(progress, progress.folder, study.layout, slots, study.asha())
        code = _outcome(study)
    except (KeyboardInterrupt, SystemExit):
        code = EXIT_AGAIN if signals.was_terminated() else EXIT_INTERRUPTED
    except Exception:  # not a trial's: those end in their stages
        traceback.print_exc()
        code = EXIT_FAILED
    signals.let_end()
    ending = Ending(_KINDS[code])
    status = ending.mlflow_status
    summary = report.finish(ending, time.monotonic() - started, quick=code == EXIT_AGAIN)
    sent = False
    with signals.ending_on_ctrl_c():  # enough of waiting for a server
        sent = tracker.finish(status, deadline_s=signals.tracking_wait_s(ending))
    show(study, summary, tracker.url)
    if not sent:
        print(
            f"the tracking server did not take everything; send the rest with\n  "
            f"pipelines/replay_metrics.py {study.folder.path}",
            flush=True,
        )
    return code


def _outcome(study: Study) -> int:
    """Exit status of a sweep in which nothing runs any more."""
    if stop.requested(study.folder) and not study.is_over:
        return EXIT_AGAIN
    states = {study.progress.states.of_trial(name) for name in study.trials}
    probes = {study.progress.states.of_trial(probe.name) for probe in study.probes.values()}
    return (
        EXIT_DONE if states <= {DONE, STOPPED} and not probes & {FAILED, BLOCKED} else EXIT_FAILED
    )


# ---- before it runs ----
def _data_of(sweep: Sweep) -> dict[str, Data]:
    """Each corpus and tokenizer once."""
    return {data_key(e.data): e.data for e in _experiments(sweep)}


def _experiments(sweep: Sweep) -> list[Experiment]:
    """Those of the trials; where optuna has not asked for any yet, the one that it varies."""
    return [spec.experiment for spec in sweep.trials] or [sweep.base]


def _layout(sweep: Sweep, recorded: launch.Layout | None) -> launch.Layout:
    """One for all trials."""
    by_slots = {e.slots: e for e in _experiments(sweep)}
    found = {launch.find_layout(e, recorded) for e in by_slots.values()}
    if len(found) > 1:
        raise UserError(
            f"compute.num_workers: trials would run on {' or '.join(str(a.num_workers) for a in found)} workers; "
            f"set it to a number that divides the reduction slots of all: {sorted(by_slots)}"
        )
    return found.pop()


def _check_shapes(sweep: Sweep, datasets: Mapping[str, Manifest]) -> None:
    """All trials that their corpus or their first weights do not fit, at once."""
    problems = []
    for spec in sweep.trials:
        e, dataset = spec.experiment, datasets[data_key(spec.experiment.data)]
        try:
            windows_per_epoch(dataset.splits["train"].tokens, e.model.block_size)
            model_facts(e, dataset.tokenizer["n_vocab"])
            init_from.check_shape(e, dataset.tokenizer["n_vocab"])
        except (RuntimeError, OverflowError):
            problems.append(
                f"trial {spec.name}: a model with these sizes cannot be built; lower model.n_embd or model.n_layer"
            )
        except ValueError as error:
            problems.append(f"trial {spec.name}: {error}")
    if problems:
        raise UserError("\n".join(problems))


# ---- a sweep that is done ----
def _finished(sweep: Sweep, storage: Path, folder: Path) -> Study | None:
    """The study, where it is known without a cluster that nothing is left to run."""
    layout, manifests = (
        SweepFolder(folder).recorded_layout(),
        {k: dataset_dir(d, storage) for k, d in _data_of(sweep).items()},
    )
    if layout is None or not all((path / "manifest.json").exists() for path in manifests.values()):
        return None
    if (read_json(folder / "summary.json") or {}).get("status") != "FINISHED":
        return None
    study = Study(
        sweep,
        SweepFolder(folder),
        layout,
        {k: load_manifest(path) for k, path in manifests.items()},
    )
    study.progress.release_judged()
    return study if study.is_over else None


def _show_again(study: Study, uri: str) -> int:
    print(f"{study.folder.name} is finished; more values in its grid run only what is new")
    summary = read_json(study.folder.summary_file)
    best = study.winner(study.results())
    if best and best[0] != summary["best_trial"]:  # the grid is smaller now
        summary |= {"best_trial": best[0], "best_value": best[1], "best_checkpoint": None}
    show(study, summary, None)
    if not resend_sweep_metrics(
        study.folder, uri, study.sweep.base.tracking.experiment, signals.EXIT_WAIT_S
    ):
        print("the tracking server did not take everything; run this again when it is there")
    return EXIT_DONE
