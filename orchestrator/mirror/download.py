"""Makes a folder, or a part of it, from its copy in object storage."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from orchestrator import files, folders
from orchestrator.checkpoint import folders as checkpoint_folders
from orchestrator.checkpoint.format import step_of
from orchestrator.data.dataset import FILE as DATASET_MANIFEST
from orchestrator.mirror import manifest
from orchestrator.mirror.manifest import DamagedCopyError, Manifest, Part, is_inside, object_name
from orchestrator.objects import threads
from orchestrator.objects.address import Address
from orchestrator.objects.store import MissingObjectError, Store

ADVICE = "restore it in the bucket, or use an earlier checkpoint or another copy"
THREADS = 4  # files at a time; each has one part in memory


def pull(
    store: Store, address: Address, content: Manifest, folder: Path, paths: Iterable[str]
) -> None:
    """Write files of a copy into a folder, unless they are there.

    A checkpoint gets its name when all its files are there. Files that an earlier call has copied
    before it failed are kept. One process at a time may copy to a folder.

    Args:
        store: The store.
        address: Address of the copy.
        content: Its manifest.
        folder: The folder.
        paths: The files.

    Raises:
        DamagedCopyError: An object does not have its SHA-256, or a link leads out of the folder.
        MissingObjectError: One is missing. Read the manifest again, because it may have changed.
    """
    by_checkpoint: dict[Path | None, list[str]] = {}
    for path in paths:
        parent = (folder / path).parent
        checkpoint = parent if step_of(parent) is not None else None
        by_checkpoint.setdefault(checkpoint, []).append(path)

    def write(names: tuple[Path, str]) -> None:
        target, path = names
        _write(store, address, path, content.files[path], _resolved(folder, target))

    for checkpoint, names in by_checkpoint.items():
        if checkpoint is not None and _is_there(content, folder, names):
            continue
        place = checkpoint and checkpoint.with_name(f".{checkpoint.name}-copy")
        targets = [folder / name for name in names]
        if place is not None:
            targets = [place / target.name for target in targets]
        threads.for_each(zip(targets, names, strict=True), write, THREADS)
        if checkpoint is not None and place is not None:
            files.fsync(place)
            checkpoint_folders.rename(place, checkpoint)


def pull_dataset(store: Store, mirror: Address, name: str, storage: Path) -> None:
    """Make the folder of a dataset from its copy, unless it is there. The manifest comes last."""
    folder = storage / "data" / name
    found = manifest.read(store, mirror / "data" / name)
    if found is None or (folder / DATASET_MANIFEST).exists():
        return
    folders.make_folder(folder)
    last = [DATASET_MANIFEST]
    for names in ([path for path in found[0].files if path not in last], last):
        pull(store, mirror / "data" / name, found[0], folder, names)


def link(content: Manifest, folder: Path) -> None:
    """Make the symlinks of a copy that stay in the folder."""
    for path, target in content.links.items():
        place = _resolved(folder, folder / path)
        if is_inside(Path(os.path.realpath(folder)), str(place), target):
            folders.make_folder(place.parent)
            files.replace_symlink(place, Path(target))


def _resolved(folder: Path, path: Path) -> Path:
    """Return a path without the symlinks above it.

    Raises:
        DamagedCopyError: They lead out of the folder.
    """
    parent = Path(os.path.realpath(path.parent))
    if not parent.is_relative_to(os.path.realpath(folder)):
        raise DamagedCopyError(
            f"{path}: a symlink above it leads out of the folder; remove it, or use another copy"
        )
    return parent / path.name


def _is_there(content: Manifest, folder: Path, names: Iterable[str]) -> bool:
    return all(_has_content(folder / name, content.files[name]) for name in names)


def _has_content(file: Path, parts: Sequence[Part]) -> bool:
    """Return whether a file consists of these parts."""
    if not files.is_plain(file) or file.stat().st_size != sum(part.size for part in parts):
        return False
    with open(file, "rb", opener=files.opener) as opened:
        return all(_part_of(opened.read(part.size)) == part for part in parts)


def _part_of(data: bytes) -> Part:
    return Part(len(data), hashlib.sha256(data).hexdigest())


def _write(store: Store, address: Address, path: str, parts: Sequence[Part], target: Path) -> None:
    if _has_content(target, parts):
        return
    folders.make_folder(target.parent)
    with files.replacement(target) as temporary, open(temporary, "xb") as file:
        for part in parts:
            name = address / object_name(path, part)
            try:
                data = store.get(name.key).data
            except MissingObjectError as error:
                raise MissingObjectError(f"{error}; {ADVICE}") from None
            if _part_of(data) != part:
                raise DamagedCopyError(
                    f"{name}: its content has changed (SHA-256 differs); {ADVICE}"
                )
            file.write(data)
