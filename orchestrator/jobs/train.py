"""The main job: an experiment in; tokens, a trained and tracked run, a summary and an exit status out.

Everything that must outlive this process is in the run's folder before it is needed, so that running the same command
again goes on, whatever happened to the first one.
"""

import contextlib
import os
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster import layout as launch
from orchestrator.config.experiment import FREE, Experiment
from orchestrator.cost import cache
from orchestrator.cost.estimate import TokenCounts, comparison_line, expected_line
from orchestrator.cost.measure import folder_bytes, measure
from orchestrator.cost.timing import Estimate, Timing
from orchestrator.data.dataset import Manifest, load_manifest
from orchestrator.data.order import windows_per_epoch
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.errors import (
    EXIT_DONE,
    UserError,
)
from orchestrator.files import read_json
from orchestrator.redact import redact
from orchestrator.runs import events, identity, journal, lock, metrics, signals, stop
from orchestrator.runs import summary as summary_file
from orchestrator.runs.console import Console
from orchestrator.runs.ending import Ending
from orchestrator.runs.facts import facts_of, model_facts
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import check_writable, storage_root
from orchestrator.text import duration, number, table
from orchestrator.track.mlflow import Tracker, resend_metrics
from orchestrator.track.server import resolve_uri
from orchestrator.train import init_from, numerics
from orchestrator.workers import ray_train
from orchestrator.workers.diagnose import advise, diagnose
from orchestrator.workers.watch import RunWatch

CALIBRATION_S = 10.0  # at most, before a run begins
CALIBRATION_FLOPS = 2e12  # of a micro-batch: more than that takes CPUs longer


def run(experiment: Experiment) -> int:
    """Prepare, train, track, summarise; returns the exit status of the driver."""
    storage, experiment = storage_root(experiment), init_from.with_absolute_path(experiment)
    uri = resolve_uri(experiment, storage)
    init_from.check(experiment)
    check_writable(storage)
    if (storage / experiment.name / "sweep.yaml").exists():
        raise UserError(
            f"name: {storage / experiment.name} is the folder of a sweep; give the run another name (name=…)"
        )
    run_dir, data_dir = storage / experiment.name, dataset_dir(experiment.data, storage)
    if _is_finished(run_dir, experiment, data_dir):
        return _show_again(run_dir, experiment, uri)
    with lock.held(RunFolder(run_dir).driver_lock) as vanished:
        if vanished and (run_dir / "run.json").exists():
            message = f"{vanished} ended without freeing the run; it is taken over"
            print(events.note(RunFolder(run_dir), "taken_over", message)["message"], flush=True)
        return _run(experiment, uri, run_dir, data_dir)


def _run(experiment: Experiment, uri: str, run_dir: Path, data_dir: Path) -> int:
    print("starting Ray …", flush=True)
    with signals.while_ray_starts():
        launch.connect()
    launch.check_storage(experiment.storage or os.environ.get("ESPALIER_STORAGE") or "runs")
    layout = launch.find_layout(experiment, RunFolder(run_dir).recorded_layout())
    dataset = prepare(experiment.data, data_dir)
    windows_per_epoch(dataset.splits["train"].tokens, experiment.model.block_size)
    init_from.check_shape(experiment, dataset.tokenizer["n_vocab"])
    step = identity.check_resumable(RunFolder(run_dir), experiment, dataset, _leave_to_rank_0)
    drift = _drift(run_dir, step, experiment, layout)
    facts, estimate = (
        facts_of(experiment, dataset),
        None if step else estimate_of(experiment, dataset, layout),
    )
    attempt = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "layout": asdict(layout),
        **({"drift": "; ".join(drift)} if drift else {}),
        **{k: v for k, v in experiment.flat().items() if k.startswith(FREE)},
    }
    identity.begin_attempt(RunFolder(run_dir), experiment, facts, redact(attempt))
    tracker = Tracker(RunFolder(run_dir), uri, experiment.tracking.experiment)
    return _train(experiment, run_dir, data_dir, layout, tracker, step, estimate)


