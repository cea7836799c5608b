"""A checkpoint is a folder `step-00000100/`: safetensors for tensors, text for the rest, and `MANIFEST.json`.

Eats named tensors and texts; yields a folder that is either whole or not there. Parts are written under a temporary
name and fsynced, the manifest (size and SHA-256 of every part, and of itself) last, then the folder is renamed and its
parent fsynced. Nothing is unpickled. safetensors has no checksum of its own: a flipped bit would load without a word.

A folder has one writer. Readers may come at any moment: what they list may be pruned or replaced while they read it.
"""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from orchestrator.checkpoint import tensor_file
from orchestrator.checkpoint.format import (
    FORMAT,
    MANIFEST,
    digest_of,
    path_of,
    read_manifest,
    step_of,
    steps,
    text_of,
    verify,
)
from orchestrator.errors import UnreadableError, UserError
from orchestrator.files import fsync

__all__ = [
    "MANIFEST",
    "best",
    "clear",
    "commit",
    "keep_only",
    "latest_valid",
    "load_tensors",
    "parts_of",
    "path_of",
    "prune",
    "read_manifest",
    "remove",
    "save",
    "step_of",
    "steps",
    "verify",
    "weights_sha256",
]
SPARE_BYTES = 1 << 20  # left to the journal and whatever else a run writes meanwhile
_CHUNK = 4 << 20  # bytes hashed and written at a time, while they are in the processor's cache
_ASIDE = ".aside"


def save(
    directory: Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    texts: dict[str, str],
    facts: dict[str, Any],
) -> Path:
    """Commit one checkpoint, here and now; returns its folder. A checkpoint of the same step is replaced.

    Args:
        directory: the run's `checkpoints/`.
        tensors: `{"model": {name: tensor}, …}`, one safetensors file each.
        texts: `{"experiment.yaml": …}`, stored as they are.
        facts: JSON values for the manifest: fingerprints, metrics.
    """
    return commit(directory, step, parts_of(tensor_file.fill({}, tensors), texts), facts)


def parts_of(
    files: dict[str, tensor_file.TensorFile], texts: dict[str, str]
) -> dict[str, bytes | memoryview]:
    """The bytes of a checkpoint's parts, by the names of their files."""
    return {f"{name}.safetensors": file.data for name, file in files.items()} | {
        k: v.encode() for k, v in texts.items()
    }


def commit(
    directory: Path, step: int, parts: dict[str, bytes | memoryview], facts: dict[str, Any]
) -> Path:
    """Make the folder of `step` out of the bytes of its parts. Leaves nothing behind where it fails, and what was there as it was.

    Raises:
        OSError: with an errno of `NO_ROOM` where there is no room, found before anything is written where the system says so.
    """
    directory = Path(directory)
    _make(directory)
    clear(directory)  # also for the room that what a killed writer left behind takes
    _require_room(directory, sum(len(data) for data in parts.values()))
    final = path_of(directory, step)
    temporary = directory / f".{final.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        os.mkdir(temporary)
        written = {name: _write(temporary / name, data) for name, data in sorted(parts.items())}
        manifest = {"format": FORMAT, "step": step, "parts": written, **facts}
        manifest["sha256"] = digest_of(manifest)
        _write(temporary / MANIFEST, text_of(manifest).encode())
        fsync(temporary)
        _replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def latest_valid(directory: Path, warn=print, *, set_aside: bool = False) -> Path | None:
    """The newest checkpoint whose every byte is as written, or None; `warn` is told once of each one that is passed over.

    Args:
        set_aside: for the folder's writer alone: what is passed over loses its name, and stays for whoever wants to look.

    Raises:
        UnreadableError: with `set_aside`, where one cannot be read at this moment: it may be as sound as ever, and a writer
            that goes on from an older one could not go back. A bad sector is damage.
    """
    damaged: set[int] = set()
    while True:
        _put_back(Path(directory))
        listed = steps(directory)
        found, passed_over, moved = _first_valid(directory, listed, damaged)
        for inode, (path, error) in passed_over.items():
            if set_aside and isinstance(error, UnreadableError) and error.errno != errno.EIO:
                raise error
            damaged.add(inode)
            warn(f"passed over: {error}{f'; now {_set_aside(path).name}' if set_aside else ''}")
        # One that vanishes while it is read was pruned or replaced by the run's writer: then there is a newer one.
        if found or (not moved and steps(directory) == listed):
            return found


