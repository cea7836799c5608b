"""Format of a checkpoint folder, and the verification that its content is unchanged.

    step-00000100/
        MANIFEST.json          step, fingerprints, and size and SHA-256 of each other file
        model.safetensors      weights
        optimizer.safetensors  state of the optimizer
        ema.safetensors        moving average of the weights, with train.ema
        state.json, experiment.yaml, model.json, tokenizer.json
        metrics.jsonl          copy of the journal

Format 2 is that of several ranks. Each writes a part of the tensors, such as
model-00001-of-00004.safetensors; see `tensor_file.Slice`. The other files are the same.

The manifest also holds its own SHA-256. safetensors has no checksum: without these hashes, a file
with a flipped bit would load without an error.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

from orchestrator.errors import DiskError, UnreadableError, UserError
from orchestrator.files import patiently
from orchestrator.hashes import hash_here, sha256s

FORMAT = 1
FORMAT_IN_PARTS = 2
FORMATS = (FORMAT, FORMAT_IN_PARTS)
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})")
_MAX_MANIFEST_BYTES = 1 << 20  # a real manifest has a few thousand
_MISSING = (errno.ENOENT, errno.ENOTDIR)
T = TypeVar("T")


class Part(TypedDict):
    """Entry of one file in the manifest."""

    size: int  # bytes
    sha256: str


class Fingerprints(TypedDict):
    """What the bits of a run depend on, besides its configuration."""

    data: str  # data.dataset.data_identity
    numerics: dict[str, Any]  # train.numerics.fingerprint
    # Earlier versions of this program did not store these two.
    proof: NotRequired[str]  # train.step.Step.proof
    environment: NotRequired[dict[str, Any]]  # train.numerics.environment
    code: NotRequired[dict[str, str]]  # code_hashes.module_hashes


class CheckpointManifest(TypedDict, total=False):
    """Content of MANIFEST.json without its own hash."""

    format: int
    step: int
    parts: dict[str, Part]
    generation: int  # attempt of the run that wrote the checkpoint
    metrics: dict[str, float]  # of an evaluation at this step; empty if there was none
    fingerprints: Fingerprints


# ---- names ----


def path_of(directory: Path, step: int) -> Path:
    """Return the folder of a checkpoint in a run's `checkpoints/`."""
    return Path(directory) / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a folder; None if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    step = int(match[1])
    # The pattern also matches other digits than 0-9, and too many leading zeros.
    return step if path_of(path.parent, step).name == path.name else None


