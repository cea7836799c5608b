"""summary.json: how a run ended, its final losses and its speed."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from orchestrator.checkpoint import store
from orchestrator.runs import journal
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder


class Summary(TypedDict, total=False):
    """Content of summary.json; unknown values are None."""

    status: str  # MLflow's: FINISHED, FAILED or KILLED
    exit_status: int
    step: int  # of the last checkpoint
    tokens: int
    train_loss: float | None
    val_loss: float | None
    val_bits_per_byte: float | None
    best_val_loss: float | None
    checkpoint: str | None
    weights_sha256: str | None  # only of a finished run
    mlflow_run_id: str | None
    wall_s: float
    tokens_per_sec: float | None
    estimated: Any  # cost.timing.Estimate, which this package cannot import
    measured: dict[str, float | None]


def summarize(
    folder: RunFolder,
    ending: Ending,
    tokens: Callable[[int], int],
    mlflow_run_id: str | None,
    wall_s: float,
) -> Summary:
    """Return the summary of a run from its journal and its checkpoints, and write summary.json.

    Args:
        folder: Folder of the run.
        ending: How the run ended. Only the weights of a finished run are hashed: a Ray job that
            is stopped has 3 s before SIGKILL.
        tokens: Returns the tokens of the first updates.
        mlflow_run_id: None if the tracking server has not answered.
        wall_s: Seconds since the workers were started.
    """
    with contextlib.suppress(OSError):  # the file system may have become read-only
        folder.reserve_file.unlink(missing_ok=True)
    lines = journal.read(folder)
    step = max(folder.checkpoint_steps(), default=0)
    found = None
    weights_sha256 = None
    if step > 0:
        found = folder.checkpoint(step)
        if ending.kind == "done":
            weights_sha256 = store.stored_weights_sha256(found)
    summary: Summary = {
        "status": ending.mlflow_status,
        "exit_status": ending.exit_status,
        **last_state(lines, step, tokens(step), found, weights_sha256),
        "mlflow_run_id": mlflow_run_id,
        "wall_s": round(wall_s, 1),
        "tokens_per_sec": _tokens_per_sec(lines, tokens),
    }
    folder.write_summary(summary)
    return summary


def last_state(
    lines: list[dict[str, Any]],
    step: int,
    tokens: int,
    checkpoint: Path | None,
    weights_sha256: str | None,
) -> Summary:
    """Return the fields that the summaries of a run and of a trial share."""
    return {
        "step": step,
        "tokens": tokens,
        "train_loss": last_value(lines, "train/loss"),
        "val_loss": last_value(lines, "val/loss"),
        "val_bits_per_byte": last_value(lines, "val/bits_per_byte"),
        "best_val_loss": last_value(lines, "val/best_loss"),
        "checkpoint": str(checkpoint) if checkpoint is not None else None,
        "weights_sha256": weights_sha256,
    }


def last_value(lines: list[dict[str, Any]], metric: str) -> float | None:
    """Return the newest value of a metric; None if no line has it."""
    for line in reversed(lines):
        if metric in line:
            return line[metric]
    return None


def _tokens_per_sec(lines: list[dict[str, Any]], tokens: Callable[[int], int]) -> float | None:
    """Return the mean speed without the first log window, which includes the warm-up."""
    windows = []  # mean tokens and seconds of a step
    start = 0
    for line in lines:
        if "perf/step_time_s" in line:
            step = line["step"]
            mean = (tokens(step) - tokens(start)) / (step - start)
            windows.append((mean, line["perf/step_time_s"]))
            start = step
    if not windows:
        return None
    made, seconds = map(sum, zip(*(windows[1:] or windows), strict=True))
    return round(made / seconds, 1)
