"""How a run is asked to stop in good order: a file in its folder, which the worker that writes looks at.

Eats a reason; yields, some tenths of a second later, a true `Bell` on rank 0. The workers then agree on the step after
which they stop (the question travels with the gradient), and leave a checkpoint of it.
"""

import contextlib
import json
import os
import threading
from pathlib import Path

from orchestrator import files

FILE = "stop.json"
SIZE = 1024  # bytes, always: a full disk has room for what is written over others
POLL_S = 0.1


def ask(run_dir: Path, reason: str) -> None:
    """Ask the run to stop after its step, now or, where nobody trains at the moment, at its next attempt."""
    _write(run_dir, json.dumps({"reason": reason}))


def asked(run_dir: Path) -> str | None:
    """Why the run was asked to stop; None where it was not."""
    try:
        # Opened, not looked up: network file systems show a changed file to who opens it, and remember what was missing.
        text = files.read_text(Path(run_dir) / FILE).strip()
    except OSError:  # not there, or not readable at this moment
        return None
    with contextlib.suppress(
        ValueError, TypeError, LookupError, RecursionError
    ):  # whatever else somebody wrote there
        return json.loads(text)["reason"] if text else None
    return "asked to stop"


def clear(run_dir: Path) -> None:
    """Nobody is asked any more. The file stays, blank (see `asked`)."""
    _write(run_dir, "")


def _write(run_dir: Path, text: str) -> None:
    fd = files.opener(Path(run_dir) / FILE, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(fd, text.encode()[:SIZE].ljust(SIZE), 0)
    finally:
        os.close(fd)


class Bell:
    """Looks at the file from a thread, so that a step never waits for a file system; call it to hear whether it has rung."""

    def __init__(self, run_dir: Path):
        self.run_dir, self._rung, self._closed = Path(run_dir), threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="bell", daemon=True).start()

    def __call__(self) -> bool:
        return self._rung.is_set()

    def close(self) -> None:
        self._closed.set()

    def _listen(self) -> None:
        while not self._closed.wait(POLL_S):
            if asked(self.run_dir):
                self._rung.set()
                return
