"""Folders: created, checked, and held while a run goes on, so that nothing is written elsewhere."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from orchestrator.errors import NO_ROOM, UserError


class MovedError(OSError):
    """The folder of a running run was removed, moved or replaced."""


_held: list[tuple[str, int]] = []  # paths of folders, and their open descriptors


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Let `check_held` refuse to write in another folder at the path of this one."""
    # An open folder keeps its inode: no other folder gets the same number.
    held = (os.path.abspath(folder), os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    _held.append(held)
    try:
        yield
    finally:
        _held.remove(held)
        os.close(held[1])


def check_held(path: str | Path) -> None:
    """Raise MovedError if `path` is in a held folder that is no longer at its path."""
    absolute = os.path.abspath(path)
    for folder, descriptor in list(_held):
        if f"{absolute}/".startswith(f"{folder}/") and not is_at(folder, descriptor):
            raise MovedError(
                f"{folder}: removed or moved while its run was going on; the run has ended, and "
                "nothing was written in its place. Put the folder back to continue it"
            )


def is_at(path: str | Path, descriptor: int) -> bool:
    """Return whether `path` is the open file or folder, and not another one or none."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def make_folder(path: Path) -> None:
    """Create a folder, and those above it, unless it exists."""
    check_held(path)
    path.mkdir(parents=True, exist_ok=True)


def check_writable(folder: Path, field: str) -> None:
    """Raise UserError if `folder` cannot be created or written to. Nothing stays there.

    Args:
        folder: It need not exist.
        field: The field that sets it, for the message.
    """
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        os.rmdir(tempfile.mkdtemp(prefix=".espalier-", dir=existing))
        return
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        problem = "is a file" if os.path.isfile(existing) else f"says: {error.strerror}"
    other = "ESPALIER_STORAGE" if field == "storage" else "storage=…"
    raise UserError(
        f"{field}: {folder} cannot be written to, {existing} {problem}; set {field}=… or {other}"
    )


def missing(path: Path) -> list[Path]:
    """Return the folder and those above it that do not exist, the deepest first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_unused(lock: Path, created: Sequence[Path]) -> None:
    """Remove the folders that we created for a lock if they contain only the lock.

    Args:
        lock: The file.
        created: `missing(lock.parent)`, before the folders were created.
    """
    with contextlib.suppress(OSError):
        if created and os.listdir(lock.parent) == [lock.name]:
            lock.unlink()
            for folder in created:
                folder.rmdir()


def remove_new(folder: Path, before: Container[str]) -> None:
    """Remove what is in a folder, except these names."""
    for path in folder.iterdir():
        if path.name in before:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, by name. Other files, such as .DS_Store, are skipped."""
    return [path for path in sorted(folder.glob("*")) if path.is_dir()]


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder. Those that are removed meanwhile count nothing."""
    # Not Path.rglob: it raises FileNotFoundError if a folder is removed meanwhile.
    return sum(
        file_bytes(os.path.join(parent, name))
        for parent, _, names in os.walk(folder)
        for name in names
    )


def file_bytes(path: str | Path) -> int:
    """Return the size of a file; 0 if it is missing or no file."""
    try:
        found = os.stat(path)
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
