"""Renames and removes checkpoint folders so that a kill at any point leaves complete checkpoints.

A folder with the name of a checkpoint is complete. Folders that are being written, replaced or
removed have names that start with a dot.
"""

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path

from orchestrator.files import fsync

_REPLACED = ".aside"  # end of the name of a checkpoint that is being replaced


def rename(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name.

    A folder cannot be replaced in one step. The old checkpoint of this step is renamed first; if we
    are killed before the second step, `restore_replaced` gives it its name back.
    """
    replaced = final.with_name(f".{final.name}{_REPLACED}")
    try:
        while True:
            if os.path.lexists(final):
                _discard(replaced)
                os.rename(final, replaced)
            try:
                os.rename(temporary, final)
                break
            except OSError as error:
                # A reader has just given the old one its name back: try again.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    except BaseException:
        restore_replaced(final.parent)
        raise
    fsync(final.parent)
    _discard(replaced)


def restore_replaced(directory: Path) -> None:
    """Give checkpoints their names back whose replacement was not completed."""
    for replaced in directory.glob(f".step-*{_REPLACED}"):
        final = replaced.with_name(replaced.name[1:].removesuffix(_REPLACED))
        if not final.exists():
            with contextlib.suppress(OSError):  # for example, we may only read this folder
                os.rename(replaced, final)


def remove(path: Path) -> None:
    """Remove a checkpoint.

    It is renamed first: a folder that is half removed must not have the name of a checkpoint.
    """
    doomed = path.with_name(f".{path.name}.removed-{uuid.uuid4().hex[:8]}")
    os.rename(path, doomed)
    if _is_real_folder(doomed):
        shutil.rmtree(doomed)
    else:
        os.unlink(doomed)


def clear(directory: Path) -> None:
    """Remove leftovers of writers that were killed."""
    restore_replaced(directory)
    for leftover in directory.glob(".step-*"):
        _discard(leftover)


def _discard(path: Path) -> None:
    """Remove what can be removed; errors are ignored."""
    if _is_real_folder(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        os.unlink(path)


def _is_real_folder(path: Path) -> bool:
    """Return whether it is a folder and not a symlink to one, whose target is not ours."""
    return os.path.isdir(path) and not os.path.islink(path)