def _first_valid(
    directory: Path, listed: list[int], known: set[int]
) -> tuple[Path | None, dict[int, tuple[Path, UserError]], bool]:
    """(the newest valid one, by inode those after it that are not, whether one vanished before any was found)."""
    damaged: dict[int, tuple[Path, UserError]] = {}
    for path in (path_of(directory, step) for step in reversed(listed)):
        inode = _inode(path)
        if inode in known:
            continue
        try:
            verify(path)
            return path, damaged, False
        except UserError as error:
            if inode is None or _inode(path) != inode:
                return None, damaged, True
            damaged[inode] = path, error
    return None, damaged, False


def _set_aside(path: Path) -> Path:
    """Else it would stand for the latest step until the run gets there again."""
    aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, aside)
    return aside


def _inode(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return os.lstat(path).st_ino
    return None


def load_tensors(
    path: Path, name: str, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """The tensors of part `name`; verify first."""
    return load_file(path / f"{name}.safetensors", device=str(device))


def best(directory: Path) -> int | None:
    """Step of the checkpoint with the lowest val loss at its own step (the earliest of equals), or None."""
    return _best(directory, steps(directory))


def _best(directory: Path, among: list[int]) -> int | None:
    scored = []
    for step in among:
        with contextlib.suppress(UserError):
            loss = read_manifest(path_of(directory, step)).get("metrics", {}).get("val/loss")
            scored += (
                [(loss, step)] if isinstance(loss, (int, float)) and math.isfinite(loss) else []
            )
    return min(scored)[1] if scored else None


def prune(directory: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints and the best one, and what killed writers left behind."""
    made = steps(directory)
    spared = _best(directory, made)
    for step in made[:-keep]:
        if step != spared:
            remove(path_of(directory, step))
    clear(directory)


def keep_only(directory: Path, step: int | None) -> None:
    """Remove all checkpoints but the one of `step` (None: all of them)."""
    for other in steps(directory):
        if other != step:
            remove(path_of(directory, other))


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the sorted names and raw float32 bytes of a model's weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _make(directory: Path) -> None:
    """The run's `checkpoints/`; its name is on the disk before anything in it is."""
    if not directory.is_dir():
        os.makedirs(directory, exist_ok=True)
        fsync(directory.parent)


def _require_room(directory: Path, wanted: int) -> None:
    """A torn checkpoint would take the last byte from the journal; quotas are met only where they are exceeded."""
    room = os.statvfs(directory)
    free = room.f_bavail * room.f_frsize
    if room.f_blocks and free < wanted + SPARE_BYTES:  # some network file systems know no sizes
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: {free:,} bytes free, {wanted + SPARE_BYTES:,} needed",
            str(directory),
        )


def _write(path: Path, data: bytes | memoryview) -> dict[str, Any]:
    """Write, hash and fsync one part; returns its entry in the manifest."""
    digest, view = hashlib.sha256(), memoryview(data)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            digest.update(chunk)
            while chunk:
                chunk = chunk[os.write(fd, chunk) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    return {"size": len(view), "sha256": digest.hexdigest()}


def _replace(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name. One that bears it already steps aside until then, and `_put_back` finds it."""
    aside = final.with_name(f".{final.name}{_ASIDE}")
    try:
        while True:
            if os.path.lexists(final):
                _discard(aside)
                os.rename(final, aside)
            try:
                os.rename(temporary, final)
                break
            except OSError as error:
                if error.errno not in (
                    errno.ENOTEMPTY,
                    errno.EEXIST,
                ):  # a reader put the old one back in this moment
                    raise
    except BaseException:
        _put_back(final.parent)
        raise
    fsync(final.parent)
    _discard(aside)


def _put_back(directory: Path) -> None:
    """Undo the first half of a replacement whose writer was killed before the second."""
    for aside in directory.glob(f".step-*{_ASIDE}"):
        final = aside.with_name(aside.name[1:].removesuffix(_ASIDE))
        if not final.exists():
            with contextlib.suppress(OSError):  # a folder that may only be read
                os.rename(aside, final)


def remove(path: Path) -> None:
    """Remove a checkpoint. Renamed away first: a half-removed folder must not carry a checkpoint's name."""
    doomed = path.with_name(f".{path.name}.removed-{uuid.uuid4().hex[:8]}")
    os.rename(path, doomed)
    if _is_folder(doomed):
        shutil.rmtree(doomed)
    else:
        os.unlink(doomed)


def clear(directory: Path) -> None:
    """Remove what killed writers left behind. For the folder's writer alone: it would remove another's work."""
    _put_back(directory)
    for leftover in directory.glob(".step-*"):
        _discard(leftover)


def _discard(path: Path) -> None:
    """Remove as much as can be removed of what bears no checkpoint's name."""
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _is_folder(path: Path) -> bool:
    """Not a link to one: what a link leads to is not ours."""
    return os.path.isdir(path) and not os.path.islink(path)
