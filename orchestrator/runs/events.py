"""What happened to a run besides its steps: `events.jsonl` in its folder, and by `console.py` a line for whoever watches.

    {"time": "2026-11-27T05:00:00+00:00", "kind": "checkpoint_damaged", "message": "passed over: …", …}

An event is what a person would want to know later: a checkpoint passed over, a hang, an update that was not applied, a
disk that was full, a drift that was allowed, a holder that vanished. Anyone who may write in the folder may note one; a
line is whole or not there. The tracking server gets the file, and the number of events of each kind as tags.
"""

import contextlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import files

FILE = "events.jsonl"


def note(run_dir: Path, kind: str, message: str, **facts: Any) -> dict[str, Any]:
    """Append one event with one system call, and return it. Never raises for want of room: a full disk is an event itself."""
    event = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "kind": kind,
        "message": message,
        **facts,
    }
    line = json.dumps(event).encode() + b"\n"
    try:
        fd = files.opener(Path(run_dir) / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            start = os.fstat(fd).st_size
            if (
                start and os.pread(fd, 1, start - 1) != b"\n"
            ):  # torn, by a kill or by a hand: nothing may be glued to it
                line = b"\n" + line
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, start)
        finally:
            os.close(fd)
    except OSError as error:
        print(f"not noted in {Path(run_dir) / FILE} ({error}): {message}", flush=True)
    return event


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; what is none is passed over."""
    try:
        data = files.read_bytes(Path(run_dir) / FILE)
    except OSError:  # not there, or not readable at this moment
        return []
    return [event for event in map(_parsed, data.split(b"\n")[:-1]) if event]


def _parsed(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        event = json.loads(line)
        return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None
    return None
