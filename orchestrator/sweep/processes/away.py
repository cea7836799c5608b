"""Trains stages on a machine that does not have the folder of the sweep."""

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from orchestrator import files, folders
from orchestrator.checkpoint.format import MANIFEST, read_manifest, verify
from orchestrator.errors import UserError
from orchestrator.objects import cache
from orchestrator.runs import stop
from orchestrator.runs.folder import SweepFolder
from orchestrator.sweep.processes.desk import Handed, Piece
from orchestrator.sweep.processes.place import Call, Place
from orchestrator.sweep.records import read_spec
from orchestrator.workers import places
from orchestrator.workers.attempts import failure_of

if TYPE_CHECKING:
    from orchestrator.train.numerics import Worker

# A watchdog waits longer between storing stacks and ending its process, so the stacks are sent.
PERIOD_S = 0.5
PIECE_BYTES = 32 << 20  # of a checkpoint, in one call of the desk


def place_of(config: dict[str, Any], call: Call | None) -> Place:
    """Return where this process trains stages.

    Args:
        config: From `places.of_driver`, for the folder of the sweep.
        call: Calls the desk; None: all nodes share the folder.
    """
    if call is None or places.has_folder(config):
        return Place(SweepFolder(config["folder"]), call)
    return Away(config, call)


class Away(Place):
    """Trains stages in a folder of this process, and sends their files to the desk.

    A thread sends what is new. If it fails, the stage is asked to stop.
    """

    def __init__(self, config: dict[str, Any], call: Call) -> None:
        self.config = config
        self.there = SweepFolder(config["folder"])  # on the machine of the command
        self.unit = places.of_process(config)
        super().__init__(SweepFolder(self.unit / self.there.name), call)
        folders.make_folder(self.sweep.path)
        self._lock = threading.Lock()  # one thread at a time sends
        self._turn = ("", "")  # stage and token

    def problem(self, stage: str) -> str | None:
        """As `Place` says."""
        folders.make_folder(self.sweep.stage(stage).path)
        # A request to the stage before. `begin` asks whether the sweep was asked to stop.
        self.sweep.stop_request_file.unlink(missing_ok=True)
        return None

    def begin(self, stage: str) -> bool:
        """As `Place` says."""
        self.folder = self.sweep.stage(stage)
        self._turn = (stage, uuid.uuid4().hex)
        self._sent: dict[Path, object] = {}  # version of each file and checkpoint
        self._lines: dict[Path, IO[bytes]] = {}  # files that grow, read as far as they were sent
        self._error: Exception | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="sender", daemon=True)
        shutil.rmtree(self.folder.path, ignore_errors=True)
        folders.make_folder(self.folder.path)
        handed: Handed | None = self._ask("begin", True)
        if handed is None:
            return False
        if handed.stop is not None:
            stop.request(self.sweep, handed.stop)
        self._take_handed(stage, handed)
        self._thread.start()
        return True

    def _take_handed(self, stage: str, handed: Handed) -> None:
        for name, data in handed.files.items():
            files.write_atomically(self.folder.path / name, data)
        list(self._new_pieces())  # the desk has these files: they count as sent
        for file in self._lines.values():
            file.seek(0, os.SEEK_END)  # also after an incomplete last line, which stays
        spec = read_spec(self.folder)
        assert spec is not None
        begin = None if spec.begin is None else self._here(Path(spec.begin))
        self._clear({stage, *(begin.parts if begin else ())})
        if handed.step is not None:
            checkpoint = self.folder.checkpoint(handed.step)
            self._fetch(self.there.stage(stage).checkpoint(handed.step), checkpoint)
            self._sent[checkpoint] = checkpoint.stat().st_ino
        elif spec.begin is not None and begin is not None:
            self._fetch(Path(spec.begin), begin)
        data_dir = places.tokens(self.config, Path(spec.data_dir))
        begin_here = None if begin is None else str(begin)
        # The parent is not here, and the desk has copied the line that a stage needs of it.
        spec = replace(spec, data_dir=str(data_dir), begin=begin_here, parent=None)
        spec.write(self.folder)

    def _here(self, path: Path) -> Path:
        """Return the path here of a checkpoint of the sweep, or of the run of `sweep.from`."""
        if path.is_relative_to(self.there.path):
            return self.sweep.path / path.relative_to(self.there.path)
        return self.sweep.path / "from" / path.name

    def _clear(self, kept: set[str]) -> None:
        """Remove the stages that this one does not need."""
        for other in self.sweep.stages():
            if other.name not in kept:
                shutil.rmtree(other.path)

    def _fetch(self, source: Path, target: Path) -> None:
        """Copy a checkpoint to this machine, unless it is here. Its readers verify it."""
        manifest = self._call_desk("read", source / MANIFEST, 0, PIECE_BYTES)
        if _is_valid(target, manifest):
            return
        shutil.rmtree(target, ignore_errors=True)
        temporary = target.with_name(f".{target.name}-copy")
        shutil.rmtree(temporary, ignore_errors=True)
        folders.make_folder(temporary)
        (temporary / MANIFEST).write_bytes(manifest)
        parts = read_manifest(temporary)["parts"]
        cache.make_room(self.unit, sum(part["size"] for part in parts.values()))
        for name, part in parts.items():
            with open(temporary / name, "xb") as file:
                for start in range(0, part["size"], PIECE_BYTES):
                    file.write(self._call_desk("read", source / name, start, PIECE_BYTES))
        os.rename(temporary, target)

    # ---- to the desk ----

    def _call_desk(self, method: str, *args: Any) -> Any:
        assert self._call is not None
        return self._call(method, *args)

    def _ask(self, method: str, *args: Any) -> Any:
        """Call a method of the desk that needs a turn."""
        return self._call_desk(method, *self._turn, *args)

    def _follow(self) -> None:
        while not self._closed.wait(PERIOD_S):
            try:
                self.sync()
            except Exception as error:
                self._error = error
                stop.request(self.sweep, f"its files cannot be sent: {error}")
                return

    def sync(self) -> None:
        """As `Place` says."""
        with self._lock:
            if self._error is not None:
                raise self._error
            # Listed before the journal is read, which then has all lines before these checkpoints.
            steps = self.folder.checkpoint_steps()
            stop_reason = self._ask("take", list(self._new_pieces()))
            if stop_reason is not None:
                stop.request(self.sweep, stop_reason)
            for step in steps:
                self._send_checkpoint(self.folder.checkpoint(step), step)

    def finish(self) -> None:
        """As `Place` says."""
        self._end_thread()
        self.sync()
        result = self.folder.result_file
        self._ask("end", files.read_bytes(result) if result.exists() else None)

    def give_up(self) -> None:
        """As `Place` says."""
        for call in (self._end_thread, self.sync, lambda: self._ask("end", None)):
            with contextlib.suppress(Exception):  # it may not have begun
                call()

    def failed(self, stage: str, worker: "Worker", error: Exception) -> None:
        """As `Place` says. The disk here may be full, so that the desk writes."""
        with contextlib.suppress(Exception):  # the driver gets the error itself
            failure = failure_of(self.sweep.stage(stage), worker, error)
            self._call_desk("failed", stage, self._turn[1], *failure)

    def close(self) -> None:
        """As `Place` says. If Tune kills the process first, `cache.make_room` removes the rest."""
        removed = self.unit.with_name(f".{self.unit.name}")
        with contextlib.suppress(FileNotFoundError):  # closed before
            os.rename(self.unit, removed)
        shutil.rmtree(removed, ignore_errors=True)

    def _end_thread(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _new_pieces(self) -> Iterator[Piece]:
        """Yield what is new of the files, in the order in which the desk must write them.

        A resume moves lines from the journal to an aside. The journal is read first, so that no
        line is missed, and written last, so that the desk gets the aside before the line is gone.
        """
        folder = self.folder
        journal = list(self._new_lines(folder.journal_file))
        yield from self._new_lines(folder.events_file)
        others = [*folder.path.glob("[!.]*"), *folder.sample_files(), *folder.mark_files()]
        for file in others:
            if file.name not in self._not_whole and file.is_file():
                yield from self._new_content(file)
        yield from journal

    @property
    def _not_whole(self) -> set[str]:
        """Names of files that are sent line by line, at the end, or not at all."""
        folder = self.folder
        sent = {folder.journal_file.name, folder.events_file.name, folder.result_file.name}
        return sent | {folder.stage_file.name}

    def _new_content(self, file: Path) -> Iterator[Piece]:
        """Yield the whole file if it has changed."""
        with contextlib.suppress(FileNotFoundError):
            found = file.stat()
            version = (found.st_ino, found.st_size, found.st_mtime_ns)
            if self._sent.get(file) != version:
                data = files.read_bytes(file)
                self._sent[file] = version
                yield (os.path.relpath(file, self.folder.path), 0, data)

    def _new_lines(self, file: Path) -> Iterator[Piece]:
        """Yield the new lines of a file, or all if another file has replaced it."""
        opened = self._lines.get(file)
        try:
            inode = file.stat().st_ino
            is_new = opened is None or os.fstat(opened.fileno()).st_ino != inode
            if opened is None or is_new:
                # It stays open, so that a file that replaces it has another inode.
                opened = open(file, "rb", buffering=0, opener=files.opener)  # noqa: SIM115
        except FileNotFoundError:
            return
        self._lines[file] = opened
        start = opened.tell()
        data = opened.read()
        whole_lines = data[: data.rfind(b"\n") + 1]
        opened.seek(start + len(whole_lines))
        if whole_lines or is_new:
            yield (file.name, start, whole_lines)

    def _send_checkpoint(self, path: Path, step: int) -> None:
        """Send a checkpoint that is new, unless it is removed meanwhile."""
        with contextlib.ExitStack() as stack:
            try:
                inode = path.stat().st_ino
                if self._sent.get(path) == inode:
                    return
                # Open files can be read to the end, also if the run removes the checkpoint.
                opened = [
                    stack.enter_context(open(file, "rb", opener=files.opener))
                    for file in sorted(path.iterdir())
                ]
            except FileNotFoundError:
                return
            sizes = [os.fstat(file.fileno()).st_size for file in opened]
            self._ask("begin_checkpoint", step, sum(sizes))
            for file, size in zip(opened, sizes, strict=True):
                for start in range(0, max(size, 1), PIECE_BYTES):  # an empty file is one piece
                    data = os.pread(file.fileno(), PIECE_BYTES, start)
                    self._ask("take_part", (os.path.basename(file.name), start, data))
            self._ask("commit")
            self._sent[path] = inode


def _is_valid(checkpoint: Path, manifest: bytes) -> bool:
    """Return whether a checkpoint is here that has this manifest."""
    try:
        if files.read_bytes(checkpoint / MANIFEST) != manifest:
            return False
        verify(checkpoint, remember=True)
    except (OSError, UserError):
        return False
    return True
