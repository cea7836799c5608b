"""The files of a folder that are mirrored: complete ones, in an order that a restart can trust."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.checkpoint.format import step_of
from orchestrator.mirror import manifest
from orchestrator.mirror.manifest import Part, is_inside, object_name
from orchestrator.objects.address import MOST_KEY_BYTES, Address
from orchestrator.runs.folder import RunFolder

# Starts of names that are not copied: state of processes, and what was set aside.
_SKIPPED = ("hang-rank", "damaged-", "before-")


class Names:
    """Tells which names a copy can have, and remembers those that it cannot have.

    Args:
        address: Address of the copy.
    """

    def __init__(self, address: Address) -> None:
        suffix = object_name("", Part(0, "0" * 64))  # what follows the path in a key
        self._most_bytes = MOST_KEY_BYTES - len((address / suffix).key.encode())
        self._left_out: set[str] = set()
        self._new: list[str] = []

    def are_possible(self, path: str, target: str | None = None) -> bool:
        """Return whether the copy can have a file, or a link to `target`."""
        if target is not None:
            is_possible = manifest.is_link(path, target)
        else:
            is_path = manifest.is_file_path(path)
            is_possible = is_path and len(path.encode()) <= self._most_bytes
        if not is_possible and path not in self._left_out:
            self._left_out.add(path)
            self._new.append(path)
        return is_possible

    def newly_left_out(self) -> str:
        """Return the first three names that were left out since the last call, as a text."""
        names, self._new = self._new, []
        return ", ".join(map(ascii, names[:3])) + (", …" if len(names) > 3 else "")


def groups(folder: Path, can_have: Callable[[str], bool]) -> Iterator[list[str]]:
    """Yield groups of paths, in the order in which they are read. A group is mirrored as a whole.

    Each checkpoint is a group. They come first: a journal that is read later has all lines before
    a checkpoint. Journals come before their asides: if a resume moves a line meanwhile, it is in
    the one or in the other.

    Args:
        folder: The folder.
        can_have: Whether the copy can have a file with this path.
    """
    run = RunFolder(folder)
    skipped = (run.stop_request_file.name, run.tracking_file.name)
    scratch = tuple(f"{run.replays.name}/{report.stem}/" for report in run.replay_files())
    checkpoints: dict[str, list[str]] = {}
    others = []
    for path in filter(can_have, _files(folder, "")):
        parent, _, name = path.rpartition("/")
        if step_of(Path(parent)) is not None:
            checkpoints.setdefault(parent, []).append(path)
        elif name not in skipped and not path.startswith(scratch):
            others.append(path)
    yield from checkpoints.values()
    journal = run.journal_file.name
    for path in sorted(others, key=lambda path: (path.rpartition("/")[2] != journal, path)):
        yield [path]


def _files(folder: Path, below: str) -> Iterator[str]:
    """Yield the plain files. Names that start with a dot are skipped: they are being written."""
    kept = RunFolder(folder).checkpointed_file.name
    try:
        entries = sorted(os.scandir(folder / below), key=lambda entry: entry.name)
    except FileNotFoundError:  # removed meanwhile
        return
    for entry in entries:
        path = f"{below}{entry.name}"
        if entry.name.startswith((".", *_SKIPPED)) and entry.name != kept:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder, f"{path}/")
        elif entry.is_file(follow_symlinks=False):
            yield path


def links(folder: Path) -> dict[str, str]:
    """Return the targets of the symlinks that stay in the folder, by their paths."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", *_SKIPPED))]
        for name in folders + names:
            path = os.path.join(parent, name)
            if not os.path.islink(path) or _is_loop(path):
                continue
            if is_inside(folder, path, target := os.readlink(path)):
                found[os.path.relpath(path, folder)] = target
    return found


def _is_loop(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False
