"""Writes checkpoints that are complete or absent, finds the newest valid one, removes others.

A commit writes and fsyncs all files under a temporary name, the manifest last; then it renames the
folder and fsyncs its parent. A kill or a power failure at any point leaves complete checkpoints.

A run's `checkpoints/` has one writer, which holds the lock of the run. Readers may come at any
time: a checkpoint that they have listed may be removed or replaced while they read it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.folders import clear, remove, rename, restore_replaced
from orchestrator.checkpoint.format import (
    FORMAT,
    MANIFEST,
    CheckpointManifest,
    Part,
    manifest_text,
    path_of,
    read_manifest,
    reading,
    refuse_outage,
    steps,
    verify,
)
from orchestrator.checkpoint.tensor_file import TensorFile, Wanted
from orchestrator.checkpoint.tensor_read import load_tensors as load_tensors
from orchestrator.checkpoint.tensor_read import stored_weights_sha256 as stored_weights_sha256
from orchestrator.checkpoint.tensor_read import weights_sha256 as weights_sha256
from orchestrator.errors import UnreadableError, UserError
from orchestrator.files import fsync
from orchestrator.folders import check_held
from orchestrator.hashes import CHUNK_BYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SPARE_BYTES = 1 << 20  # left free for the journal and other small files of the run

Parts = Mapping[str, bytes | memoryview]  # content of each file by its name


# ---- writing ----


def parts_of(files: Mapping[str, TensorFile], texts: Mapping[str, str]) -> Parts:
    """Return the content of all files of a checkpoint but the manifest."""
    parts: dict[str, bytes | memoryview] = {}
    for name, file in files.items():
        parts[f"{name}.safetensors"] = file.data
    for name, text in texts.items():
        parts[name] = text.encode()
    return parts


def commit(directory: Path, step: int, parts: Parts, facts: Mapping[str, Any]) -> Path:
    """Write one checkpoint from the content of its files, and return its folder.

    Raises:
        OSError: The checkpoint was not written, and the one that it would replace is still there.
            The disk is full if its errno is in `errors.NO_ROOM`. This is checked before the
            first write, if the file system reports its free space.
    """
    temporary = begin(directory, step, sum(len(content) for content in parts.values()))
    with discarded_on_error(temporary):
        return finish(temporary, step, write(temporary, parts), facts)


def begin(directory: Path, step: int, size: int) -> Path:
    """Create the temporary folder of a checkpoint of `size` bytes; see `commit` for the errors."""
    directory = Path(directory)
    if not directory.is_dir():
        check_held(directory)
        directory.mkdir(exist_ok=True)  # not its parent: that of a running run may be moved
        fsync(directory.parent)
    clear(directory)  # first: leftovers take space that this checkpoint may need
    _require_space(directory, size)
    temporary = directory / f".{path_of(directory, step).name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    os.mkdir(temporary)
    return temporary


def write(temporary: Path, parts: Parts) -> dict[str, Part]:
    """Write files of a checkpoint. Return their entries in the manifest."""
    return {name: _write(temporary / name, parts[name]) for name in sorted(parts)}


def finish(
    temporary: Path,
    step: int,
    entries: Mapping[str, Part],
    facts: Mapping[str, Any],
    format_: int = FORMAT,
) -> Path:
    """Write the manifest of a checkpoint whose files are written; return its final folder."""
    _write(temporary / MANIFEST, manifest_text(step, entries, facts, format_).encode())
    fsync(temporary)
    final = path_of(temporary.parent, step)
    rename(temporary, final)
    return final


@contextlib.contextmanager
def discarded_on_error(temporary: Path) -> Iterator[None]:
    """Remove a temporary folder if an error ends the `with` block."""
    try:
        yield
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _require_space(directory: Path, size: int) -> None:
    """Refuse to start a checkpoint that would take the last free bytes from the journal."""
    disk = os.statvfs(directory)
    if not disk.f_blocks:  # some network file systems do not report their size
        return
    free = disk.f_bavail * disk.f_frsize
    needed = size + SPARE_BYTES
    if free < needed:
        reason = f"{os.strerror(errno.ENOSPC)}: {free:,} bytes free, {needed:,} needed"
        raise OSError(errno.ENOSPC, reason, str(directory))


def _write(path: Path, content: bytes | memoryview) -> Part:
    """Write, hash and fsync one file, and return its entry in the manifest."""
    digest = hashlib.sha256()
    view = memoryview(content)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            digest.update(chunk)
            while chunk:
                written = os.write(descriptor, chunk)
                chunk = chunk[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": len(view), "sha256": digest.hexdigest()}


# ---- finding ----


def latest_valid(
    directory: Path,
    warn: Callable[[str], None] = print,
    *,
    set_aside: bool = False,
    read: Callable[[Path], object] | None = None,
) -> Path | None:
    """Return the newest checkpoint that passes `verify`; None if there is none.

    Args:
        directory: The run's `checkpoints/`.
        warn: Called once with a message for each damaged checkpoint that is skipped.
        set_aside: Rename damaged checkpoints, so that their steps can be written again. Only the
            writer of the run may do this.
        read: Reads and verifies a checkpoint, with the errors of `verify`; None: `verify`.

    Raises:
        UnreadableError: A checkpoint, or the disk, cannot be read at the moment. It may be valid,
            and a run that continued from an older one could not go back. Nothing is renamed.
    """
    directory = Path(directory)
    # By inode: a replaced checkpoint has another one.
    skipped: dict[int | None, tuple[Path, UserError]] = {}
    found = None
    while found is None:
        listed = reading(directory, lambda: _restored_steps(directory))
        is_changed = False
        for step in reversed(listed):
            path = path_of(directory, step)
            inode = _inode(path)
            if inode in skipped:
                continue
            try:
                (read or verify)(path)
                found = path
                break
            except UserError as error:
                if inode is None or _inode(path) != inode:
                    # The writer removed or replaced it, so there is a newer one. List again.
                    is_changed = True
                    break
                if isinstance(error, UnreadableError):
                    raise
                skipped[inode] = (path, error)
                refuse_outage([problem for _, problem in skipped.values()])
        if not is_changed and steps(directory) == listed:
            break
    for path, problem in skipped.values():
        _skip(path, problem, warn, set_aside)
    return found


def _restored_steps(directory: Path) -> list[int]:
    restore_replaced(directory)
    return steps(directory)


def _skip(path: Path, error: UserError, warn: Callable[[str], None], set_aside: bool) -> None:
    """Report a damaged checkpoint, and rename it if `set_aside`; see `latest_valid`."""
    if not set_aside:
        warn(f"skipped: {error}")
        return
    damaged = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, damaged)
    warn(f"skipped: {error}; now {damaged.name}")


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return None


def best(directory: Path) -> int | None:
    """Return the step of the checkpoint with the lowest val loss; of equal ones, the earliest.

    None if no checkpoint is of a step that was evaluated. Damaged checkpoints are skipped.

    Raises:
        UnreadableError: A checkpoint cannot be read at the moment.
    """
    scored = []
    for step in steps(directory):
        try:
            manifest = read_manifest(path_of(directory, step))
        except UnreadableError:
            raise
        except UserError:
            continue
        loss = manifest.get("metrics", {}).get("val/loss")
        if loss is not None and math.isfinite(loss):
            scored.append((loss, step))
    return min(scored)[1] if scored else None


# ---- reading ----


class Content:
    """Files of a verified checkpoint in the folder `path`, and its manifest."""

    def __init__(self, path: Path, manifest: CheckpointManifest | None = None) -> None:
        self.path = path
        self.manifest = manifest or read_manifest(path)

    def text(self, name: str) -> str:
        """Return the content of a text file."""
        return reading(self.path, lambda: (self.path / name).read_text("utf-8"))

    def tensors(
        self,
        group: str,
        device: str | torch.device = "cpu",
        wanted: Wanted | None = None,
    ) -> dict[str, Tensor]:
        """Return the tensors of a group: "model", "optimizer" or "ema"; see `assemble`."""
        return load_tensors(self.path, group, device, wanted)


# ---- removing; only for the writer ----


def prune(directory: Path, keep: int) -> None:
    """Remove leftovers of commits, and all checkpoints but the newest `keep` and the best one.

    If a checkpoint cannot be read at the moment, it may be the best one: nothing is removed now.
    """
    try:
        best_step = best(directory)
    except UnreadableError:
        return
    for step in steps(directory)[:-keep]:
        if step != best_step:
            remove(path_of(directory, step))
    clear(directory)


def keep_only(directory: Path, step: int | None) -> None:
    """Remove all checkpoints but the one of `step`. None: remove all."""
    for other in steps(directory):
        if other != step:
            remove(path_of(directory, other))
