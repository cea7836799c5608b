"""What a job with a mirror does at its start and end.

At the start it takes the lock. If its folder is gone or older than the copy, it makes the folder
from the copy; then the same command continues as it does after a kill.
"""

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import folders
from orchestrator.checkpoint.format import step_of
from orchestrator.cluster.lookout import WAIT_S
from orchestrator.data.corpus import Listing
from orchestrator.data.dataset import Manifest as Dataset
from orchestrator.data.prepare import prepare_in
from orchestrator.data.prepared import known_dir
from orchestrator.errors import UserError
from orchestrator.mirror import committed, download, lock, manifest
from orchestrator.mirror.manifest import DamagedCopyError, Manifest
from orchestrator.mirror.state import State
from orchestrator.mirror.upload import Uploader
from orchestrator.objects.address import Address
from orchestrator.objects.store import MissingObjectError, Store, open_store
from orchestrator.runs import events, stop
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.lock import held as held_here

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

BEAT_PATIENCE_S = 8.0  # less than the time between two signs of life


@contextlib.contextmanager
def mirrored(folder: RunFolder, mirror: Address, storage: Path) -> Iterator[Uploader]:
    """Mirror a folder inside the `with` block.

    Args:
        folder: Folder of a run or a sweep, which need not exist.
        mirror: Address of the mirror, which has the copies of several folders.
        storage: Folder of all runs and datasets.

    Raises:
        HeldError: Another process writes to the folder or to its copy.
        UserError: The copy is of another run, or the store refuses a request.
        StoreAwayError: The store does not answer.
    """
    address = mirror / folder.name
    store = open_store(address)
    remote = lock.MirrorLock(store, address, open_store(address, BEAT_PATIENCE_S))

    def lost(holder: str) -> None:
        message = f"{address}: was taken over by {holder}; this run ends"
        with contextlib.suppress(OSError):  # the folder was removed
            events.note(folder, "mirror_lost", message)
            stop.request(folder, message)

    with held_here(folder.mirror_lock):
        state = State.read(folder, str(address))
        # A holder that worked in this folder has ended: we have the lock of the folder.
        with lock.held(remote, state.ended_token, lost):
            last = manifest.read(store, address)
            if last is not None:
                _Restore(store, address, last[0], folder, state).run(storage)
            state.token = remote.token
            state.write()
            uploader = Uploader(folder, store, address, remote, state, last)
            uploader.start()
            try:
                yield uploader
            finally:
                remote.stays = True  # also if the next line is interrupted
                remote.stays = not uploader.stop()
                if remote.stays:
                    # Without the token, a process in this folder too waits until the lock counts
                    # as lost.
                    state.token = None
                    with contextlib.suppress(OSError):  # the folder was removed
                        state.write()


