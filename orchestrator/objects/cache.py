"""Copies of objects on this machine: folders that may be removed, and are, if they grow too many.

A folder of the cache is used by the processes that `use` it, as long as they live. The others are
removed, the least recently used one first, when there is no room for a new copy.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import TextIO

from orchestrator import files, folders
from orchestrator.errors import UserError
from orchestrator.hashes import private_folder
from orchestrator.objects.address import Address
from orchestrator.paths import cache_folder

VARIABLE = "ESPALIER_CACHE_GB"
DEFAULT_GB = 100.0
_USED = ".used"  # locked by each process that uses the folder; its time is that of the last use

_held: dict[Path, TextIO] = {}  # folders that this process uses


def root() -> Path:
    """Return the folder of all copies."""
    return cache_folder() / "objects"


def limit_bytes() -> int:
    """Return the largest size of the cache, $ESPALIER_CACHE_GB."""
    text = os.environ.get(VARIABLE, str(DEFAULT_GB))
    try:
        gigabytes = float(text)
        if gigabytes > 0:
            return int(gigabytes * 1e9)
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{VARIABLE}: '{text}' is no size; give a number of gigabytes, such as 100")


def use(kind: str, address: Address) -> Path:
    """Return the folder for copies from an address, which stays as long as this process lives.

    Args:
        kind: Folders of different kinds do not share copies.
        address: Where the copies come from.
    """
    return _use(root() / kind / hashlib.sha256(str(address).encode()).hexdigest()[:16])


def use_folder_of(path: Path) -> Path:
    """Do the same for the folder that has a copy on another node.

    Raises:
        UserError: This node has another cache.
    """
    try:
        kind, name = path.relative_to(root()).parts[:2]
    except ValueError:
        raise UserError(
            f"{path}: is not in the cache of this node, {root()}; set XDG_CACHE_HOME to the same "
            "folder on all nodes"
        ) from None
    return _use(root() / kind / name)


def _use(folder: Path) -> Path:
    private_folder(root(), f"remove it, or set XDG_CACHE_HOME to another folder than {root()}")
    while folder not in _held:
        folders.make_folder(folder)
        with contextlib.suppress(FileNotFoundError):
            file = open(folder / _USED, "a+", opener=files.opener)  # noqa: SIM115 - stays open
            files.lock(file, fcntl.LOCK_SH)
            # Another process may have removed the folder between the two calls.
            if (folder / _USED).exists() and os.path.samestat(
                os.fstat(file.fileno()), os.stat(folder / _USED)
            ):
                _held[folder] = file
    os.utime(folder / _USED)
    return folder


def make_room(folder: Path, size: int) -> None:
    """Remove copies that no process uses until there is room for new ones.

    Args:
        folder: Folder that gets them, see `use`.
        size: Their bytes.

    Raises:
        UserError: They are larger than the cache may be.
    """
    limit = limit_bytes()
    unused = sorted(root().glob(f"*/*/{_USED}"), key=lambda file: file.stat().st_mtime)
    sizes = {file.parent: folders.folder_bytes(file.parent) for file in unused}
    for other in sizes:
        if sum(sizes.values()) + size <= limit:
            return
        if other not in _held and _remove(other):
            sizes[other] = 0
    if sum(sizes.values()) + size > limit:
        raise UserError(
            f"{folder}: no room for {size / 1e9:,.1f} GB more, the cache may have "
            f"{limit / 1e9:,.1f} GB and {sum(sizes.values()) / 1e9:,.1f} GB of it are in use; set "
            f"{VARIABLE} to more, or XDG_CACHE_HOME to a larger disk"
        )


def _remove(folder: Path) -> bool:
    """Remove a folder that no process uses."""
    try:
        with open(folder / _USED, "r+", opener=files.opener) as file:
            files.lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except OSError:  # it is in use, or another process removes it
        return False
    return True
