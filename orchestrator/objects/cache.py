"""Copies of objects on this machine, in folders of limited size in all.

A process that calls `use` uses the folder as long as it lives. When there is no room for a new
copy, folders that no process uses are removed, the least recently used one first.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
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
        return _use(unit_of(path))
    except ValueError:
        raise UserError(
            f"{path}: is not in the cache of this node, {root()}; set XDG_CACHE_HOME to the same "
            "folder on all nodes"
        ) from None


def unit_of(path: Path) -> Path:
    """Return the folder that `use` has returned for a copy.

    Raises:
        ValueError: It is not a path in the cache.
    """
    kind, name = path.relative_to(root()).parts[:2]
    return root() / kind / name


def _use(folder: Path) -> Path:
    private_folder(root(), f"remove it, or set XDG_CACHE_HOME to another folder than {root()}")
    while folder not in _held or not folders.is_at(folder / _USED, _held[folder].fileno()):
        try:
            folders.make_folder(folder)
            file = open(folder / _USED, "a+", opener=files.opener)  # noqa: SIM115 - stays open
        except (FileExistsError, FileNotFoundError):  # the folder was removed during the call
            if folder.is_file():
                raise
            continue
        files.lock(file, fcntl.LOCK_SH)
        if folders.is_at(folder / _USED, file.fileno()):
            _held[folder] = file
        else:
            file.close()
    os.utime(folder / _USED)
    return folder


def make_room(folder: Path, size: int, give_up: Callable[[], object] | None = None) -> None:
    """Remove copies that no process uses until there is room for new ones.

    Args:
        folder: Folder that gets them, see `use`.
        size: Their bytes.
        give_up: Removes what this process does not need of `folder`. It is called last, and only
            if no other process uses the folder.

    Raises:
        UserError: They are larger than the cache may be.
    """
    limit = limit_bytes()
    used = _remove_unused(folder, limit - size, give_up)
    if used + size > limit:
        raise UserError(
            f"{folder}: no room for {size / 1e9:,.1f} GB more, the cache may have "
            f"{limit / 1e9:,.1f} GB and {used / 1e9:,.1f} GB of it are in use; set {VARIABLE} to "
            "more, or XDG_CACHE_HOME to a larger disk"
        )


def _remove_unused(folder: Path, most: int, give_up: Callable[[], object] | None) -> int:
    """Remove folders until at most some bytes are left; return the bytes that are left."""
    with open(root() / ".room", "a", opener=files.opener) as file:
        files.lock(file, fcntl.LOCK_EX)  # no other process removes folders meanwhile
        sizes = {unit: folders.folder_bytes(unit) for unit in _units()}
        for other in sizes:
            if sum(sizes.values()) <= most:
                break
            if other not in _held and _remove(other):
                sizes[other] = 0
        if sum(sizes.values()) > most and give_up is not None:
            _give_up(folder, give_up)
            sizes[folder] = folders.folder_bytes(folder)
    return sum(sizes.values())


def _units() -> list[Path]:
    """Return all folders that `use` has made, the least recently used one first."""
    found = [unit for kind in folders.subfolders(root()) for unit in folders.subfolders(kind)]
    for unit in found:
        if unit.name.startswith("."):
            shutil.rmtree(unit, ignore_errors=True)  # a killed process began to remove it
    return sorted([unit for unit in found if unit.exists()], key=_last_used)


def _last_used(folder: Path) -> float:
    """Return when a folder was used; 0 if it was removed meanwhile, or only in part."""
    try:
        return (folder / _USED).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(folder: Path) -> bool:
    """Remove a folder that no process uses."""
    removed = folder.with_name(f".{folder.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(folder / _USED, "a", opener=files.opener) as file:
            files.lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not folders.is_at(folder / _USED, file.fileno()):
                return False
            os.rename(folder, removed)
    except OSError:  # it is in use, or another process has removed it
        return False
    shutil.rmtree(removed, ignore_errors=True)
    return True


def _give_up(folder: Path, give_up: Callable[[], object]) -> None:
    """Call `give_up` unless another process uses the folder too.

    The lock is lost for a moment, but no other process can remove the folder: `make_room` lets one
    process at a time remove folders.
    """
    with contextlib.suppress(OSError):  # another process uses it
        files.lock(_held[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        give_up()
    files.lock(_held[folder], fcntl.LOCK_SH)