def _train(
    experiment: Experiment,
    run_dir: Path,
    data_dir: Path,
    layout: launch.Layout,
    tracker: Tracker,
    step: int,
    estimate: Estimate | None,
) -> int:
    """From the first worker to the last line of the summary."""
    device = "GPU" if layout.use_gpu else f"{layout.cpus_per_worker} CPU(s)"
    print(
        f"{'resuming' if step else 'training'} {experiment.name} from step {step:,} of {experiment.train.max_steps:,} "
        f"in {run_dir} on {layout.num_workers} worker(s) with {device} each",
        flush=True,
    )
    folder = RunFolder(run_dir)
    started = time.monotonic()
    watch = RunWatch(folder, experiment.compute.hang_after_s)
    error: Exception | None = None
    ending: Ending | None = None
    try:
        tracker.start()
        with (
            Console(RunFolder(run_dir), experiment.train.max_steps, experiment.tokens_per_step),
            watch,
            signals.asking_to_stop(lambda: stop.request(RunFolder(run_dir), "SIGTERM")),
        ):
            ray_train.fit(experiment, folder, data_dir, layout)
    except (KeyboardInterrupt, SystemExit):  # Ray Train answers Ctrl-C with sys.exit(0)
        if not watch.over:
            ending = Ending("again" if signals.was_terminated() else "interrupted")
    except Exception as raised:
        error = raised
    signals.let_end()
    if ending is None:
        ending = diagnose(folder, error, layout.num_workers)
        ending = _with_advice(ending, folder, experiment, data_dir, layout)
    # A job that is stopped has 3 s before SIGKILL: hashing the weights is for a run that is done.
    summary = summary_file.summarize(
        folder,
        ending,
        experiment.tokens_per_step,
        tracker.run_id,
        time.monotonic() - started,
    )
    if estimate and ending.kind == "done":
        _compare(run_dir, summary, estimate)
    sent = False
    with signals.ending_on_ctrl_c():  # enough of waiting for a server
        sent = tracker.finish(ending.mlflow_status, deadline_s=signals.tracking_wait_s(ending))
    if summary["mlflow_run_id"] != tracker.run_id:  # a server that was slow to answer
        summary["mlflow_run_id"] = tracker.run_id
        folder.write_summary(summary)
    _print_reason(ending)
    _print_summary(run_dir, summary, tracker.url)
    if not sent:
        print(
            f"the tracking server did not take everything; send the rest with\n  "
            f"pipelines/replay_metrics.py {run_dir}",
            flush=True,
        )
    return ending.exit_status


def _with_advice(
    ending: Ending,
    folder: RunFolder,
    experiment: Experiment,
    data_dir: Path,
    layout: launch.Layout,
) -> Ending:
    """Complete an ending that is out of memory, in stopped.json too."""
    if ending.cause != "out_of_memory":
        return ending
    ending = advise(ending, folder, experiment, load_manifest(data_dir), layout)
    with contextlib.suppress(OSError):  # no room: stopped.json keeps the reason without advice
        folder.write_ending(ending)
    return ending


def _print_reason(ending: Ending) -> None:
    if ending.kind == "user":
        print(f"error: {ending.reason}", file=sys.stderr)
    elif ending.reason is not None:
        print(ending.facts.get("traceback", ending.reason), file=sys.stderr)


def _leave_to_rank_0(message: str) -> None:
    """A checkpoint that is passed over is an event, which rank 0 notes; saying it here too would say it twice."""


def _drift(run_dir: Path, step: int, experiment: Experiment, layout: launch.Layout) -> list[str]:
    """What keeps a resume from giving the bits of a run that was never stopped, a line each.

    Raises:
        UserError: there is such a thing, and nobody allowed it.
    """
    if not step:
        return []
    stored = checkpoint.read_manifest(checkpoint.path_of(run_dir / "checkpoints", step))[
        "fingerprints"
    ]["numerics"]
    now = numerics.fingerprint(experiment, numerics.Worker(cpus=layout.cpus_per_worker))
    if (
        layout.use_gpu or launch.has_several_nodes()
    ):  # the driver's machine need not be like theirs; the workers compare
        now |= {key: stored.get(key) for key in ("device", "torch")}
    return numerics.check(stored, now, experiment, run_dir)


