"""Copies what is committed in a folder to its mirror, from a thread of the driver.

A training step never waits for the store. If the store is slow or away, the thread tries again; a
checkpoint that the run has removed meanwhile is skipped.
"""

import contextlib
import hashlib
import os
import sys
import threading
import time
from pathlib import Path

from orchestrator import files
from orchestrator.errors import UserError
from orchestrator.hashes import Stamp, stamp
from orchestrator.mirror import committed, manifest
from orchestrator.mirror.committed import Names
from orchestrator.mirror.dataset import read_parts, upload_dataset
from orchestrator.mirror.lock import MirrorLock
from orchestrator.mirror.manifest import Files, Manifest, Part, object_name
from orchestrator.mirror.state import State
from orchestrator.objects.address import Address
from orchestrator.objects.store import ChangedObjectError, Store
from orchestrator.redact import redact_text
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder, SweepFolder

POLL_S = 10.0  # between two copies
STOP_S = 5.0  # longest wait for a request that is under way when the command ends
NICENESS = 19  # the thread gets what the training leaves of the CPUs


class Removed(Exception):
    """A file was removed or replaced while it was read."""


class Stopped(Exception):
    """The folder is not copied any more."""


class Uploader:
    """Copies a folder to its mirror until `finish`.

    Args:
        folder: Folder of a run or a sweep.
        store: The store.
        address: Address of the folder's copy.
        lock: The lock of the copy.
        state: What this folder knows of the copy.
        last: Manifest of the copy and its version; None if there is none yet.
    """

    def __init__(
        self,
        folder: RunFolder,
        store: Store,
        address: Address,
        lock: MirrorLock,
        state: State,
        last: tuple[Manifest, str] | None,
    ) -> None:
        self.folder = folder
        self.store = store
        self.address = address
        self.lock = lock
        self.state = state
        self.version: str | None
        self.last, self.version = last or (Manifest(), None)
        self.datasets: list[Path] = []
        self.problem: str | None = None  # why the copy is behind
        self._known: dict[str, tuple[Stamp, tuple[Part, ...]]] = {}  # files that were written
        self._names = Names(address)
        self._removed: set[str] = set()  # objects to remove that no manifest names any more
        self._cannot_remove = False
        self._has_cleaned = False
        self._is_whole = False  # the copy has what the folder had when `finish` was called
        self._progress = time.monotonic()  # when a part was last sent, or found there
        self._synced = 0.0  # when the last copy of the folder began
        self._ending = threading.Event()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def finish(self, wait_s: float, *, is_limit: bool = False) -> bool:
        """Copy the rest. Return whether the mirror has everything.

        Args:
            wait_s: How long to wait while no part gets there.
            is_limit: `wait_s` is the longest wait in all.
        """
        self._ending.set()
        started = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.05)
            since = started if is_limit else max(started, self._progress)
            if time.monotonic() > since + wait_s:
                break
        if not self._is_whole and self.problem is None:
            lost_to = self.lock.lost_to
            self.problem = f"it was taken over by {lost_to}" if lost_to else "the store is slow"
        return self._is_whole

    def stop(self) -> bool:
        """Copy nothing more. Return whether no write is under way."""
        self._is_stopped = True
        self._ending.set()
        self._thread.join(STOP_S)
        return not self._thread.is_alive()

    @property
    def _may_write(self) -> bool:
        return not self._is_stopped and self.lock.lost_to is None

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # not on every system
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        is_last = False
        while not is_last and self._may_write:
            is_last = self._ending.wait(POLL_S)
            if self._is_stopped:
                return
            try:
                self.sync()
            except Stopped:
                return
            except Exception as error:  # whatever it is, it is tried again
                self._report(self._text(error))
            else:
                if self._may_write:
                    self._report(None)
                    self._is_whole = is_last

    def _text(self, error: Exception) -> str:
        if isinstance(error, UserError):
            return str(error)
        if isinstance(error, OSError):
            return f"{error.filename or self.folder.path}: {error.strerror or error}"
        return redact_text(" ".join(f"{type(error).__name__}: {error}".split()))

    def _report(self, problem: str | None) -> None:
        """Note that the copy is behind, or no longer. Each change is noted once."""
        if problem is None and self.problem is not None:
            self._note(f"{self.address}: has everything again")
        if problem is not None and self.problem is None:
            self._note(f"{problem.partition('; run the same')[0]}; training goes on")
        self.problem = problem

    def _note(self, message: str) -> None:
        print(f"mirror: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            events.note(self.folder, "mirror", f"mirror: {message}")

    def sync(self) -> None:
        """Copy what is new of the folder, then the datasets, which may take hours."""
        self._sync_folder()
        for dataset in list(self.datasets):
            address = self.address.parent / "data" / dataset.name
            upload_dataset(self.store, address, dataset, self._after_part)
            self.datasets.remove(dataset)
            self.state.data = sorted({*self.state.data, dataset.name})
            self._sync_folder()

    def _after_part(self) -> None:
        """Copy the folder if it is due, while a dataset is copied."""
        self._go_on()
        if self._progress > self._synced + POLL_S:
            self._sync_folder()

    def _go_on(self) -> None:
        """Note that a part is done. Raise Stopped if nothing more may be written."""
        self._progress = time.monotonic()
        if not self._may_write:
            raise Stopped

    def _sync_folder(self) -> None:
        """Copy what is new, write the manifest, and remove what it no longer names."""
        self._synced = time.monotonic()
        if len(self.state.ids) > 1:
            self._resolve_ids()
        key = (self.folder.read_record() or {}).get("key", "")
        now = Manifest(key=key, data=list(self.state.data))
        groups = list(committed.groups(self.folder.path, self._names.are_possible))
        now.links = {
            path: target
            for path, target in committed.links(self.folder.path).items()
            if self._names.are_possible(path, target)
        }
        if names := self._names.newly_left_out():
            self._note(f"{self.folder.path}: no copy can have these names: {names}")
        for group in groups:
            with contextlib.suppress(Removed):
                now.files |= self._upload(group)
        if now.has_content_of(self.last) or not now.key:
            self._remove_objects()
            return
        own = self.folder.checkpoints
        had_some = now.key == self.last.key and any(self.last.below(own.name))
        if had_some and not any(now.below(own.name)):
            raise UserError(f"{own}: has lost all checkpoints; the copy keeps its own")
        try:
            now.check_paths()
        except ValueError as error:  # such as a file that became a folder since it was read
            raise UserError(f"{self.folder.path}: cannot be copied as it is ({error})") from None
        if not self._may_write:
            return
        self.state.expect(now.id)
        data = now.to_bytes()
        try:
            self.version = self.store.put_if((self.address / manifest.NAME).key, data, self.version)
        except ChangedObjectError:
            self.lock.lost_to = self.lock.lost_to or "another process"
            raise
        self.state.confirm(now.id)
        self._removed = (self._removed | self._keys(self.last)) - self._keys(now)
        self.last = now
        self._known = {path: known for path, known in self._known.items() if path in now.files}
        self._find_leftovers()
        self._remove_objects()

    def _keys(self, content: Manifest) -> set[str]:
        return {(self.address / name).key for name in content.objects()}

    def _remove_objects(self) -> None:
        """Remove what no manifest names any more. What fails is tried again with the next copy."""
        try:
            for key in sorted(self._removed):
                if not self._may_write:  # another process may need them
                    return
                self.store.delete(key)
                self._removed.discard(key)
        except UserError as error:
            if not self._cannot_remove:
                self._note(f"{error}; what the run has removed stays in the bucket")
            self._cannot_remove = True

    def _resolve_ids(self) -> None:
        """Find out which manifest the store has, if the answer to the last write was lost."""
        found = manifest.read(self.store, self.address)
        if found is not None and found[0].id in self.state.ids:
            self.last, self.version = found
            self.state.confirm(found[0].id)

    def _upload(self, group: list[str]) -> Files:
        """Write the parts of files that are new or have changed, and return all parts.

        Raises:
            Removed: A file is no longer there.
        """
        paths = [self.folder.path / path for path in group]
        with contextlib.ExitStack() as stack:
            try:
                inode = paths[0].parent.stat().st_ino
                versions = [stamp(path) for path in paths]
                # Open files can be read to the end, also if the run removes them.
                opened = [
                    stack.enter_context(open(path, "rb", opener=files.opener)).fileno()
                    for path in paths
                ]
                if paths[0].parent.stat().st_ino != inode:  # another checkpoint of this step
                    raise Removed
            except (FileNotFoundError, files.NotPlainFileError):
                raise Removed from None
            for path, version, descriptor in zip(group, versions, opened, strict=True):
                if path not in self._known or self._known[path][0] != version:
                    self._known[path] = version, self._upload_file(path, descriptor)
        return {path: self._known[path][1] for path in group}

    def _upload_file(self, path: str, descriptor: int) -> tuple[Part, ...]:
        """Write the parts that the store does not have, and return all parts."""
        parts: list[Part] = []
        start = 0
        for old in manifest.without_small_ones(self.last.files.get(path, ())):
            data = os.pread(descriptor, old.size, start)
            if old != Part(len(data), hashlib.sha256(data).hexdigest()):
                break
            self._go_on()
            parts.append(old)
            start += old.size
        for part, data in read_parts(descriptor, start):
            self.store.put((self.address / object_name(path, part)).key, data, part.sha256)
            self._go_on()
            parts.append(part)
        return tuple(parts)

    def _find_leftovers(self) -> None:
        """Find parts of checkpoints that a killed process has written and no manifest names.

        Other objects below the address stay: they may belong to a mirror inside of this one.
        """
        if self._has_cleaned:
            return
        self._has_cleaned = True
        for place in (self.folder.checkpoints, SweepFolder(self.folder).stage("").path):
            found = [info.key for info in self.store.list(f"{(self.address / place.name).key}/")]
            self._removed |= {key for key in found if "@" in key} - self._keys(self.last)
