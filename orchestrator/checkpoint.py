"""A checkpoint is a folder `step-00000100/`: safetensors for tensors, text for the rest, and `MANIFEST.json`.

Eats named tensors and texts; yields a folder that is either whole or not there. Parts are written under a temporary
name and fsynced, the manifest (size and SHA-256 of every part, and of itself) last, then the folder is renamed and its
parent fsynced. Nothing is unpickled. safetensors has no checksum of its own: a flipped bit would load without a word.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import UserError
from orchestrator.manifest import fsync

FORMAT = 1
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"^step-(\d{8,})$")
_ASIDE = ".aside"
_PART = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")  # a name in the folder, never a way out of it


def path_of(directory: Path, step: int) -> Path:
    return Path(directory) / f"step-{step:08d}"


def save(directory: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, str],
         facts: dict[str, Any]) -> Path:
    """Commit one checkpoint; returns its folder. A checkpoint of the same step is replaced.

    Args:
        directory: the run's `checkpoints/`.
        tensors: `{"model": {name: tensor}, …}`, one safetensors file each.
        texts: `{"experiment.yaml": …}`, stored as they are.
        facts: JSON values for the manifest: fingerprints, metrics.
    """
    final = path_of(directory, step)
    temporary = Path(directory) / f".{final.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, temporary / f"{name}.safetensors")
        for name, text in texts.items():
            (temporary / name).write_text(text, "utf-8")
        parts = _hash_parts(sorted(temporary.iterdir()))
        for name in parts:
            fsync(temporary / name)
        manifest = {"format": FORMAT, "step": step, "parts": parts, **facts}
        manifest["sha256"] = _digest(manifest)
        (temporary / MANIFEST).write_text(_text(manifest), "utf-8")
        fsync(temporary / MANIFEST)
        fsync(temporary)
        _replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint against its manifest; returns the manifest.

    Raises:
        UserError: names the part that is missing or changed.
    """
    manifest = read_manifest(path)
    named = _NAME.match(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise UserError(f"{path}: holds step {manifest['step']}, whatever its name says; give it back its name")
    for name, part in manifest["parts"].items():
        if not (path / name).is_file():
            raise UserError(f"{path / name}: missing; the checkpoint is not whole, use another")
        if (path / name).stat().st_size != part["size"]:
            raise UserError(f"{path / name}: {(path / name).stat().st_size} bytes, written were {part['size']}; "
                            f"use another")
    actual = _hash_parts([path / name for name in manifest["parts"]])
    for name, part in manifest["parts"].items():
        if actual[name] != part:
            raise UserError(f"{path / name}: its content is not what was written (SHA-256 differs); use another")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, itself verified; the parts are not."""
    try:
        text = (path / MANIFEST).read_bytes().decode()
        manifest = json.loads(text)
        # Its text, not only its content: 1e-05 may not become 1E-05.
        unchanged = text == _text(manifest) and manifest.pop("sha256") == _digest(manifest)
        whole = unchanged and manifest["format"] == FORMAT and all(
            _PART.match(name) and part.keys() == {"size", "sha256"} for name, part in manifest["parts"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: no checkpoint of this program (its {MANIFEST} is missing or changed)")
    return manifest


def steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in a run's `checkpoints/`, rising; verified is none of them."""
    names = os.listdir(directory) if Path(directory).is_dir() else []
    return sorted(int(match[1]) for match in map(_NAME.match, names) if match)


def latest_valid(directory: Path, warn=print) -> Path | None:
    """The newest checkpoint whose every byte is as written, or None; `warn` is told of each one that is passed over."""
    _put_back(Path(directory))
    for step in reversed(steps(directory)):
        path = path_of(directory, step)
        try:
            verify(path)
        except UserError as error:
            warn(f"passed over: {error}")
            continue
        return path
    return None


def load_tensors(path: Path, name: str, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of part `name`; verify first."""
    return load_file(path / f"{name}.safetensors", device=str(device))


def best(directory: Path) -> int | None:
    """Step of the checkpoint with the lowest val loss at its own step (the earliest of equals), or None."""
    scored = []
    for step in steps(directory):
        with contextlib.suppress(UserError):
            loss = read_manifest(path_of(directory, step)).get("metrics", {}).get("val/loss")
            scored += [(loss, step)] if loss is not None and math.isfinite(loss) else []
    return min(scored)[1] if scored else None


def prune(directory: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints and the best one, and what killed writers left behind."""
    spared = best(directory)
    for step in steps(directory)[:-keep]:
        if step != spared:
            remove(path_of(directory, step))
    for leftover in Path(directory).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


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


def _replace(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name. One that bears it already steps aside until then, and `_put_back` finds it."""
    aside = final.with_name(f".{final.name}{_ASIDE}")
    replaces = final.exists()
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except BaseException:
        _put_back(final.parent)
        raise
    fsync(final.parent)
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


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
    shutil.rmtree(doomed)


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hash_parts(paths: list[Path]) -> dict[str, dict[str, Any]]:
    # hashlib releases the GIL, so parts are hashed side by side.
    with ThreadPoolExecutor() as pool:
        return {p.name: part for p, part in zip(paths, pool.map(_hash_part, paths), strict=True)}


def _hash_part(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
