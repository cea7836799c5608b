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

    A folder cannot be replaced in one step, so the old checkpoint of this step is renamed first. If
    the process is killed before the second rename, `restore_replaced` restores the old checkpoint.
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
                # A reader has just restored the old checkpoint under this name: try again.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    except BaseException:
        restore_replaced(final.parent)
        raise
    fsync(final.parent)
    _discard(replaced)


def restore_replaced(directory: Path) -> None:
    """Restore the name of each old checkpoint whose replacement was not completed."""
    for replaced in directory.glob(f".step-*{_REPLACED}"):
        final = replaced.with_name(replaced.name[1:].removesuffix(_REPLACED))
        if not final.exists():
            with contextlib.suppress(OSError):  # for example, this folder is read-only
                os.rename(replaced, final)


def remove(path: Path) -> None:
    """Remove a checkpoint.

    It is renamed first: a partly removed folder must not have the name of a checkpoint.
    """
    renamed = path.with_name(f".{path.name}.removed-{uuid.uuid4().hex[:8]}")
    os.rename(path, renamed)
    if _is_real_folder(renamed):
        shutil.rmtree(renamed)
    else:
        os.unlink(renamed)


def clear(directory: Path) -> None:
    """Remove leftovers of writers that were killed."""
    restore_replaced(directory)
    for leftover in directory.glob(".step-*"):
        _discard(leftover)


def _discard(path: Path) -> None:
    """Remove a folder, file or symlink; errors are ignored."""
    if _is_real_folder(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        os.unlink(path)


def _is_real_folder(path: Path) -> bool:
    """Return whether `path` is a folder. A symlink to a folder is not: its target must stay."""
    return os.path.isdir(path) and not os.path.islink(path)
