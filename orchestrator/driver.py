"""The main job: an experiment in; tokens, a trained and tracked run, a summary and an exit status out.

Everything that must outlive this process is in the run's folder before it is needed, so that running the same command
again goes on, whatever happened to the first one.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import checkpoint, init_from, launch, numerics, runs
from orchestrator.config import Experiment
from orchestrator.console import Console, duration, number, table
from orchestrator.errors import EXIT_AGAIN, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, UserError
from orchestrator.manifest import Manifest, load_manifest
from orchestrator.order import windows_per_epoch
from orchestrator.plan import model_facts
from orchestrator.provenance import redact, source_facts, source_tags
from orchestrator.tokens import dataset_dir, prepare
from orchestrator.tracking import Tracker, replay, resolve_uri

SOURCES = Path(__file__).resolve().parent.parent
EXIT_WAIT_S = 60  # for a tracking server, at most


class Terminated(BaseException):
    """SIGTERM: a job was stopped or a machine is wanted back."""


def run(experiment: Experiment) -> int:
    """Prepare, train, track, summarise; returns the exit status of the driver."""
    storage, experiment = runs.storage_root(experiment), _absolute_paths(experiment)
    uri = resolve_uri(experiment, storage)
    init_from.check(experiment)
    _check_writable(storage)
    run_dir, data_dir = storage / experiment.name, dataset_dir(experiment.data, storage)
    if _is_finished(run_dir, experiment, data_dir):
        return _show_again(run_dir, experiment, uri)
    try:
        with _signals():
            return _run(experiment, uri, run_dir, data_dir)
    except runs.HeldError as error:
        print(f"{error}; run this again when it has ended", file=sys.stderr)
        return EXIT_AGAIN
    except Terminated:
        print("terminated before training began; run the same command again", file=sys.stderr)
        return EXIT_AGAIN


def _run(experiment: Experiment, uri: str, run_dir: Path, data_dir: Path) -> int:
    print("starting Ray …", flush=True)
    launch.connect()
    _install_sigterm()  # ray.init replaces what was there
    launch.check_storage(experiment.storage or os.environ.get("ESPALIER_STORAGE") or "runs")
    layout = launch.layout(experiment, launch.recorded_layout(run_dir))
    dataset = prepare(experiment.data, data_dir)
    windows_per_epoch(dataset.splits["train"].tokens, experiment.model.block_size)
    init_from.check_shape(experiment, dataset.tokenizer["n_vocab"])
    with runs.held(run_dir):
        step = runs.check_resumable(run_dir, experiment, dataset)
        _note_numerics(run_dir, step, experiment, layout)
        facts = _facts(experiment, dataset)
        attempt = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "from_step": step,
                   "layout": asdict(layout), **{k: v for k, v in experiment.flat().items() if k.startswith(runs.FREE)}}
        runs.open_attempt(run_dir, experiment, facts, redact(attempt))
        tracker = Tracker(run_dir, uri, experiment.tracking.experiment)
        return _train(experiment, run_dir, data_dir, layout, tracker, step)


def _train(experiment: Experiment, run_dir: Path, data_dir: Path, layout: launch.Layout, tracker: Tracker, step: int) -> int:
    """From the first worker to the last line of the summary."""
    device = "GPU" if layout.use_gpu else f"{layout.cpus_per_worker} CPU(s)"
    print(f"{'resuming' if step else 'training'} {experiment.name} from step {step:,} of {experiment.train.max_steps:,} "
          f"in {run_dir} on {layout.num_workers} worker(s) with {device} each", flush=True)
    started, status, code, reason = time.monotonic(), "FAILED", EXIT_FAILED, ""
    try:
        tracker.start()
        with Console(run_dir, experiment.train.max_steps, experiment.tokens_per_step):
            launch.fit(experiment, run_dir, data_dir, layout)
        stopped = runs.read_json(run_dir / "stopped.json")
        if stopped:
            code, reason = EXIT_USER if stopped.get("user") else EXIT_FAILED, stopped["reason"]
        else:
            status, code = "FINISHED", EXIT_DONE
    except (KeyboardInterrupt, SystemExit):  # Ray Train answers Ctrl-C with sys.exit(0)
        status, code = "KILLED", EXIT_AGAIN if _was_terminated() else EXIT_INTERRUPTED
    except Exception as error:
        traces = [f.read_text("utf-8") for f in sorted(run_dir.glob("failure-rank*.txt"))]
        reason = "\n".join(traces) or f"{error.__class__.__name__}: {error}"
    ending = EXIT_WAIT_S if code != EXIT_AGAIN else max(2.0, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) - 1)
    # What is left takes a bounded time and tells how the run ended. Not SIG_IGN: that says that a SIGTERM came.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # A job that is stopped has 3 s before SIGKILL: hashing the weights is for a run that is done.
    summary = runs.summarise(run_dir, status, experiment.tokens_per_step, tracker.run_id, time.monotonic() - started)
    sent = tracker.finish(status, deadline_s=min(ending, EXIT_WAIT_S))
    if summary["mlflow_run_id"] != tracker.run_id:  # a server that was slow to answer
        summary["mlflow_run_id"] = tracker.run_id
        runs.write_text(run_dir / "summary.json", json.dumps(summary, indent=1))
    if reason:
        print(f"error: {reason}" if code == EXIT_USER else reason, file=sys.stderr)
    _print_summary(run_dir, summary, tracker.url)
    if not sent:
        print(f"the tracking server did not take everything; send the rest with\n  "
              f"pipelines/replay_metrics.py {run_dir}", flush=True)
    return code


def _note_numerics(run_dir: Path, step: int, experiment: Experiment, layout: launch.Layout) -> None:
    """Say where a resume cannot give the bits of a run that was never stopped."""
    if not step:
        return
    stored = checkpoint.read_manifest(checkpoint.path_of(run_dir / "checkpoints", step))["fingerprints"]["numerics"]
    now = numerics.fingerprint(experiment, numerics.Worker(cpus=layout.cpus_per_worker))
    if layout.use_gpu:
        now["device"] = stored["device"]  # the driver's machine need not have a GPU to name
    for line in numerics.changes(stored, now):
        print(f"the last bits will differ from those of a run never stopped: {line}", flush=True)


def _facts(experiment: Experiment, dataset: Manifest) -> dict[str, Any]:
    """What the tracking server is told: every field and what follows from it, the dataset, the sources."""
    derived = model_facts(experiment, dataset.tokenizer["n_vocab"])
    params = {**experiment.flat(), **{f"derived.{k}": v for k, v in derived.items()},
              "derived.tokens_per_step": experiment.tokens_per_step, "derived.reduction_slots": experiment.slots}
    splits = {f"{name}_tokens": split.tokens for name, split in dataset.splits.items()}
    sources = source_facts(SOURCES)
    corpus = [experiment.data.corpus] if isinstance(experiment.data.corpus, str) else experiment.data.corpus
    named = ", ".join(entry.partition("#")[0].rstrip("/").rpartition("/")[2] for entry in corpus)
    return {
        "params": redact({k: v for k, v in params.items() if v is not None}),
        "tags": redact(source_tags(sources, ray_job_id=launch.job_id())),
        "dataset": {"name": f"{named} as {dataset.tokenizer['name']}", "digest": dataset.digest,
                    "source": str(dataset.directory), **splits},
    }


def _check_writable(storage: Path) -> None:
    """Refuse a storage that cannot be made or written to; makes nothing."""
    place = storage
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "not writable" if place.is_dir() else "a file"
        raise UserError(f"storage: {storage} cannot be written to, {place} is {why}; set storage=… or ESPALIER_STORAGE")


def _absolute_paths(experiment: Experiment) -> Experiment:
    """Workers run in another folder: a relative `train.init_from` is one of this one's."""
    source = Path(experiment.train.init_from).expanduser()
    if not source.exists():
        return experiment  # scratch, a name, or a mistake that is told where it is read
    train = experiment.train.model_copy(update={"init_from": str(source.absolute())})
    return experiment.model_copy(update={"train": train})


