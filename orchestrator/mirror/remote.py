"""A local copy of the run, sweep or checkpoint that an address names, for commands that read."""

import contextlib
import fcntl
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from orchestrator import files
from orchestrator.checkpoint import folders as checkpoint_folders
from orchestrator.checkpoint.format import step_of
from orchestrator.config.experiment import Experiment
from orchestrator.data.dataset import FILE as DATASET_MANIFEST
from orchestrator.errors import UserError
from orchestrator.mirror import download, manifest
from orchestrator.mirror.manifest import Manifest
from orchestrator.objects import cache
from orchestrator.objects.address import Address, is_address, is_plain_key, parse
from orchestrator.objects.store import MissingObjectError, Store, open_store
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import mirror_of, run_places, scratch_of, storage_root

TRIES = 5  # while a run that goes on removes objects
Checkpoints = Literal["none", "newest", "all"]
_returned: set[Path] = set()  # folders of the cache with paths that `here` has returned

_mirrors: dict[Path, Address] = {}  # by the folder that has the copy of a run


def address_of(word: str, given_in: str, experiment: Experiment | None = None) -> Address | None:
    """Return the address that a word means; None: it is a path or a name of this machine.

    If the storage has a mirror, the name of a run that is not here is an address in it. A path such
    as `./run` is not.

    Args:
        word: Such as `s3://bucket/mirror/quickstart`, or a checkpoint or a trial in it.
        given_in: Argument or field that has the word.
        experiment: Has the storage and its mirror; None: $ESPALIER_STORAGE.
    """
    if is_address(word):
        return parse(given_in, word)
    experiment = experiment or Experiment()
    mirror = mirror_of(experiment)
    places = run_places(word, storage_root(experiment))
    is_name = is_plain_key(word.rstrip("/")) and not word.startswith("~")
    if mirror is None or not is_name or any(place.path.exists() for place in places):
        return None
    return parse(given_in, f"{mirror}/{word}")


def here(
    word: str,
    given_in: str = "RUN_OR_CHECKPOINT",
    experiment: Experiment | None = None,
    *,
    checkpoints: Checkpoints = "newest",
    data: bool = False,
) -> str:
    """Return the path of a copy of what an address names; other words stay as they are.

    Args:
        word: See `address_of`, as for the next two.
        given_in: Argument or field that has the word.
        experiment: Has the storage and its mirror.
        checkpoints: Which ones of a run are copied.
        data: Copy the datasets too.

    Raises:
        UserError: There is no mirrored run at the address.
    """
    wanted = address_of(word, given_in, experiment)
    if wanted is None:
        return word
    store = open_store(wanted)
    for attempt in range(TRIES):
        address, content = _find(store, wanted)
        below = wanted.key[len(address.key) + 1 :]
        place = f"{content.resolved(below)}/"
        if below and not any(path.startswith(place) for path in [*content.files, *content.links]):
            raise UserError(
                f"{wanted}: {address} has nothing of this name; look at its checkpoints"
            )
        try:
            return str(_copy(store, address, content, below, checkpoints, data))
        except MissingObjectError:
            if attempt == TRIES - 1:
                raise
    raise AssertionError


def storage_of(folder: RunFolder) -> Path:
    """Return the storage of a run or sweep; for a copy in the cache, the scratch of its mirror."""
    mirror = _mirrors.get(folder.path.parent)
    return folder.path.parent if mirror is None else scratch_of(mirror)


def _find(store: Store, wanted: Address) -> tuple[Address, Manifest]:
    """Return the mirrored folder at or above an address."""
    address = wanted
    while address.key:
        found = manifest.read(store, address)
        if found is not None:
            return address, found[0]
        address = address.parent
    raise UserError(
        f"{wanted}: has no mirrored run ({manifest.NAME} is missing there and above); give "
        "MIRROR/NAME, as in storage=MIRROR or mirror=MIRROR of the run"
    )


def _copy(
    store: Store,
    address: Address,
    content: Manifest,
    below: str,
    checkpoints: Checkpoints,
    data: bool,
) -> Path:
    # What goes to MLflow must not have the paths of checkpoints in this cache.
    unit = cache.use("journals" if checkpoints == "none" else "runs", address)
    folder = unit / address.name
    _mirrors[unit] = address.parent
    paths = list(_wanted(content, below, checkpoints))
    sizes = {path: sum(part.size for part in content.files[path]) for path in paths}
    with _copying(unit):
        here = [path for path in folder.rglob("step-*") if step_of(path) is not None]
        removed = [path for path in here if not any(content.below(os.path.relpath(path, folder)))]
        _remove(removed)  # the run has removed them
        needed = {(folder / path).parent for path in paths}
        spare = [path for path in here if path not in {*needed, *removed} and unit not in _returned]
        missing = [path for path in paths if not _has_size(folder / path, sizes[path])]
        size = sum(sizes[path] for path in missing)
        cache.make_room(unit, size, functools.partial(_remove, spare))
        download.pull(store, address, content, folder, paths)
        download.link(content, folder)
        if data:
            for name in content.data:
                _add_dataset(store, address.parent, name, unit)
    _returned.add(unit)
    return folder / below if below else folder


def _remove(checkpoints: Iterable[Path]) -> None:
    for path in checkpoints:
        checkpoint_folders.remove(path)


def dataset(mirror: Address, name: str) -> Path:
    """Return the folder of a copy of a dataset.

    Raises:
        UserError: The mirror does not have it.
    """
    address = mirror / "data" / name
    unit = cache.use("data", address)
    with _copying(unit):
        if not _add_dataset(open_store(address), mirror, name, unit):
            raise UserError(f"{address}: has no tokens; run the same command again")
    return unit / "data" / name


def _add_dataset(store: Store, mirror: Address, name: str, unit: Path) -> bool:
    """Copy a dataset, unless it is there. Return whether there is one."""
    if (unit / "data" / name / DATASET_MANIFEST).exists():
        return True
    found = manifest.read(store, mirror / "data" / name)
    if found is not None:
        parts = [part for file in found[0].files.values() for part in file]
        cache.make_room(unit, sum(part.size for part in parts))
        download.pull_dataset(store, mirror, name, unit)
    return found is not None


@contextlib.contextmanager
def _copying(unit: Path) -> Iterator[None]:
    """Let one process at a time copy: all ranks of a run may want the same."""
    with open(unit / ".copying", "a", opener=files.opener) as file:
        files.lock(file, fcntl.LOCK_EX)
        yield


def _has_size(file: Path, size: int) -> bool:
    return files.is_plain(file) and file.stat().st_size == size


def _wanted(content: Manifest, below: str, wanted: Checkpoints) -> Iterator[str]:
    """Yield the files that a command needs of a run, trial, stage or checkpoint."""
    place = content.resolved(below)
    checkpoints = []
    if step_of(Path(place)) is not None:
        checkpoints = [place]
    elif wanted == "none":
        pass
    else:
        inside = content.resolved(RunFolder(place).checkpoints.as_posix())
        steps = {path.rpartition("/")[0] for path in content.below(inside)}
        checkpoints = sorted(steps, key=lambda path: step_of(Path(path)) or 0)
        if wanted == "newest":
            checkpoints = checkpoints[-1:]
    code = RunFolder("").code.name
    for path in content.files:
        parent = path.rpartition("/")[0]
        if step_of(Path(parent)) is not None:
            if parent in checkpoints:
                yield path
        elif "/" not in path or path.startswith((f"{place}/" if place else "", f"{code}/")):
            yield path
