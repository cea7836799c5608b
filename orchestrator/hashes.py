"""SHA-256 of files. A version of a file that this machine has hashed is not read again.

A `Stamp` identifies a version of a file. It only saves reading: what a file contains is known by
its hash. `$XDG_CACHE_HOME/espalier/sha256/` stores both, one JSON file for each folder of hashed
files. It is used only if no other user can write to it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from orchestrator.errors import UserError
from orchestrator.files import file_sha256, read_json, write_atomically
from orchestrator.paths import cache_folder

# Two writes within this time may leave the same stamp: the kernel updates its clock for files 100
# to 1,000 times a second, and some file systems store whole seconds.
TICK_S = 0.02
LONG_TICK_S = 2.0
CHUNK_BYTES = 4 << 20  # read or written, and hashed while it is in the CPU cache


class Stamp(NamedTuple):
    """A version of a file. Every write changes it: no program can set the ctime back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


Entries = dict[str, tuple[Stamp, str]]  # stamp and SHA-256 of the files of a folder, by name
HashFiles = Callable[[list[str]], Iterable[str]]

_folders: dict[str, Entries] = {}  # what this process has read from the cache or hashed


def stamp(path: str | Path) -> Stamp:
    """Return the version of a file; a symlink is followed."""
    found = os.stat(path)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return Stamp(found.st_size, *times, found.st_ino, found.st_dev)


def private_folder(folder: Path, advice: str = "") -> Path:
    """Create a folder that only this user can write to, unless it exists.

    Args:
        folder: The folder. Its parent may be world-writable.
        advice: What the user can do if others can write to the folder.

    Raises:
        UserError: Others can write to the folder, so what it holds cannot be trusted.
        OSError: It cannot be created.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            f"{folder}: must be a folder that only you can write to (it is "
            f"{stat.filemode(found.st_mode)}, owner {found.st_uid}), because it records the hashes "
            f"of files; {advice}"
        )
    return folder


def known_sha256s(paths: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the files whose present version was hashed before, by path."""
    known = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        entry = _entries(folder).get(name)
        if entry is not None and entry[0] == stamp(path):
            known[path] = entry[1]
    return known


def sha256s(paths: list[str], hash_files: HashFiles | None = None) -> list[str]:
    """Return the SHA-256 of files in the same order; hash those that were not hashed before.

    Args:
        paths: Absolute paths.
        hash_files: Returns the hashes of files; None: threads of this process read them.

    Raises:
        UserError: A file cannot be read.
    """
    try:
        known = known_sha256s(paths)
        missing = [path for path in paths if path not in known]
        if missing:
            stamps = [stamp(path) for path in missing]
            _wait_for_tick(stamps)
            found = (hash_files or hash_here)(missing)
            hashed = dict(zip(missing, zip(stamps, found, strict=True), strict=True))
            _remember(hashed)
            known |= {path: sha256 for path, (_, sha256) in hashed.items()}
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return [known[path] for path in paths]


def hash_here(paths: list[str], contents: Sequence[memoryview] | None = None) -> list[str]:
    """Hash files in threads of this process, many small ones in one call.

    Args:
        paths: The files.
        contents: Memory of the size of each file; its content is stored there. None: nowhere.
    """
    if contents is not None:
        with ThreadPoolExecutor() as threads:
            return list(threads.map(_read_and_hash, paths, contents))
    size = -(-len(paths) // 64)
    groups = [paths[first : first + size] for first in range(0, len(paths), size or 1)]
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda group: [file_sha256(path) for path in group], groups)
        return list(itertools.chain(*found))


def _read_and_hash(path: str, content: memoryview) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(content[:CHUNK_BYTES]):
            digest.update(content[:read])
            content = content[read:]
    return digest.hexdigest()


def _wait_for_tick(stamps: Iterable[Stamp]) -> None:
    """Wait until a write would give each file another ctime than it has in its stamp.

    The clock of a file server may differ from ours, so a ctime does not tell how old it is.
    """
    has_seconds = any(found.ctime_ns % 10**9 == 0 for found in stamps)
    time.sleep(LONG_TICK_S if has_seconds else TICK_S)


# ---- the cache ----


def forget() -> None:
    """Forget what this process knows; the cache is read again."""
    _folders.clear()


def _file_of(folder: str) -> Path:
    """Return the cache file of a folder. A shared home has files of several machines."""
    key = f"{socket.gethostname()}:".encode() + os.fsencode(folder)
    return cache_folder() / "sha256" / f"{hashlib.sha256(key).hexdigest()[:32]}.json"


def _entries(folder: str) -> Entries:
    """Return what is known of a folder. A cache that others can write to is not used."""
    if folder not in _folders:
        _folders[folder] = {}
        file = _file_of(folder)
        with contextlib.suppress(OSError, ValueError, TypeError):
            if file.exists():
                private_folder(file.parent)
                stored = read_json(file) or {}
                _folders[folder] = {n: (Stamp(*s), str(h)) for n, (s, h) in stored.items()}
    return _folders[folder]


def _remember(hashed: Mapping[str, tuple[Stamp, str]]) -> None:
    """Store hashes by path. If the cache cannot be written, this process still knows them."""
    folders: dict[str, Entries] = {}
    for path, entry in hashed.items():
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = entry
    for folder, entries in folders.items():
        _folders[folder] = _entries(folder) | entries
        with contextlib.suppress(OSError, UserError):
            file = _file_of(folder)
            private_folder(file.parent)
            write_atomically(file, json.dumps(_folders[folder]))
            file.chmod(0o600)
