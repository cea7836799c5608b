"""Starts of the workers of a run, and their failures, in files of its folder."""

from __future__ import annotations

import contextlib
import os
import traceback
from typing import TYPE_CHECKING, Any

from orchestrator import files, lines
from orchestrator.runs import events
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import hangs, memory
from orchestrator.workers.diagnose import ending_of_tracebacks, failures_of, out_of_memory

if TYPE_CHECKING:
    from orchestrator.train.numerics import Worker

# Attempts in a row that may fail without a new checkpoint, or with the same error (`same_error`).
# Another attempt would fail too.
PATIENCE = 3
# Events that say why workers ended, if there was no checkpoint since.
CAUSES = ("node_lost", "node_silent", "node_back", "resize")


def start_workers_attempt(folder: RunFolder, launch: str, world_size: int) -> int:
    """Append this attempt to attempts.jsonl, and return its number in the whole run, from 1.

    Here an attempt is one start of the workers. In run.json (`identity.begin_attempt`) it is one
    start of the command, during which Ray may start the workers several times.

    Args:
        folder: Folder of the run.
        launch: Name of this call of `fit`. Attempts with another name belong to earlier commands.
        world_size: Number of workers.

    Raises:
        RuntimeError: Another attempt would not help. The ending is recorded, so that Ray's next
            attempt returns at once.
    """
    earlier = _read_attempts(folder)
    same_launch = [attempt for attempt in earlier if attempt["launch"] == launch]
    kill = memory.find_kill(folder) if same_launch else None
    if kill is not None:
        folder.write_ending(out_of_memory(kill))
        raise RuntimeError(kill.by)  # the other ranks wait for this one
    hangs.report(folder)

    step = max(folder.checkpoint_steps(), default=0)
    if [attempt["step"] for attempt in same_launch][-PATIENCE:] == [step] * PATIENCE:
        reason = f"{PATIENCE} attempts in a row failed between step {step} and the next checkpoint"
        folder.write_ending(_last_failure(folder, world_size, reason))
        raise RuntimeError(reason)

    number = len(earlier) + 1
    if same_launch:
        message = f"attempt {number} begins at step {step} on {world_size} worker(s), because "
        message += _cause(folder, step)
        events.note(folder, "restart", message, step=step)
    # `step` is that of the newest checkpoint, `pid` that of rank 0.
    start = {"launch": launch, "step": step, "workers": world_size, "pid": os.getpid()}
    lines.append(folder.attempts_file, start)
    return number


def _cause(folder: RunFolder, step: int) -> str:
    """Return why the workers start again at a step."""
    found: dict[str, str] = {}
    for event in events.read(folder):
        if event["kind"] == "restart":
            found.clear()
        elif event["kind"] in CAUSES and event.get("step") == step:
            found[event["kind"]] = event["message"]
    return found.get("resize") or next(reversed(found.values()), "a worker died")


def _last_failure(folder: RunFolder, world_size: int, reason: str) -> Ending:
    """Return why the last attempt failed."""
    last = failures_of(folder, world_size)
    if not last:
        return Ending("failed", f"{reason}: workers died without a traceback")
    ending = ending_of_tracebacks(folder, last, world_size)
    if ending.kind != "failed":
        return ending
    return Ending("failed", "\n".join([f"{reason}; the last one:", *last]))


def _read_attempts(folder: RunFolder) -> list[dict[str, Any]]:
    found = [lines.parse(line, launch=str, step=int) for line in lines.read(folder.attempts_file)]
    return [attempt for attempt in found if attempt is not None]


def record_failure(folder: RunFolder, worker: Worker, error: Exception) -> None:
    """Store the traceback; record the ending if the next attempt would fail in the same way."""
    store_failure(folder, worker.rank, *failure_of(folder, worker, error))


def failure_of(folder: RunFolder, worker: Worker, error: Exception) -> tuple[str, Ending | None]:
    """Return the traceback, and the ending if the next attempt would fail in the same way."""
    text = "".join(traceback.format_exception(error))
    ending = ending_of_tracebacks(folder, [text], worker.world_size)
    is_lasting = ending.kind in ("user", "again") and not ending.may_be_transient
    return text, ending if is_lasting else None


def store_failure(folder: RunFolder, rank: int, text: str, ending: Ending | None) -> None:
    """Store what `failure_of` has returned."""
    with contextlib.suppress(OSError):  # the driver gets the error itself
        if ending is not None:
            folder.write_ending(ending)
        files.write_atomically(folder.failure_file(rank), text)
