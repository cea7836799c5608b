"""Locks in a run folder: one driver, one writing worker and one sender to MLflow at a time.

The locks are kernel locks (flock): a lock is released when its holder ends, also if the holder is
killed or its machine fails. The file contains the name of the holder, which a holder that ends
normally removes. A name in a free lock therefore means that the last holder was killed.

This module imports nothing heavy: a second job is refused before torch is imported.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from orchestrator import files, folders
from orchestrator.errors import HeldError, UserError
from orchestrator.runs.folder import RunFolder

PROBE_S = 0.5  # long enough for `refuse_if_held`, which holds a lock for microseconds
RETRY_S = 0.1
# On a network file system, the lock of a lost machine is freed when its lease ends, usually after
# 90 s.
WRITER_WAIT_S = 120


@contextlib.contextmanager
def held(file: Path, wait_s: float = PROBE_S) -> Iterator[str | None]:
    """Hold a lock inside the `with` block.

    Args:
        file: A lock of a `RunFolder`, such as `folder.driver_lock`. Missing folders are created,
            and removed at the end if nothing was written to them.
        wait_s: Time to wait for another holder.

    Yields:
        The name of the last holder if it was killed, else None.

    Raises:
        HeldError: Another process still holds the lock after `wait_s`. The message names it.
    """
    created = folders.missing(file.parent)
    try:
        acquired = _acquire(file, time.monotonic() + wait_s)
    except UserError:  # the file system has no locks
        folders.remove_unused(file, created)
        raise
    with acquired as opened:
        killed_holder = _read_name(opened)
        _write_name(opened, own_name())
        try:
            yield killed_holder
        finally:
            _write_name(opened, "")
            folders.remove_unused(file, created)


def refuse_if_held(folder: RunFolder) -> None:
    """Raise HeldError if a driver holds the lock of the run. Nothing is created or changed."""
    try:
        with open(folder.driver_lock, opener=files.opener) as file:
            if not _try_lock(file, fcntl.LOCK_SH):
                raise _held_error(folder.driver_lock, file)
    except files.NotPlainFileError:
        raise
    except OSError:
        return  # no run yet, or a lock that this user may not open


def wait_for_writer(folder: RunFolder) -> None:
    """Wait until no worker of a killed driver writes or removes checkpoints any more.

    Raises:
        HeldError: One still does after `WRITER_WAIT_S`.
    """
    if not folder.writer_lock.exists():
        return
    try:
        with held(folder.writer_lock):
            return
    except HeldError as error:
        print(f"{error}; waiting for its end, for {WRITER_WAIT_S} s at most", flush=True)
    with held(folder.writer_lock, WRITER_WAIT_S):
        pass


def _acquire(path: Path, deadline: float) -> TextIO:
    """Return the open, locked file. Closing it releases the lock."""
    while True:
        folders.make_folder(path.parent)
        # Another process may remove the folder now, if it created it and wrote nothing else. Then
        # opening fails, or the file that we locked is no longer the one at this path.
        with contextlib.suppress(FileNotFoundError):
            file = open(path, "a+", opener=files.opener)  # noqa: SIM115 - the caller closes it
            if _try_lock(file, fcntl.LOCK_EX) and _is_at(path, file):
                return file
            error = _held_error(path, file)
            file.close()
            if time.monotonic() >= deadline:
                raise error
        time.sleep(RETRY_S)


def _is_at(path: Path, file: TextIO) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def _try_lock(file: TextIO, kind: int) -> bool:
    """Lock the file. Return False if another process holds a lock."""
    try:
        files.lock(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _held_error(path: Path, file: TextIO) -> HeldError:
    return HeldError(f"{path.parent}: held by {_read_name(file) or 'another process'}")


def _read_name(file: TextIO) -> str | None:
    file.seek(0)
    return file.read().strip() or None


def _write_name(file: TextIO, name: str) -> None:
    # The name is only for messages. On a full disk, the lock works without it.
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(name)
        file.flush()


def own_name() -> str:
    """Return the name of this process for messages of others."""
    job = f", Ray job {os.environ['RAY_JOB_ID']}" if "RAY_JOB_ID" in os.environ else ""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}{job} since {since}"
