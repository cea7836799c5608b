"""A run's folder, `<storage>/<name>/`: what the driver writes there, and whether an experiment may go on in it.

    experiment.yaml  the resolved experiment        run.json       who, on what, from which sources, attempt by attempt
    metrics.jsonl    the journal                    summary.json   how it ended
    checkpoints/     step-…                         samples/       text at every evaluation
"""

import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from model.schedule import learning_rate
from orchestrator.cluster.layout import Layout
from orchestrator import files
from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs import events, journal, stop as stopping
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.errors import NO_ROOM, UserError
from orchestrator.data.dataset import Manifest
from orchestrator.files import write_atomically
from orchestrator.config.plain_yaml import read_yaml
from orchestrator.data.dataset import (data_identity)
from orchestrator.files import read_json

RESERVE, RESERVE_BYTES = ".reserve", 1 << 17  # room that is kept for the last word of a run
# Fields that may change under the same name; every other one is what the run is.
FREE = ("name", "storage", "data.dir", "train.max_steps", "train.log_interval", "train.eval_interval",
        "train.checkpoint_interval", "train.keep", "train.on_nonfinite", "train.allow_drift", "compute.", "tracking.")
DRIFT = ("train.micro_batch_size", "train.reduction_slots", "train.compile")  # another order of the same additions


def check_resumable(run_dir: Path, experiment: Experiment, dataset: Manifest, warn=print) -> int:
    """The step from which `experiment` would go on in this folder; 0 where nothing was committed yet.

    Raises:
        UserError: shows every identity field that differs from the run's, and the ways out.
    """
    found = checkpoint.latest_valid(run_dir / "checkpoints", warn)
    if found is None:
        return 0
    stored = stored_experiment(found)
    manifest = checkpoint.read_manifest(found)
    differences = identity_differences(stored, experiment, manifest["step"])
    if manifest["fingerprints"]["data"] != data_identity(dataset):
        differences.append(f"data: the tokens in {dataset.directory} are not those that the run was trained on")
    drifts = all(line.startswith(DRIFT) for line in differences)
    if differences and not (drifts and experiment.train.allow_drift):
        way = ", or set train.allow_drift=true: from here on the last bits will be others" if drifts else ""
        raise UserError("\n".join([f"{run_dir} was begun with another experiment:",
                                   *(f"  {line}" for line in differences),
                                   f"  give it a new name (name=…), or change these back{way}"]))
    return manifest["step"]


def identity_differences(stored: Experiment, wanted: Experiment, step: int) -> list[str]:
    """One line per identity field that differs; `step` updates were made under `stored`."""
    old, new = ({k: v for k, v in e.flat().items() if not k.startswith(FREE)} for e in (stored, wanted))
    for flat, e in ((old, stored), (new, wanted)):
        flat["train.reduction_slots"] = e.slots  # null and the number that it means are the same
        for key in ("data.corpus", "data.text_field"):
            flat.pop(key)  # a corpus may move: its tokens are compared instead
    if stored.schedule.decay_steps != wanted.schedule.decay_steps:
        for flat, e in ((old, stored), (new, wanted)):  # null means max_steps; saying so changes nothing
            flat["schedule.decay_steps"] = e.schedule.decay_steps or e.train.max_steps
    lines = [f"{key}: {old[key]!r} there, {new[key]!r} here" for key in old if old[key] != new[key]]
    before, after = stored.train.max_steps, wanted.train.max_steps
    if after < step:
        lines.append(f"train.max_steps: {after} here, but {step} steps are done")
    elif not lines and before != after:
        schedules = stored.lr_schedule(), wanted.lr_schedule()
        changed = next((n for n in range(step) if learning_rate(schedules[0], n) != learning_rate(schedules[1], n)), None)
        if changed is not None:
            lines.append(f"train.max_steps: {before} there, {after} here, which changes the learning rate of step "
                         f"{changed + 1}, already made; set schedule.decay_steps={before} or use a new name")
    return lines


def stored_experiment(folder: Path) -> Experiment:
    """The resolved experiment that travels with a run or a checkpoint."""
    path = folder / "experiment.yaml"
    try:
        return parse_experiment(read_yaml(path.read_text("utf-8"), str(path)), str(path))
    except OSError:
        raise UserError(f"{folder}: holds no experiment.yaml; give a run's folder or a checkpoint") from None


