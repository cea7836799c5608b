"""What of a folder is mirrored: files that are complete, in an order that a restart can trust."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from orchestrator.checkpoint.format import step_of
from orchestrator.mirror.manifest import is_inside
from orchestrator.runs.folder import RunFolder

# State of processes, and what was set aside.
_SKIPPED = ("hang-rank", "damaged-", "before-")


def groups(folder: Path) -> Iterator[list[str]]:
    """Yield the paths of files that are mirrored together or not at all, by their order.

    Checkpoints come first and each is one group: the journal that is read after a checkpoint has
    all its lines. Then journals: a line that a resume moves is in the journal that is read before
    the aside, or in the aside.
    """
    names = RunFolder(folder)
    skipped = (names.stop_request_file.name, names.tracking_file.name)
    scratch = tuple(f"{names.replays.name}/{report.stem}/" for report in names.replay_files())
    checkpoints: dict[str, list[str]] = {}
    others = []
    for path in _files(folder, ""):
        parent, _, name = path.rpartition("/")
        if step_of(Path(parent)) is not None:
            checkpoints.setdefault(parent, []).append(path)
        elif name not in skipped and not path.startswith(scratch):
            others.append(path)
    yield from checkpoints.values()
    journal = names.journal_file.name
    for path in sorted(others, key=lambda path: (path.rpartition("/")[2] != journal, path)):
        yield [path]


def _files(folder: Path, below: str) -> Iterator[str]:
    """Yield the plain files; those that are being written have names that start with a dot."""
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
