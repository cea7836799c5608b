"""What a run with faults must have in common with a run without faults."""

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs import journal, metrics
from orchestrator.runs.folder import RunFolder
from tests.helpers.checkpoints import written_by_one
from tests.helpers.curves import exact_part

Outcome = dict[str, Any]
PARTS = ("model.safetensors", "optimizer.safetensors", "state.json")


def outcome(run_dir: Path) -> Outcome:
    """Return all logged losses, and the bytes of the weights and the optimizer moments."""
    curve = [exact_part(line) for line in journal.read(RunFolder(run_dir))]
    last = checkpoint.latest_valid(run_dir / "checkpoints")
    if last is None:
        return {"curve": curve, "step": None}
    parts = {name: written_by_one(last, name) for name in PARTS}
    weights = checkpoint.weights_sha256(checkpoint.load_tensors(last, "model"))
    return {"curve": curve, "step": last.name, "weights": weights, **parts}


def is_in_mlflow(database: str, run_dir: Path, curve: list[dict[str, Any]]) -> bool:
    """Return whether MLflow's database has exactly this curve for the run."""
    expected = sorted(
        (key, line["step"], value) for line in curve for key, value in line.items() if key != "step"
    )
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    query = "SELECT key, step, value FROM metrics WHERE run_uuid = ?"
    with contextlib.closing(sqlite3.connect(database)) as db:
        rows = db.execute(query, (run_id,)).fetchall()
    return sorted(row for row in rows if metrics.of(row[0]).exact) == expected