def open_attempt(run_dir: Path, experiment: Experiment, facts: dict[str, Any], attempt: dict[str, Any]) -> None:
    """Write experiment.yaml and run.json for this attempt, and take the room for its last word.

    Args:
        facts: "params", "tags" and "dataset" for the tracking server.
        attempt: what this attempt runs on; appended to the earlier ones.
    """
    known = read_json(run_dir / "run.json")
    if known is None or not attempt.get("from_step") and _is_another(run_dir, experiment, facts, known):
        known = {"key": uuid.uuid4().hex, "attempts": []}
        for old in (*journal.aside_files(run_dir), run_dir / journal.FILE, run_dir / "attempts.jsonl", run_dir / events.FILE):
            old.unlink(missing_ok=True)
        for folder in ("samples", "hangs"):
            shutil.rmtree(run_dir / folder, ignore_errors=True)
    run = {"name": experiment.name, "key": known["key"], **facts, "attempts": [*known["attempts"], attempt]}
    write_atomically(run_dir / "run.json", json.dumps(run, indent=1))  # first: else a kill here leaves another experiment its old key
    write_atomically(run_dir / "experiment.yaml", experiment.to_yaml())
    write_atomically(run_dir / RESERVE, " " * RESERVE_BYTES)
    stopping.clear(run_dir)
    for stale in (run_dir / "summary.json", run_dir / "stopped.json", *run_dir.glob("failure-rank*.txt")):
        stale.unlink(missing_ok=True)


def _is_another(run_dir: Path, experiment: Experiment, facts: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether the experiment has changed; with nothing to go on from it then starts over, as another tracked run."""
    try:
        changed = identity_differences(stored_experiment(run_dir), experiment, 0)
    except UserError:  # written by another version
        return True
    return bool(changed) or known.get("dataset") != facts.get("dataset")


def summarise(run_dir: Path, end: tuple[str, int], tokens_per_step: int, mlflow_run_id: str | None,
              wall_s: float) -> dict[str, Any]:
    """Write and return summary.json, out of the journal and the checkpoints; only a finished run's weights are hashed.

    Args:
        end: MLflow's status and the driver's exit status, which says more.
    """
    (run_dir / RESERVE).unlink(missing_ok=True)
    records = journal.read(run_dir)
    folder = run_dir / "checkpoints"
    step = max(checkpoint.steps(folder), default=0)
    found = checkpoint.path_of(folder, step) if step else None
    hashed = found if end[0] == "FINISHED" else None
    timed = [r["perf/step_time_s"] for r in records if "perf/step_time_s" in r]
    timed = timed[1:] or timed  # the first window holds the warm-up
    summary = {
        "status": end[0],
        "exit_status": end[1],
        "step": step,
        "tokens": step * tokens_per_step,
        "train_loss": last(records, "train/loss"),
        "val_loss": last(records, "val/loss"),
        "val_bits_per_byte": last(records, "val/bits_per_byte"),
        "best_val_loss": last(records, "val/best_loss"),
        "checkpoint": str(found) if found else None,
        "weights_sha256": checkpoint.weights_sha256(checkpoint.load_tensors(hashed, "model")) if hashed else None,
        "mlflow_run_id": mlflow_run_id,
        "wall_s": round(wall_s, 1),
        "tokens_per_sec": round(tokens_per_step * len(timed) / sum(timed), 1) if timed else None,
    }
    write_summary(run_dir, summary)
    return summary


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write summary.json. Where there is no room, that is said: the reason why the run ended must be heard all the same."""
    try:
        write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(f"{run_dir}: no summary.json: {error.strerror}", file=sys.stderr)


def write_stopped(run_dir: Path, facts: dict[str, Any]) -> None:
    """Write stopped.json, the word that a run is not to be begun again. On a full disk it goes into the room that was kept."""
    text, reserve = json.dumps(facts, indent=1), run_dir / RESERVE
    try:
        write_atomically(run_dir / "stopped.json", text)
    except OSError as error:
        if error.errno not in NO_ROOM or not reserve.exists():
            raise
        with open(reserve, "r+b", buffering=0, opener=files.opener) as file:  # in place: others may take what is freed
            file.write(text.encode())
            file.truncate()
        os.replace(reserve, run_dir / "stopped.json")


def last(records: list[dict[str, Any]], key: str) -> float | None:
    return next((r[key] for r in reversed(records) if key in r), None)


def recorded_layout(run_dir: Path) -> Layout | None:
    """The layout of the run's last attempt."""
    attempts = (read_json(run_dir / "run.json") or {}).get("attempts") or []
    stored = attempts[-1].get("layout") if attempts else None
    return Layout(**stored) if stored else None
