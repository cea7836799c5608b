"""Prepare a dataset: token shards, `documents.parquet`, `tokenizer.json` and `manifest.json`.

Read `_Preparation.run` first. The corpus is cut into chunks by a function of its sizes. A task for
each chunk writes part files and returns only counts. Shards are then exact slices of the parts.

The tasks run in threads of this process; in processes of its own if the corpus is larger; on Ray
from 2 GiB for each CPU of this machine. Ray Data costs 30 CPU seconds and a gigabyte.

The same corpus and settings give the same bytes on any number of CPUs and nodes. A killed
preparation continues with the part files that it has written.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from orchestrator import files, folders
from orchestrator.data import corpus, tasks
from orchestrator.data.corpus import CorpusFile, Listing
from orchestrator.data.dataset import Manifest, Shard, Split, load_manifest, write_manifest
from orchestrator.data.estimate import sample
from orchestrator.data.index import write_index
from orchestrator.data.input.download import Progress
from orchestrator.data.parts import FORMAT, SPLITS, Parts, write_slices
from orchestrator.data.prepared import (
    find_prepared,
    known_dir,
    list_sources,
    settings_of,
    with_hashes,
)
from orchestrator.data.ray_tasks import MAX_CHUNK_BYTES, SMALL_BYTES, WAIT_S, RayTasks, to_json
from orchestrator.data.shards import SHARD_ROWS
from orchestrator.data.split import tail_cut
from orchestrator.data.tasks import Job
from orchestrator.data.tokenizer import kind_of, load_tokenizer
from orchestrator.data.tokenizers.base import Tokenizer
from orchestrator.data.tokenizers.encoder import check_encoder, choose_encoder
from orchestrator.data.tokenizers.learn import tokenizer_of
from orchestrator.errors import NoRoomError, UnreadableError, UserError
from orchestrator.hashes import Stamp, stamp
from orchestrator.machine import available_cpus
from orchestrator.paths import scratch_folder

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

WORK = ".parts"  # folder of part files, inside the dataset; removed at the end
MIN_CHUNK_BYTES = 1 << 20
SMALL_CHUNK_BYTES = 8 << 20  # largest chunk of such a corpus: its tasks may share a process


def prepare_in(
    data: "Data",
    storage: Path,
    progress: Progress | None = None,
    sources: Listing | None = None,
    wait_s: float = WAIT_S,
) -> Manifest:
    """Prepare a dataset in the folder that its content names; see `dataset_dir` and `prepare`.

    The files that this machine has not hashed yet are hashed first; if they are large, on Ray.
    """
    sources = sources or list_sources(data)
    with RayTasks(progress, wait_s) as ray:
        if sources is not None:
            sources = with_hashes(sources, ray.hash_files)
        directory = known_dir(data, storage, read=True, sources=sources)
        assert directory is not None
        return prepare(data, directory, progress=progress, sources=sources, wait_s=wait_s)


def prepare(
    data: "Data",
    directory: Path,
    *,
    progress: Progress | None = None,
    chunk_bytes: int | None = None,
    shard_rows: int = SHARD_ROWS,
    sources: Listing | None = None,
    wait_s: float = WAIT_S,
) -> Manifest:
    """Prepare the dataset in `directory`, unless it is there already.

    Args:
        data: The `data` section.
        directory: Folder of the dataset, see `dataset_dir`.
        progress: Called with (stage, bytes done, bytes in all); None prints a line.
        chunk_bytes: Bytes of text in a task. The result does not depend on it.
        shard_rows: Rows of W tokens in a shard.
        sources: The files of the corpus, if they were listed already.
        wait_s: Longest wait for a node of a cluster; see `RayTasks`.

    Raises:
        UserError: The folder has another dataset, or the corpus or the tokenizer cannot be used.
    """
    directory = Path(os.path.abspath(directory))
    found = find_prepared(data, directory, sources=sources)
    if found is not None:
        return found
    # Find mistakes in these before the folder is created.
    check_encoder(data.encoder, data.tokenizer)
    sources = sources or corpus.resolve(data.corpus)
    if not kind_of(data.tokenizer).needs_corpus:
        load_tokenizer(data.tokenizer)
    folders.check_writable(directory, "data.dir")
    with _alone(directory):
        found = find_prepared(data, directory, sources=sources)
        if found is not None:
            return found
        with RayTasks(progress, wait_s) as ray:
            preparation = _Preparation(data, directory, sources, ray, chunk_bytes, shard_rows)
            try:
                return preparation.run()
            finally:
                tasks.forget_tokenizers()


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Let one process at a time prepare a folder. If it is refused, remove what it has written."""
    lock = directory / ".lock"
    created = folders.missing(directory)
    try:
        locked = _lock(lock)
    except UserError:  # the file system has no locks
        folders.remove_unused(lock, created)
        raise
    with locked:
        before = {*os.listdir(directory)} - {WORK}
        try:
            yield
        except (UnreadableError, NoRoomError):
            raise  # the same command will go on with the parts
        except UserError:  # the corpus or the settings have to change
            folders.remove_new(directory, before)
            with contextlib.suppress(OSError):
                lock.unlink()
                for folder in created:
                    folder.rmdir()
            raise