# ---- a run that is done ----
def _is_finished(run_dir: Path, experiment: Experiment, data_dir: Path) -> bool:
    summary = runs.read_json(run_dir / "summary.json") or {}
    if summary.get("status") != "FINISHED" or summary.get("step") != experiment.train.max_steps:
        return False
    if not (data_dir / "manifest.json").exists():
        return False
    return runs.check_resumable(run_dir, experiment, load_manifest(data_dir)) == experiment.train.max_steps


def _show_again(run_dir: Path, experiment: Experiment, uri: str) -> int:
    print(f"{experiment.name} is finished; a larger train.max_steps goes on, a new name starts afresh")
    _print_summary(run_dir, runs.read_json(run_dir / "summary.json"), None)
    if not replay(run_dir, uri, experiment.tracking.experiment, EXIT_WAIT_S):
        print("the tracking server did not take everything; run this again when it is there")
    return EXIT_DONE


def _print_summary(run_dir: Path, summary: dict[str, Any], url: str | None) -> None:
    """Where everything is, how good it is, and what to type next."""
    shown = {k: number(v) for k, v in summary.items() if v is not None and k not in ("wall_s",)}
    print(f"\n{run_dir.name}\n" + table({**shown, "wall time": duration(summary["wall_s"]), "folder": run_dir, "MLflow": url}))
    samples = sorted((run_dir / "samples").glob("*.txt"))
    if samples and summary["status"] == "FINISHED":
        print("\nsample (the first tokens are the prompt, from val):\n" + samples[-1].read_text("utf-8").strip())
    if summary["status"] != "FINISHED":
        if summary["checkpoint"]:
            print("\nnext: the same command again goes on from the last checkpoint", flush=True)
        return
    print(f"\nnext:\n  pipelines/sample.py {run_dir} --prompt '…'\n  pipelines/evaluate.py {run_dir}\n"
          f"  pipelines/ui.py {run_dir.parent}", flush=True)


# ---- signals ----
@contextlib.contextmanager
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    _install_sigterm()
    try:
        yield
    except KeyboardInterrupt:
        if _was_terminated():
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _install_sigterm() -> None:
    def terminate(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the orderly end short
        # While Ray waits it asks for signals itself and lets no other exception of a handler through.
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)


def _was_terminated() -> bool:
    return signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
