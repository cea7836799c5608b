"""Reads the folder of a run and MLflow's database, for tests of tracking."""

import json
import math
import sqlite3


def log(run_dir, steps, **more):
    """Write the journal lines of some steps. A repeated step has the same values."""
    from orchestrator.runs.folder import RunFolder
    from orchestrator.runs.journal import Journal

    journal = Journal(RunFolder(run_dir))
    for step in steps:
        journal.append(step, {"train/loss": 5 - step / 1000, "optim/lr": 1e-3, **more})


def expected(run_dir):
    """Return all (key, step, value, timestamp) that MLflow must have.

    If the journal had several values of a key and step, the first one counts.
    """
    first = {}
    for file in [*sorted(run_dir.glob("metrics.aside-*.jsonl")), run_dir / "metrics.jsonl"]:
        for line in map(json.loads, file.read_text().splitlines()):
            for key in line.keys() - {"step", "timestamp"}:
                if math.isfinite(line[key]):
                    first.setdefault((key, line["step"]), (line[key], line["timestamp"]))
    return sorted((*key_and_step, *point) for key_and_step, point in first.items())


def curve(run_dir):
    """Return (key, step, value) of the journal."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return sorted(
        (key, line["step"], line[key])
        for line in lines
        for key in line.keys() - {"step", "timestamp"}
    )


def rows(
    database,
    run,
    query="SELECT key, step, value, timestamp FROM metrics WHERE run_uuid = ? ORDER BY key, step",
):
    """Query MLflow's database for a run. `run` is its id or its folder."""
    run_id = run
    if not isinstance(run, str):
        run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    with sqlite3.connect(database) as db:
        return db.execute(query, (run_id,)).fetchall()


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def sent_step(run_dir):
    try:
        return json.loads((run_dir / "tracking.json").read_text())["sent_step"]
    except FileNotFoundError:
        return -1