def _lock(path: Path) -> TextIO:
    """Return an open file with a lock, which the system frees if this process is killed."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another preparation was refused just now
            file = open(path, "w", opener=files.opener)  # noqa: SIM115 - the caller closes it
            try:
                files.lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{path.parent}: another process is preparing it; waiting", flush=True)
                files.lock(file, fcntl.LOCK_EX)
            if folders.is_at(path, file.fileno()):
                return file


def _versions(sources: list[CorpusFile]) -> list[Stamp]:
    """Return the versions of the files; UserError if one is not the file that was listed."""
    for source in sources:
        source.check_unchanged()
    return [stamp(source.path) for source in sources]


@dataclass
class _Preparation:
    data: "Data"
    directory: Path
    listed: Listing
    ray_tasks: RayTasks
    chunk_bytes: int | None
    shard_rows: int
    is_small: bool = False  # set by `run`

    def run(self) -> Manifest:
        work = self.directory / WORK
        work.mkdir(exist_ok=True)
        fetch = functools.partial(corpus.fetch, folder=work, progress=self.ray_tasks.progress)
        sources = Listing(map(fetch, self.listed), self.listed.left_out)
        total = sum(source.bytes for source in sources)
        self.is_small = self.chunk_bytes is None and total <= SMALL_BYTES * available_cpus()
        self.is_small |= self.directory.is_relative_to(scratch_folder())
        if not self.is_small:
            self.ray_tasks.check_shared(self.directory)
        print(f"corpus: {sources}", flush=True)
        versions = _versions(sources)
        source_files = tasks.source_files(sources)
        chunks = tasks.plan_chunks(sources, self._chunk_bytes(sources), self.data)
        sizes = [sum(span.end - span.start for span in spans) for spans in chunks]

        hashes = {str(s.path): f["sha256"] for s, f in zip(sources, source_files, strict=True)}
        jobs = tasks.tokenize_jobs(chunks, hashes, self.data)
        progress = self.ray_tasks.progress
        tokenizer = tokenizer_of(self.data, jobs, sizes, self._map, progress)
        if self.data.append_eot and tokenizer.eot_id is None:
            raise UserError(f"data.append_eot: {tokenizer.name} has no end-of-text token")
        tokenizer.save(self.directory)
        texts = (piece.text for piece in sample(chunks))
        fast = choose_encoder(self.data.encoder, tokenizer, total, texts)

        parts = self._tokenize(jobs, hashes, sizes, tokenizer, fast)
        print(f"documents: {parts}", flush=True)
        splits = self._write_shards(parts, tokenizer.dtype)
        if _versions(sources) != versions:
            raise UserError(
                "data.corpus: a file was changed while it was prepared; run the same command again"
            )
        write_manifest(
            self.directory,
            {
                "dtype": tokenizer.dtype.name,
                "settings": settings_of(self.data),
                "splits": splits,
                "sources": source_files,
                "tokenizer": tokenizer.facts(),
            },
        )
        shutil.rmtree(work, ignore_errors=True)
        return load_manifest(self.directory)

    def _chunk_bytes(self, sources: list[CorpusFile]) -> int:
        if self.chunk_bytes is not None:
            return self.chunk_bytes
        total = sum(source.bytes for source in sources)
        cpus = available_cpus() if self.is_small else self.ray_tasks.cpus()
        largest = SMALL_CHUNK_BYTES if self.is_small else MAX_CHUNK_BYTES
        return max(MIN_CHUNK_BYTES, min(largest, total // (4 * cpus)))

    def _map(self, *arguments: Any, threads: bool = False) -> list[Any]:
        return self.ray_tasks.map(*arguments, here=self.is_small, threads=threads)

    def _tokenize(
        self,
        jobs: list[Job],
        hashes: dict[str, str],
        sizes: list[int],
        tokenizer: Tokenizer,
        fast: bool,
    ) -> Parts:
        """Write the part files, in a folder named by the hash of all that decides them."""
        content = to_json([FORMAT, settings_of(self.data), tokenizer.sha256, fast, jobs, hashes])
        folder = self.directory / WORK / hashlib.sha256(content.encode()).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        task = functools.partial(
            tasks.tokenize,
            val_fraction=self.data.val_fraction,
            tokenizer=(tokenizer.name, tokenizer.sha256),
            fast=fast,
            append_eot=self.data.append_eot,
            dataset=str(self.directory),
            folder=str(folder),
        )
        facts = self._map("tokenizing", task, jobs, sizes)
        if self.data.split == "tail":
            characters = sum(part["train"]["characters"] for part in facts)
            again = tasks.cut_tail(jobs, facts, tail_cut(characters, self.data.val_fraction))
            sizes = [sizes[i] for i in again]
            cut = self._map("cutting", task, list(again.values()), sizes, threads=True)
            for i, part in zip(again, cut, strict=True):
                facts[i] = part
        return Parts(folder, facts)

    def _write_shards(self, parts: Parts, dtype: np.dtype) -> dict[str, Split]:
        """Write the shards and the index of documents."""
        empty = [split for split in SPLITS if parts.tokens(split) == 0]
        if empty:
            raise UserError(
                f"data.split: {self.data.split} with data.val_fraction={self.data.val_fraction} "
                f"leaves {' and '.join(empty)} without a token; use another split or more text"
            )
        jobs = {
            split: parts.shard_jobs(split, self.directory, self.shard_rows, dtype)
            for split in SPLITS
        }
        all_jobs = jobs["train"] + jobs["val"]
        sizes = [sum(count for _, _, count in job["slices"]) * dtype.itemsize for job in all_jobs]
        # The hash of a stream is the only sequential work. It runs while the shards are written.
        with ThreadPoolExecutor(1) as pool:
            hashes = {split: pool.submit(parts.stream_sha256, split) for split in SPLITS}
            shards = iter(self._map("writing", write_slices, all_jobs, sizes, threads=True))
            write_index(self.directory, {split: parts.documents(split) for split in SPLITS})
            return {
                split: Split(
                    **parts.totals(split),
                    stream_sha256=hashes[split].result(),
                    shards=tuple(Shard(**next(shards)) for _ in jobs[split]),
                )
                for split in SPLITS
            }
