"""One writer at a time: a lock in a run's folder that its holder's end frees, however it ends.

Eats a run's folder; yields the right to write there, or `HeldError` with the holder's name. The lock is the kernel's
(flock), so a holder that was killed, or whose machine is gone, holds nothing any more; its name stays in the file, by
which the next one knows that it vanished. Needs nothing heavy: a second job is refused before it imports torch.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from orchestrator import files
from orchestrator.errors import HeldError

DRIVER, WRITER = (
    ".lock",
    ".writer",
)  # of the run's driver; of the worker that writes, which may outlive it for a moment
SENDER = ".tracking"  # of who sends the run to MLflow, for as long as one attempt takes
PROBE_S = 0.5  # somebody who only asks holds the lock for microseconds


@contextlib.contextmanager
def held(run_dir: Path, name: str = DRIVER, wait_s: float = PROBE_S) -> Iterator[str]:
    """Be the run's only driver (or, with another `name`, its only writing worker or its only sender).

    Yields:
        The name of a holder that vanished without freeing the lock; empty where there was none.

    Raises:
        HeldError: another process holds it, and still after `wait_s` seconds; names it.
    """
    missing = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    with _locked(run_dir, name, time.monotonic() + wait_s) as file:
        vanished = _read(file, "")
        _write(file, _myself())
        try:
            yield vanished
        finally:
            if name == DRIVER:  # a worker's stays: who wrote last
                _write(file, "")
                _leave_nothing(run_dir / name, missing)


def _locked(run_dir: Path, name: str, deadline: float):
    """The open and locked file of that name, as long as it is: a holder that made nothing removes its own."""
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            file = open(run_dir / name, "a+", opener=files.opener)  # noqa: SIM115 - the caller closes it
            if _lock(file, fcntl.LOCK_EX) and os.path.samestat(
                os.fstat(file.fileno()), os.stat(run_dir / name)
            ):
                return file
            holder = _read(file)
            file.close()
            if time.monotonic() >= deadline:
                raise HeldError(f"{run_dir}: held by {holder}")
        time.sleep(0.1)


def _leave_nothing(lock: Path, made: list[Path]) -> None:
    """A holder that was refused, or stopped, before it did anything takes the folders with it that it made."""
    with contextlib.suppress(OSError):
        if made and os.listdir(lock.parent) == [lock.name]:
            os.unlink(lock)
            for folder in made:
                os.rmdir(folder)


def check(run_dir: Path) -> None:
    """Raise HeldError where a driver holds the run now; makes and changes nothing."""
    try:
        with open(run_dir / DRIVER, opener=files.opener) as file:
            if not _lock(file, fcntl.LOCK_SH):
                raise HeldError(f"{run_dir}: held by {_read(file)}")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # what is wrong with the folder is said by who needs it


def _lock(file, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except (
        BlockingIOError,
        PermissionError,
    ):  # other errors are the file system's: no lock, no room
        return False
    return True


def _read(file, otherwise: str = "another process") -> str:
    file.seek(0)
    return file.read().strip() or otherwise


def _write(file, text: str) -> None:
    with contextlib.suppress(
        OSError
    ):  # the name is for people: on a full disk the lock holds without one
        file.truncate(0)
        file.write(text)
        file.flush()


def _myself() -> str:
    job = f", Ray job {os.environ['RAY_JOB_ID']}" if "RAY_JOB_ID" in os.environ else ""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}{job} since {since}"
