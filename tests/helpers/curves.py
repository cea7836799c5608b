"""What is equal in equal runs: a part of each journal line, and the final state."""

from collections.abc import Mapping
from typing import Any

from orchestrator.checkpoint import store
from orchestrator.runs import journal, metrics
from orchestrator.runs.folder import RunFolder
from tests.helpers.checkpoints import written_by_one


def exact_part(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the step and the exact metrics of a journal line."""
    return {k: value for k, value in line.items() if k == "step" or metrics.of(k).exact}


def final_outcome(folder: RunFolder) -> dict[str, Any]:
    """Return the bytes of the final state of a run, and all its exact metrics."""
    last = store.latest_valid(folder.checkpoints)
    assert last is not None
    files = ("model.safetensors", "optimizer.safetensors", "state.json")
    return {
        "curve": [exact_part(line) for line in journal.read(folder)],
        "step": last.name,
        **{name: written_by_one(last, name) for name in files},
    }