# ---- known before, measured after ----
def estimate_of(
    experiment: Experiment, dataset: Manifest, layout: launch.Layout
) -> Estimate | None:
    """Estimate and print what the whole run takes; None if that is not known within seconds.

    An estimate that fails does not end the run.
    """
    tokens = TokenCounts.of(dataset)
    try:
        timing = _timing(experiment, dataset.tokenizer["n_vocab"], layout)
        if timing is None:
            return None
        estimate = tokens.expected(experiment, timing)
    except Exception as error:
        print(f"no estimate of the cost: {type(error).__name__}: {error}", flush=True)
        return None
    print(f"expected: {expected_line(estimate)}", flush=True)
    return estimate


def _timing(experiment: Experiment, n_vocab: int, layout: launch.Layout) -> Timing | None:
    known = cache.read(experiment, n_vocab, layout)
    if known is not None:
        return known
    micro_batch = experiment.train.micro_batch_size * experiment.model.block_size
    flops = model_facts(experiment, n_vocab)["flops_per_token"] * micro_batch
    if flops >= CALIBRATION_FLOPS and not layout.use_gpu:
        return None
    return measure(experiment, n_vocab, layout, limit_s=CALIBRATION_S)


def _compare(run_dir: Path, summary: dict[str, Any], estimate: Estimate) -> None:
    """Add to the summary what was expected and what came of it."""
    measured = {
        "time_s": summary["wall_s"],
        "memory_gib": metrics.peak_memory_gib(journal.read(RunFolder(run_dir))),
        "final_disk_bytes": folder_bytes(run_dir / "checkpoints"),
    }
    summary |= {"estimated": estimate, "measured": measured}
    RunFolder(run_dir).write_summary(summary)


# ---- a run that is done ----
def _is_finished(run_dir: Path, experiment: Experiment, data_dir: Path) -> bool:
    summary = read_json(run_dir / "summary.json") or {}
    if summary.get("status") != "FINISHED" or summary.get("step") != experiment.train.max_steps:
        return False
    if not (data_dir / "manifest.json").exists():
        return False
    return (
        identity.check_resumable(
            RunFolder(run_dir), experiment, load_manifest(data_dir), _leave_to_rank_0
        )
        == experiment.train.max_steps
    )


def _show_again(run_dir: Path, experiment: Experiment, uri: str) -> int:
    print(
        f"{experiment.name} is finished; a larger train.max_steps goes on, a new name starts afresh"
    )
    _print_summary(run_dir, read_json(run_dir / "summary.json"), None)
    if not resend_metrics(
        RunFolder(run_dir), uri, experiment.tracking.experiment, signals.EXIT_WAIT_S
    ):
        print("the tracking server did not take everything; run this again when it is there")
    return EXIT_DONE


def _print_summary(run_dir: Path, summary: dict[str, Any], url: str | None) -> None:
    """Where everything is, how good it is, and what to type next."""
    shown = {
        k: number(v)
        for k, v in summary.items()
        if v is not None and k not in ("wall_s", "estimated", "measured")
    }
    cost = (
        comparison_line(summary["estimated"], summary["measured"])
        if "estimated" in summary
        else None
    )
    print(
        f"\n{run_dir.name}\n"
        + table(
            {
                **shown,
                "wall time": duration(summary["wall_s"]),
                "estimate": cost,
                "folder": run_dir,
                "MLflow": url,
            }
        )
    )
    samples = sorted((run_dir / "samples").glob("*.txt"))
    if samples and summary["status"] == "FINISHED":
        print(
            "\nsample (the first tokens are the prompt, from val):\n"
            + samples[-1].read_text("utf-8").strip()
        )
    if summary["status"] != "FINISHED":
        if summary["checkpoint"]:
            print("\nnext: the same command again goes on from the last checkpoint", flush=True)
        return
    print(
        f"\nnext:\n  pipelines/sample.py {run_dir} --prompt '…'\n  pipelines/evaluate.py {run_dir}\n"
        f"  pipelines/ui.py {run_dir.parent}",
        flush=True,
    )