class _Restore:
    """Makes the folder from its copy if it is gone, older or incomplete."""

    def __init__(
        self, store: Store, address: Address, content: Manifest, folder: RunFolder, state: State
    ) -> None:
        self.store = store
        self.address = address
        self.content = content
        self.folder = folder
        self.state = state

    def run(self, storage: Path) -> None:
        """Make the folder, and its datasets in `storage`.

        Raises:
            UserError: The copy is of another run, or each has steps that the other one has not.
        """
        key = (self.folder.read_record() or {}).get("key")
        is_known = self.content.id in self.state.ids  # no other folder has written the copy since
        if is_known and not self.state.is_partial:
            # What this folder has is newer, unless it has lost a checkpoint.
            if key == self.content.key and self._steps() > self.folder.checkpoint_steps()[-1:]:
                self._pull(filter(_is_of_checkpoint, self.content.files))
            return
        if key not in (None, self.content.key):
            raise UserError(
                f"{self.address}: has another run of this name; use another name (name=…) or "
                "another mirror"
            )
        if not is_known and not self.state.is_partial and key is not None and self._is_ahead():
            print(f"{self.folder.path} has more steps than {self.address}", flush=True)
            self.state.ids = [self.content.id]
            self.state.was_restored = True
            return
        if not is_known:
            self._move_aside()
        self.state.ids = [self.content.id]
        self.state.is_partial = True
        self.state.was_restored = True
        self.state.data = self.content.data
        folders.make_folder(self.folder.path)
        self.state.write()
        self._pull(self.content.files)
        download.link(self.content, self.folder.path)
        for name in self.content.data:
            _pull_dataset(self.store, self.address.parent, name, storage)
        self.state.is_partial = False

    def _pull(self, paths: Iterable[str]) -> None:
        wanted = list(paths)
        size = sum(part.size for path in wanted for part in self.content.files[path])
        print(f"restoring {self.folder.path} from {self.address}, {size / 1e6:,.1f} MB", flush=True)
        checkpoints: dict[Path, list[str]] = {}
        for path in filter(_is_of_checkpoint, wanted):
            checkpoints.setdefault(Path(path).parent, []).append(path)
        damaged: dict[Path, UserError] = {}
        for name, parts in checkpoints.items():
            try:
                self._copy(parts)
            except (DamagedCopyError, MissingObjectError) as error:
                damaged[name] = error
        for name, problem in damaged.items():
            # The run can continue from another one, as with a damaged checkpoint on a disk.
            others = folders.subfolders(self.folder.path / name.parent)
            if all(step_of(path) is None for path in others):
                raise problem
            print(f"{problem}; {name} is left out", file=sys.stderr, flush=True)
        self._copy(path for path in wanted if not _is_of_checkpoint(path))
        events.note(self.folder, "restored", f"{len(wanted)} files came from {self.address}")
        for name in damaged:
            events.note(self.folder, "damaged", f"{self.address}/{name}: was left out")

    def _copy(self, paths: Iterable[str]) -> None:
        download.pull(self.store, self.address, self.content, self.folder.path, paths)

    def _steps(self) -> list[int]:
        """Return the newest step of the copy, as a list that may be empty."""
        parents = {Path(path).parent for path in filter(_is_of_checkpoint, self.content.files)}
        own = self.folder.checkpoints.name
        return sorted(step_of(path) or 0 for path in parents if path.parent == Path(own))[-1:]

    def _is_ahead(self) -> bool:
        """Return whether the folder has all steps of the copy, and more.

        Raises:
            UserError: Each has steps that the other one has not.
        """
        groups = committed.groups(self.folder.path, manifest.is_file_path)
        here = _newest_steps(itertools.chain.from_iterable(groups))
        there = _newest_steps(self.content.files)
        has_more, has_less = (
            any(step > other.get(place, -1) for place, step in own.items())
            for own, other in ((here, there), (there, here))
        )
        if has_more and has_less:
            raise UserError(
                f"{self.address} and {self.folder.path} each have steps that the other has not; "
                "use another mirror, or move the folder away to continue from the copy"
            )
        return has_more

    def _move_aside(self) -> None:
        """Move what was here before the copy was written into a folder of its own."""
        kept = self.folder.checkpointed_file.name
        old = [
            path
            for path in self.folder.path.glob("*")
            if (path.name[0] != "." or path.name == kept) and not path.name.startswith("before-")
        ]
        if not old:
            return
        target = self.folder.new_history_folder()
        target.mkdir()
        for path in old:
            os.rename(path, target / path.name)
        print(f"{self.folder.path}: is made from {self.address}; what was here is now in {target}")


def _newest_steps(paths: Iterable[str]) -> dict[Path, float]:
    """Return the newest step of the run and of each stage; infinite for a stage that is done."""
    result = RunFolder("").result_file.name
    newest: dict[Path, float] = {}
    for path in map(Path, paths):
        step = step_of(path.parent)
        if step is not None:
            place = path.parent.parent.parent
            newest[place] = max(newest.get(place, -1), step)
        elif path.name == result:
            newest[path.parent] = math.inf
    return newest


def _is_of_checkpoint(path: str) -> bool:
    return step_of(Path(path).parent) is not None


def prepare(
    data: "Data",
    storage: Path,
    mirror: Address | None,
    sources: Listing | None = None,
    wait_s: float = WAIT_S,
) -> Dataset:
    """Do the same as `prepare_in`, unless the mirror has the dataset."""
    if mirror is not None:
        directory = known_dir(data, storage, read=True, sources=sources)
        if directory is not None and directory.parent == storage / "data":
            _pull_dataset(open_store(mirror), mirror, directory.name, storage)
    return prepare_in(data, storage, sources=sources, wait_s=wait_s)


def _pull_dataset(store: Store, mirror: Address, name: str, storage: Path) -> None:
    """Copy a dataset to the storage, unless its copy is damaged: then it is made again."""
    try:
        download.pull_dataset(store, mirror, name, storage)
    except (DamagedCopyError, MissingObjectError) as error:
        print(
            f"{error}; the tokens are made again. Remove {mirror}/data/{name} from the bucket, so "
            "that they are copied again",
            file=sys.stderr,
            flush=True,
        )
