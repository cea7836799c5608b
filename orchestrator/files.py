"""Files in a run's folder, opened for what they are: a link, a pipe or a device that was planted there is refused.

Eats a path of which only the last part counts: the folder itself may lie behind a link. Yields a plain file, or `NotOwnError`.
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

from orchestrator.errors import UserError


class NotOwnError(UserError, OSError):
    """Not a plain file: for who runs a command one line, for who lives with an unreadable file one more of them."""


def opener(path: str | Path, flags: int) -> int:
    """For `open(…, opener=…)`. Nothing is followed, waited for, or cut before it is known to be a plain file."""
    try:
        fd = os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _refusal(path) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _refusal(path)
        if flags & os.O_TRUNC:
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_plain(path: Path) -> bool:
    """Whether a plain file is there; for who collects what is to be sent."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def read_bytes(path: Path) -> bytes:
    with open(path, "rb", opener=opener) as file:
        return file.read()


def read_text(path: Path) -> str:
    with open(path, encoding="utf-8", opener=opener) as file:
        return file.read()


def rewrite(path: Path, text: str) -> None:
    """Write another text into the file that is there: who has it open sees it. Makes none."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+", encoding="utf-8", opener=opener) as file:
        file.truncate()
        file.write(text)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new one. A link is replaced, not what it leads to."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:  # what fits of it must not take the last room
        temporary.unlink(missing_ok=True)
        raise


def _refusal(path: str | Path) -> NotOwnError:
    return NotOwnError(f"{path}: a link, a folder or a device where a file of the run belongs; remove it and run this again")
