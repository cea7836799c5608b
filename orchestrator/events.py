"""What happened to a run besides its steps: `events.jsonl` in its folder, and a line for whoever watches.

    {"time": "2026-11-27T05:00:00+00:00", "kind": "checkpoint_damaged", "message": "passed over: …", …}

An event is what a person would want to know later: a checkpoint passed over, a hang, an update that was not applied, a
disk that was full, a drift that was allowed, a holder that vanished. Anyone who may write in the folder may note one; a
line is whole or not there. The tracking server gets the file, and the number of events of each kind as tags.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


def note(run_dir: Path, kind: str, message: str, **facts: Any) -> dict[str, Any]:
    """Append one event with one system call, and return it. Never raises for want of room: a full disk is an event itself."""
    event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, "message": message, **facts}
    line = json.dumps(event).encode() + b"\n"
    try:
        fd = os.open(Path(run_dir) / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            start = os.fstat(fd).st_size
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, start)
        finally:
            os.close(fd)
    except OSError as error:
        print(f"not noted in {Path(run_dir) / FILE} ({error}): {message}", flush=True)
    return event


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first."""
    try:
        data = (Path(run_dir) / FILE).read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data.split(b"\n")[:-1]]
