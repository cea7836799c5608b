"""Finds the files of a path, folder or glob.

One rule for folders and globs: hidden names are skipped, links are followed, and each file is taken
once, also if it has several names.
"""

import fnmatch
import glob
import os
import stat
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from orchestrator.errors import UserError

LeftOut = dict[str, list[str]]  # names of files that are not read, by the reason


class MissingCorpusError(UserError):
    """The files of an entry are not on this machine. Its dataset may be."""


def fixed_part(path: Path) -> tuple[Path, list[str]]:
    """Return the folder that a glob starts from, and the pattern below it.

    A part of the path that exists is not a pattern. If there is no pattern, the first value is the
    path itself.
    """
    parts = list(path.parts)
    base = Path(parts.pop(0))
    while parts and (not glob.has_magic(parts[0]) or os.path.lexists(base / parts[0])):
        base /= parts.pop(0)
    return base, parts


def expand(base: Path, pattern: list[str], left_out: LeftOut) -> list[Path]:
    """Return the files below a folder that match a pattern; all of them if there is no pattern.

    Raises:
        UserError: A folder cannot be read, or a link leads nowhere.
    """
    if "**" not in pattern and pattern:
        return _once(base, _glob(base, pattern), left_out)
    start = pattern.index("**") if pattern else 0
    rest = pattern[start:] or ["**"]
    hidden = any(part.startswith(".") for part in rest)
    found: list[str] = []
    for folder in map(Path, sorted(_glob(base, pattern[:start]))):
        if identity(folder) and folder.is_dir():
            paths = _files_below(folder, hidden, left_out)
            if rest != ["**"]:
                names = zip(paths, below(folder, paths), strict=True)
                paths = [path for path, name in names if matches(name.split("/"), rest)]
            found += paths
    return _once(base, found, left_out)


def _glob(base: Path, pattern: Sequence[str]) -> list[str]:
    """Return the paths that match a pattern without `**`, in any order.

    Python's `glob` passes over folders that cannot be read.
    """
    paths = [str(base)]
    for part in pattern:
        if glob.has_magic(part):
            children = [child for path in paths for child in _children(path)]
            paths = [child.path for child in children if matches([child.name], [part])]
        else:
            paths = list(filter(os.path.lexists, (os.path.join(path, part) for path in paths)))
    return paths


def _children(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, by name; nothing if it is a file."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda child: child.name)
    except NotADirectoryError:
        return []
    except OSError as error:
        raise UserError(f"data.corpus: {folder} cannot be read ({error.strerror})") from None


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a glob, as in Python's `glob`."""
    if not pattern:
        return not parts
    if pattern[0] != "**":
        return (
            len(parts) > 0
            and fnmatch.fnmatchcase(parts[0], pattern[0])
            and (_is_visible(parts[0]) or pattern[0].startswith("."))
            and matches(parts[1:], pattern[1:])
        )
    if matches(parts, pattern[1:]):
        return True
    return len(parts) > 0 and _is_visible(parts[0]) and matches(parts[1:], pattern)


def _files_below(base: Path, hidden: bool, left_out: LeftOut) -> list[str]:
    """Return the files below a folder.

    Each folder is entered once, and before the links to it. So a loop of links ends, and a file is
    found under its own name.
    """
    found = []
    entered = set()
    folders = deque([base])
    links: deque[Path] = deque()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        key = identity(folder)
        if key in entered:
            continue
        entered.add(key)
        for child in _children(folder):
            if not hidden and not _is_visible(child.name):
                left_out["hidden"].append(child.name)
            elif child.is_dir(follow_symlinks=False):
                folders.append(Path(child.path))
            elif child.is_symlink() and os.path.isdir(child.path):
                links.append(Path(child.path))
            else:
                found.append(child.path)
    return found


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _once(base: Path, paths: Iterable[str], left_out: LeftOut) -> list[Path]:
    """Return each file once, under its own name if that is among the paths.

    The paths are texts: there may be 100,000, and a `Path` costs as much as a system call.
    """
    same_file: dict[tuple[int, int, int], list[str]] = {}
    for path in sorted(set(paths)):
        found = _stat(path)
        key = (found.st_mode, found.st_dev, found.st_ino)
        same_file.setdefault(key, []).append(path)
    files = []
    for (mode, *_), names in same_file.items():
        first = names[0]
        if len(names) > 1:
            first = _own_name(base, names)
        if stat.S_ISREG(mode):
            files.append(Path(first))
            others = [path for path in names if path != first]
            if others:
                left_out["another name of a file"] += below(base, others)
        else:
            kind = "folder" if stat.S_ISDIR(mode) else "device or pipe"
            left_out[kind].append(os.path.basename(first))
    return files


def _own_name(base: Path, names: list[str]) -> str:
    """Return the first name that leads to a file without a link below `base`, or the first."""
    own = os.path.realpath(base)
    for path, name in zip(names, below(base, names), strict=True):
        if os.path.realpath(path) == os.path.join(own, name):
            return path
    return names[0]


def below(base: Path, paths: Iterable[str | Path]) -> list[str]:
    """Return paths relative to `base`, in a tenth of the time of `Path.relative_to`."""
    start = len(os.path.join(base, ""))
    return [str(path)[start:] for path in paths]


def identity(path: Path) -> tuple[int, int]:
    """Return device and inode of a file, which all its names share."""
    found = _stat(path)
    return found.st_dev, found.st_ino


def _stat(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError:
        refuse_missing(Path(path))


def refuse_missing(path: Path) -> NoReturn:
    """Raise the UserError of a path that cannot be opened."""
    if path.is_symlink():
        raise UserError(
            f"data.corpus: {path} is a link to {os.readlink(path)}, which cannot be opened; "
            "remove the link, or restore the file"
        )
    raise MissingCorpusError(f"data.corpus: {path} does not exist")


def check_unchanged(
    name: str, path: str | Path, size: int | None, modified: int | None = None
) -> None:
    """Raise UserError if a file has another size or time of the last write, or was deleted."""
    try:
        found = os.stat(path)
        if found.st_size == size and modified in (None, found.st_mtime_ns):
            return
        change = "changed"
    except FileNotFoundError:
        change = "deleted"
    raise UserError(
        f"data.corpus: {name} was {change} while it was prepared; run the same command again when "
        "the corpus is complete"
    )
