"""Events of a run other than its steps, events.jsonl.

    {"time": "2026-11-27T05:00:00+00:00", "kind": "checkpoint_damaged", "message": "…", "step": 40}

Events are, for example, a damaged checkpoint that was skipped, a hang, an update that was not
applied, or a full disk. Any process of the run may append. The console prints the messages. MLflow
gets the file, and the number of events of each kind as tags.
"""

from datetime import UTC, datetime
from typing import Any

from orchestrator import lines
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
        lines.append(folder.events_file, event)
    except MovedError:
        raise
    except OSError as error:
        print(f"not noted in {folder.events_file} ({error}): {message}", flush=True)
    return event


def read(folder: RunFolder) -> list[Event]:
    """Return all events, oldest first. Lines that are not events are skipped."""
    try:
        found = [lines.parse(line, kind=str) for line in lines.read(folder.events_file)]
    except OSError:  # not readable at the moment
        return []
    return [event for event in found if event is not None]