def steps(directory: Path) -> list[int]:
    """Return the steps of all checkpoints in a run's `checkpoints/`, rising. None is verified."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (step_of(Path(name)) for name in names)
    return sorted(step for step in found if step is not None)


# ---- verification ----


def reading(path: Path, read: Callable[[], T]) -> T:
    """Call `read`, which reads files of a checkpoint; try again if an error may pass.

    Raises:
        UnreadableError: They cannot be read at the moment.
        DiskError: The disk cannot read them; see `refuse_outage`.
        UserError: They are missing or damaged, or `read` raised it.
    """
    try:
        return patiently(read)
    except UserError:
        raise
    except OSError as error:
        message = f"{error.filename or path}: cannot be read ({error.strerror or error})"
        if error.errno == errno.EIO:
            raise DiskError(f"{message}; use another checkpoint") from None
        if error.errno in _MISSING:
            raise UserError(f"{message}; use another checkpoint") from None
        raise UnreadableError(f"{message}; run the same command again") from None


def refuse_outage(problems: Sequence[UserError]) -> None:
    """Refuse to go on without two checkpoints that the disk cannot read.

    One may have a bad sector. With two, the disk or its connection probably fails, and they may be
    intact: their steps would be trained again in vain.

    Args:
        problems: What is wrong with each of some checkpoints.

    Raises:
        UnreadableError: There are two.
    """
    found = [str(problem).partition(";")[0] for problem in problems if type(problem) is DiskError]
    if len(found) > 1:
        raise UnreadableError(
            f"{found[0]}, and {found[1]}; check the disk and run the same command again; if "
            "only these files cannot be read, move their checkpoints away first"
        )


def verify(path: Path, *, remember: bool = False) -> CheckpointManifest:
    """Compare every byte of a checkpoint with its manifest, and return the manifest.

    Args:
        path: Folder of the checkpoint.
        remember: Do not read a file whose present version this machine has hashed; see `hashes`.

    Raises:
        UnreadableError: A file cannot be read at the moment.
        UserError: A file is missing, damaged or changed, or the folder has the name of another
            step.
    """
    manifest = named_manifest(path)
    reading(path, lambda: _verify_parts(path, manifest["parts"], remember))
    return manifest


def named_manifest(path: Path) -> CheckpointManifest:
    """Return the manifest of a checkpoint, whose folder must not have the name of another step.

    Raises:
        UserError: As `verify` does for the manifest and the name.
    """
    manifest = read_manifest(path)
    if step_of(path) not in (None, manifest["step"]):
        raise UserError(
            f"{path}: contains the checkpoint of step {manifest['step']}, not of the step in its "
            "name; restore the name"
        )
    return manifest


def read_parts(path: Path, parts: Mapping[str, Part]) -> dict[str, bytearray]:
    """Read files of a checkpoint once, and compare what was read with its entry in the manifest.

    Raises:
        UserError: As `verify` does.
    """

    def read() -> dict[str, bytearray]:
        _compare_sizes(path, parts)
        contents = [bytearray(part["size"]) for part in parts.values()]
        hashes = hash_here(_files(path, parts), [memoryview(content) for content in contents])
        _compare_hashes(path, parts, hashes)
        return dict(zip(parts, contents, strict=True))

    return reading(path, read)


def _verify_parts(path: Path, parts: Mapping[str, Part], remember: bool) -> None:
    _compare_sizes(path, parts)
    files = _files(path, parts)
    _compare_hashes(path, parts, sha256s(files, hash_here) if remember else hash_here(files))


def _files(path: Path, parts: Mapping[str, Part]) -> list[str]:
    return [os.path.abspath(path / name) for name in parts]


def _compare_sizes(path: Path, parts: Mapping[str, Part]) -> None:
    """Compare sizes before anything is read: this refuses pipes, devices and huge files."""
    for name, part in parts.items():
        file = path / name
        size = file_size(file)
        if size is None:
            raise UserError(f"{file}: missing; the checkpoint is incomplete, use another one")
        if size != part["size"]:
            raise UserError(f"{file}: has {size} bytes instead of {part['size']}; use another one")


def _compare_hashes(path: Path, parts: Mapping[str, Part], hashes: Iterable[str]) -> None:
    for (name, part), sha256 in zip(parts.items(), hashes, strict=True):
        if sha256 != part["sha256"]:
            raise UserError(
                f"{path / name}: its content has changed (SHA-256 differs); use another one"
            )


def read_manifest(path: Path) -> CheckpointManifest:
    """Read and verify the manifest of a checkpoint. The other files are not verified.

    Raises:
        UnreadableError: The manifest cannot be read at the moment.
        UserError: The manifest is missing, changed or of another format.
    """
    try:
        content = reading(path, lambda: _read_small(path / MANIFEST))
        return _parse(content.decode())
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: not a checkpoint of this program (its {MANIFEST} is missing or changed)"
        ) from None


def _parse(text: str) -> CheckpointManifest:
    """Return the manifest, or raise ValueError, TypeError, … if it is not one that we wrote."""
    stored = json.loads(text)
    # The text is compared as well: JSON with a changed byte may have the same content.
    if text != _to_text(stored):
        raise ValueError("changed")
    if stored.pop("sha256") != _sha256(stored) or stored["format"] not in FORMATS:
        raise ValueError("changed, or another format")
    return stored


def _read_small(file: Path) -> bytes:
    """Read a manifest; refuse a pipe, a device or a huge file with ValueError."""
    if file_size(file) is None:
        raise ValueError("not a file")
    with open(file, "rb") as opened:
        content = opened.read(_MAX_MANIFEST_BYTES + 1)
    if len(content) > _MAX_MANIFEST_BYTES:
        raise ValueError("too large")
    return content


def file_size(file: Path) -> int | None:
    """Return the size of a file; None if it is missing, or not a file."""
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def part_name(group: str, rank: int, ranks: int) -> str:
    """Return the name of the part of a rank, without its extension."""
    return f"{group}-{rank:05d}-of-{ranks:05d}"


def tensor_files(parts: Iterable[str], group: str) -> list[str]:
    """Return which files of a checkpoint have the tensors of a group, such as "model"."""
    whole = f"{group}.safetensors"
    pattern = re.compile(rf"{group}-\d{{5}}-of-\d{{5}}\.safetensors")
    return sorted(filter(pattern.fullmatch, parts)) or [whole]


def manifest_text(
    step: int, parts: Mapping[str, Part], facts: Mapping[str, Any], format_: int = FORMAT
) -> str:
    """Return the content of MANIFEST.json."""
    manifest = {"format": format_, "step": step, "parts": parts, **facts}
    return _to_text({**manifest, "sha256": _sha256(manifest)})


def _to_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def _sha256(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
