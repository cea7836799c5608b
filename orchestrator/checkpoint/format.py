"""Which checkpoints there are, and whether one is what was written: `MANIFEST.json` has the size and SHA-256 of its parts.

Eats a folder that anyone may have damaged or forged; yields its manifest, or a refusal that names the part.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from orchestrator.errors import UnreadableError, UserError

FORMAT = 1
MANIFEST = "MANIFEST.json"
PARTS = {
    "model.safetensors"
}  # that each has; the other ones are refused by who reads them and finds them missing
NAME = re.compile(r"^step-(\d{8,})$")
_PART = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")  # a name in the folder, never a way out of it
_MANIFEST_LIMIT = 1 << 20  # bytes; it has some thousands


def path_of(directory: Path, step: int) -> Path:
    return Path(directory) / f"step-{step:08d}"


def steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in a run's `checkpoints/`, rising; verified is none of them."""
    names = os.listdir(directory) if Path(directory).is_dir() else []
    found = ((int(match[1]), match.string) for match in map(NAME.match, names) if match)
    return sorted(
        step for step, name in found if path_of(directory, step).name == name
    )  # no `step-000000003`, nor other digits


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint against its manifest; returns the manifest.

    Raises:
        UserError: names the part that is missing or changed.
    """
    manifest = read_manifest(path)
    named = NAME.match(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise UserError(
            f"{path}: holds step {manifest['step']}, whatever its name says; give it back its name"
        )
    try:
        _verify_parts(path, manifest["parts"])
    except OSError as error:  # an unreadable sector, or it is being removed in this moment
        raise _unreadable(path, error) from None
    return manifest


def _verify_parts(path: Path, parts: dict[str, dict[str, Any]]) -> None:
    for name, part in parts.items():
        if not (path / name).is_file():
            raise UserError(f"{path / name}: missing; the checkpoint is not whole, use another")
        size = (path / name).stat().st_size
        if size != part["size"]:
            raise UserError(
                f"{path / name}: {size} bytes, written were {part['size']}; use another"
            )
    actual = _hash_parts([path / name for name in parts])
    for name, part in parts.items():
        if actual[name] != part:
            raise UserError(
                f"{path / name}: its content is not what was written (SHA-256 differs); use another"
            )
        if name.endswith(".safetensors"):
            _check_header(path / name)


def _check_header(path: Path) -> None:
    """Refuse a file whose manifest is right and whose layout is not: whoever can write one can write the other."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: no safetensors file ({error}); use another") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, itself verified; the parts are not."""
    try:
        text = _read_small(path / MANIFEST).decode()
        manifest = json.loads(text)
        # Its text, not only its content: 1e-05 may not become 1E-05.
        unchanged = text == text_of(manifest) and manifest.pop("sha256") == digest_of(manifest)
        whole = unchanged and manifest["format"] == FORMAT and _has_shape(manifest)
    except FileNotFoundError:
        whole = False
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(
            f"{path}: no checkpoint of this program (its {MANIFEST} is missing or changed)"
        )
    return manifest


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(
        f"{error.filename or path}: cannot be read ({error.strerror}); use another checkpoint",
        error.errno,
    )


def _has_shape(manifest: dict[str, Any]) -> bool:
    """Whether what everybody takes for granted is there: whoever can write a part can write its hash."""
    fingerprints = manifest["fingerprints"]
    cpus, device = (fingerprints["numerics"][key] for key in ("cpus_per_worker", "device"))
    return (
        type(manifest["step"]) is int
        and isinstance(manifest.get("metrics", {}), dict)
        and isinstance(fingerprints["data"], str)
        and type(cpus) is int
        and cpus > 0
        and isinstance(device, str)
        and manifest["parts"].keys() >= PARTS
        and all(
            _PART.match(name) and part.keys() == {"size", "sha256"}
            for name, part in manifest["parts"].items()
        )
    )


def _read_small(path: Path) -> bytes:
    """The content of a manifest; no device, no pipe, nothing larger than one can be."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with open(path, "rb") as file:
        content = file.read(_MANIFEST_LIMIT + 1)
    if len(content) > _MANIFEST_LIMIT:
        raise ValueError(f"{path}: more than {_MANIFEST_LIMIT} bytes")
    return content


def text_of(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hash_parts(paths: list[Path]) -> dict[str, dict[str, Any]]:
    # hashlib releases the GIL, so parts are hashed side by side.
    with ThreadPoolExecutor() as pool:
        return {p.name: part for p, part in zip(paths, pool.map(_hash_part, paths), strict=True)}


def _hash_part(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
