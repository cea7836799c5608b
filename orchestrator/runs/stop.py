"""Asks a run to stop, with a file in its folder that rank 0 reads.

The `Listener` of rank 0 finds the file within a few tenths of a second. The request is then sent
with the gradient, so that all ranks stop after the same step and save a checkpoint.
"""

import json
import os
import threading

from orchestrator import files
from orchestrator.runs.folder import RunFolder

FILE_BYTES = 1024  # always the same size: overwriting in place also works on a full disk
POLL_S = 0.1


def request(folder: RunFolder, reason: str) -> None:
    """Ask the run to stop after its current step, or after its next one if it is not training."""
    _write(folder, json.dumps({"reason": reason}))


def requested(folder: RunFolder) -> str | None:
    """Return why the run was asked to stop; None if it was not."""
    try:
        # NFS shows a change only when the file is opened, and caches that a file is missing.
        text = files.read_text(folder.stop_request_file).strip()
    except OSError:  # missing, or not readable at the moment
        return None
    if not text:
        return None
    try:
        return json.loads(text)["reason"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return "asked to stop"


def clear(folder: RunFolder) -> None:
    """Remove the request. The file stays, so that NFS clients notice the next request."""
    _write(folder, "")


def _write(folder: RunFolder, text: str) -> None:
    descriptor = files.opener(folder.stop_request_file, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(descriptor, text.encode()[:FILE_BYTES].ljust(FILE_BYTES), 0)
    finally:
        os.close(descriptor)


class Listener:
    """Reads the file in a thread, so that training never waits for the file system.

    Calling the listener returns whether the run should stop.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._requested = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._listen, name="stop-listener", daemon=True).start()

    def __call__(self) -> bool:
        return self._requested.is_set()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _listen(self) -> None:
        while not self._closed.wait(POLL_S):
            if requested(self._folder):
                self._requested.set()
                return
