"""Files of a run or a dataset: opened safely, replaced in one step, hashed.

Other users may be able to write to a run folder. Symlinks, pipes and devices in it are therefore
refused. The folder itself may be reached through a symlink.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from orchestrator.errors import NO_ROOM, UserError
from orchestrator.folders import check_held

# `errno` of a lock on a file system without locks, such as Lustre or NFS without its lock service.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
RETRY_S = 15.0
# Reading again does not help: the file is missing, or it may not be read.
_LASTING = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
)
T = TypeVar("T")


class NotPlainFileError(UserError, OSError):
    """The path is a symlink, a folder, a pipe or a device.

    A command reports it as a `UserError`; code that skips unreadable files catches `OSError`.
    """


class DamagedError(UserError):
    """The file is not what this program wrote: it is empty, cut or overwritten."""


def opener(path: str | Path, flags: int) -> int:
    """Open a plain file; pass it as `open(path, opener=opener)`.

    Symlinks are not followed, and opening a pipe does not block. A file is truncated only after it
    is known to be plain.

    Raises:
        NotPlainFileError: The path is something else.
        OSError: The file cannot be opened.
    """
    if flags & os.O_CREAT:
        check_held(path)
    flags_without_truncate = flags & ~os.O_TRUNC
    safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags_without_truncate | safe, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _not_plain(path) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_plain(path)
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _not_plain(path: str | Path) -> NotPlainFileError:
    return NotPlainFileError(
        f"{path}: expected a plain file, found a symlink, folder or device; "
        "remove it and run this command again"
    )


def lock(file: IO[str], operation: int) -> None:
    """Apply `fcntl.flock` to an open file.

    Raises:
        UserError: The file system has no locks.
        OSError: With `LOCK_NB`, another process holds a lock.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{file.name}: its file system has no locks ({error.strerror}), so that two processes "
            "could write to the same files; use a folder on another file system, or mount this one "
            "with locks (Lustre: -o flock; NFS: with lockd, or -o local_lock=flock on one machine)"
        ) from None


def is_plain(path: Path) -> bool:
    """Return whether `path` is a plain file that exists."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def read_bytes(path: Path) -> bytes:
    """Read a plain file; see `opener` for the errors."""
    with open(path, "rb", opener=opener) as file:
        return file.read()


def read_text(path: Path, errors: str = "strict") -> str:
    """Read a plain UTF-8 file; see `opener` for the errors, and `open` for `errors`."""
    with open(path, encoding="utf-8", errors=errors, opener=opener) as file:
        return file.read()


def rewrite(path: Path, text: str) -> None:
    """Replace the content of an existing file in place: processes that have it open see the change.

    A file that does not exist is not created.
    """
    with contextlib.suppress(FileNotFoundError):
        with open(path, "r+", encoding="utf-8", opener=opener) as file:
            file.truncate()
            file.write(text)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replace a file in one step: a reader sees the old content or the new content.

    A symlink at `path` is replaced. The file that it points to does not change.

    Args:
        path: The file. Its folder must exist.
        content: Text is stored as UTF-8.
        durable: Force the content to disk before the file is replaced, so that it survives a power
            failure. Needed for files that other files rely on; costs one fsync.

    Raises:
        OSError: For example, the disk is full. The old file is still there.
    """
    check_held(path)
    data = content.encode() if isinstance(content, str) else content
    # On a full disk, an incomplete file must not keep the last free bytes.
    with replacement(path, durable=False) as temporary, open(temporary, "xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def replacement(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Replace a file in one step by a file that the `with` block writes.

    Yields:
        A temporary path in the same folder. At the end of the block, that file is forced to disk
        if it has to be `durable`, and renamed to `path`. After an exception, it is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)  # Python names only a file that cannot be opened
        raise
    finally:
        temporary.unlink(missing_ok=True)


def patiently(read: Callable[[], T]) -> T:
    """Call `read` again while it raises an OSError that may pass, for at most `RETRY_S`.

    Such errors come from network file systems, disks, and too many open files.
    """
    deadline = time.monotonic() + RETRY_S
    pause = 0.05
    while True:
        try:
            return read()
        except OSError as error:
            is_lasting = isinstance(error, UserError) or error.errno in _LASTING
            if is_lasting or time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file does not exist.

    Raises:
        DamagedError: The file holds something else.
        NotPlainFileError: It is a symlink, a pipe or a device.
        OSError: The file cannot be read at the moment.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        return None
    except NotPlainFileError:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise DamagedError(
            f"{path}: not valid JSON ({error}); restore the file or remove it"
        ) from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: not a JSON object; restore the file or remove it")
    return content


def read_derived(path: Path, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """Read a JSON object that can be made again; None if it is missing or damaged.

    A damaged file is reported once.

    Args:
        path: The file.
        parse: Converts the object. An error of it means that the object is another one.
    """
    try:
        content = read_json(path)
        return None if content is None else parse(content)
    except NotPlainFileError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError):  # DamagedError is a ValueError
        _report_damage(path)
        return None


def having(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a `parse` for `read_derived` that requires some keys."""

    def parse(content: dict[str, Any]) -> dict[str, Any]:
        for key in keys:
            content[key]
        return content

    return parse


@functools.cache
def _report_damage(path: Path) -> None:
    text = "empty, cut or overwritten; it counts as missing, and the next start makes it again"
    print(f"{path}: {text}", file=sys.stderr)


def write_json(path: Path, content: Mapping[str, Any], *, durable: bool = False) -> None:
    """Replace a JSON file in one step; see `write_atomically` for `durable` and the errors."""
    write_atomically(path, json.dumps(content, indent=1), durable=durable)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_symlink(path: Path, target: Path) -> None:
    """Make `path` a symlink to `target`, in place of an earlier symlink or file."""
    if path.is_symlink() and path.readlink() == target:
        return
    check_held(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)
