"""Events of a run other than its steps, events.jsonl.

    {"time": "2026-11-27T05:00:00+00:00", "kind": "checkpoint_damaged", "message": "…", "step": 40}

Events are, for example, a damaged checkpoint that was skipped, a hang, an update that was not
applied, or a full disk. Any process of the run may append. The console prints the messages. MLflow
gets the file, and the number of events of each kind as tags.
"""

import json
import os
from datetime import UTC, datetime
from typing import Any

from orchestrator import files
from orchestrator.folders import MovedError
from orchestrator.runs.folder import RunFolder

Event = dict[str, Any]  # time, kind and message; more for some kinds


def note(folder: RunFolder, kind: str, message: str, **facts: Any) -> Event:
    """Append an event and return it. If it cannot be written, for example on a full disk, print it.

    Args:
        folder: Folder of the run or the sweep.
        kind: One word, such as "hang"; see RELIABILITY.md.
        message: One or more lines for the user.
        facts: JSON values, such as `step`.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    event = {"time": now, "kind": kind, "message": message, **facts}
    try:
        _append(folder, json.dumps(event).encode() + b"\n")
    except MovedError:
        raise
    except OSError as error:
        print(f"not noted in {folder.events_file} ({error}): {message}", flush=True)
    return event


def _append(folder: RunFolder, line: bytes) -> None:
    """Append a line with one system call, so that several processes can append."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    descriptor = files.opener(folder.events_file, flags)
    try:
        start = os.fstat(descriptor).st_size
        if start > 0 and os.pread(descriptor, 1, start - 1) != b"\n":
            line = b"\n" + line  # a killed process left an incomplete line
        if os.write(descriptor, line) != len(line):
            os.ftruncate(descriptor, start)
    finally:
        os.close(descriptor)


def read(folder: RunFolder) -> list[Event]:
    """Return all events, oldest first. Lines that are not events are skipped."""
    try:
        data = files.read_bytes(folder.events_file)
    except OSError:  # missing, or not readable at the moment
        return []
    events = []
    for line in data.split(b"\n")[:-1]:
        event = _parse(line)
        if event is not None:
            events.append(event)
    return events


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    return event
