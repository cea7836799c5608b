"""Prepare a dataset: token shards, `documents.parquet`, `tokenizer.json` and, last, `manifest.json`.

Read `_Preparation.run` first. The corpus is cut into chunks by a function of its sizes. Ray Data
maps the tasks of `tasks.py` over the chunks; they write part files and return only counts, so
tokens never enter Ray's object store. Then each shard is written from exact slices of the parts.

The same corpus and settings give the same bytes on any number of CPUs and nodes. A preparation that
was killed goes on with the parts that it has.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import files
from orchestrator.cluster import local as local_ray
from orchestrator.data import corpus, parts, tasks, tokenizer
from orchestrator.data.corpus import Progress, Source
from orchestrator.data.dataset import (
    ROW_TOKENS,
    Manifest,
    Shard,
    Split,
    load_manifest,
    write_manifest,
)
from orchestrator.data.documents import Span
from orchestrator.data.index import write_index
from orchestrator.data.parts import SPLITS, Parts
from orchestrator.data.prepared import find_prepared, settings_of
from orchestrator.data.progress import ProgressLine
from orchestrator.data.shards import SHARD_ROWS
from orchestrator.data.tasks import Job
from orchestrator.data.tokenizer import Tokenizer
from orchestrator.errors import UserError
from orchestrator.redact import redact_text

if TYPE_CHECKING:
    from orchestrator.config.experiment import Data

WORK = ".parts"  # folder inside the dataset's; removed at the end
MIN_CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 32 << 20


def prepare(
    data: "Data",
    directory: Path,
    *,
    progress: Progress | None = None,
    chunk_bytes: int | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Manifest:
    """Prepare the dataset in `directory`, or find that it is there.

    Args:
        data: The `data` section.
        directory: Folder of the dataset, see `dataset_dir`.
        progress: Called with (stage, bytes done, bytes in all); None prints a line.
        chunk_bytes: Bytes of text in a task. The result does not depend on it.
        shard_rows: Rows of W tokens in a shard.

    Raises:
        UserError: The folder has another dataset, or the corpus or the tokenizer cannot be used.
    """
    directory = Path(os.path.abspath(directory))
    found = find_prepared(data, directory)
    if found is not None:
        return found
    # A mistake in these two should leave no folder.
    corpus.resolve(data.corpus)
    if tokenizer.kind_of(data.tokenizer).learn is None:
        tokenizer.load_tokenizer(data.tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory):
        found = find_prepared(data, directory)
        if found is not None:
            return found
        with RayTasks() as ray_tasks:
            preparation = _Preparation(
                data, directory, ray_tasks, progress or ProgressLine(), chunk_bytes, shard_rows
            )
            try:
                return preparation.run()
            except UserError:
                # The parts are of a text that has to change first.
                shutil.rmtree(directory / WORK, ignore_errors=True)
                raise


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Let one process at a time prepare a folder. The system frees the lock of a killed process."""
    with open(directory / ".lock", "w", opener=files.opener) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{directory}: another process is preparing it; waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Preparation:
    data: "Data"
    directory: Path
    ray_tasks: "RayTasks"
    progress: Progress
    chunk_bytes: int | None
    shard_rows: int

    def run(self) -> Manifest:
        work = self.directory / WORK
        work.mkdir(exist_ok=True)
        sources = [self._fetch(source, work) for source in corpus.resolve(self.data.corpus)]
        versions = _versions(sources)
        chunks = tasks.plan_chunks(sources, self._chunk_bytes(sources), self.data)
        sizes = [sum(span.end - span.start for span in spans) for spans in chunks]

        surveys = self._survey(chunks, sizes)
        hashes = {path: sha256 for survey in surveys for path, sha256 in survey["sha256"].items()}
        _check_downloads(sources, hashes)
        encoder = self._tokenizer(surveys)
        encoder.save(self.directory)
        made = self._tokenize(tasks.tokenize_jobs(chunks, surveys, self.data), sizes, encoder)
        splits = self._write_shards(made, encoder.dtype)
        if _versions(sources) != versions:
            raise UserError(
                "data.corpus: a file was changed while it was prepared; run the same command again"
            )
        write_manifest(
            self.directory,
            {
                "dtype": encoder.dtype.name,
                "row_tokens": ROW_TOKENS,
                "settings": settings_of(self.data),
                "splits": {name: asdict(split) for name, split in splits.items()},
                "sources": [
                    {"name": s.name, "size": s.bytes, "sha256": hashes[str(s.path)]}
                    for s in sources
                ],
                "tokenizer": encoder.facts(),
            },
        )
        shutil.rmtree(work, ignore_errors=True)
        return load_manifest(self.directory)

    def _fetch(self, source: Source, work: Path) -> Source:
        if source.url is None:
            return source
        # All nodes see the dataset's folder, but not the cache of this machine.
        return corpus.link(corpus.fetch(source, self.progress), work)

    def _chunk_bytes(self, sources: list[Source]) -> int:
        if self.chunk_bytes is not None:
            return self.chunk_bytes
        share = sum(source.bytes for source in sources) // (4 * self.ray_tasks.cpus())
        return max(MIN_CHUNK_BYTES, min(MAX_CHUNK_BYTES, share))

    def _survey(self, chunks: list[list[Span]], sizes: list[int]) -> list[tasks.Survey]:
        """Hash the files; count characters if the split or the tokenizer depends on them."""
        count = (
            self.data.split == "tail" or tokenizer.kind_of(self.data.tokenizer).learn is not None
        )
        return self._map("reading", tasks.survey, tasks.survey_jobs(chunks, count), sizes)

    def _tokenizer(self, surveys: list[tasks.Survey]) -> Tokenizer:
        learn = tokenizer.kind_of(self.data.tokenizer).learn
        if learn is None:
            found = tokenizer.load_tokenizer(self.data.tokenizer)
        else:
            found = learn("".join(survey["seen"] for survey in surveys))
        if self.data.append_eot and found.eot_id is None:
            raise UserError(f"data.append_eot: {found.name} has no end-of-text token")
        return found

    def _tokenize(self, jobs: list[Job], sizes: list[int], encoder: Tokenizer) -> Parts:
        """Write the part files, in a folder whose name depends on all that decides them."""
        content = json.dumps([settings_of(self.data), encoder.sha256, jobs])
        folder = self.directory / WORK / hashlib.sha256(content.encode()).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        task = functools.partial(
            tasks.tokenize,
            val_fraction=self.data.val_fraction,
            tokenizer=(encoder.name, encoder.sha256),
            append_eot=self.data.append_eot,
            dataset=str(self.directory),
            folder=str(folder),
        )
        return Parts(folder, self._map("tokenizing", task, jobs, sizes))

    def _map(
        self, stage: str, task: Callable[..., Any], jobs: list[Job], sizes: list[int]
    ) -> list[Any]:
        """Run a task for each job and report the progress.

        Args:
            stage: Name of the work in the progress.
            task: A function of `tasks.py` or `parts.py`.
            jobs: The arguments of each call.
            sizes: The bytes of each job.

        Returns:
            The results, in the order of the jobs.
        """
        results = [None] * len(jobs)
        done = 0
        self.progress(stage, done, sum(sizes))
        for number, result in self.ray_tasks.map(task, jobs):
            results[number] = result
            done += sizes[number]
            self.progress(stage, done, sum(sizes))
        return results

    def _write_shards(self, made: Parts, dtype: np.dtype) -> dict[str, Split]:
        """Write the shards and the index of documents."""
        empty = [split for split in SPLITS if made.tokens(split) == 0]
        if empty:
            raise UserError(
                f"data.split: {self.data.split} with data.val_fraction={self.data.val_fraction} "
                f"leaves {' and '.join(empty)} without a token; use another fraction, another split "
                "or more text"
            )
        jobs = {
            split: made.shard_jobs(split, self.directory, self.shard_rows, dtype)
            for split in SPLITS
        }
        all_jobs = jobs["train"] + jobs["val"]
        sizes = [sum(count for _, _, count in job["slices"]) * dtype.itemsize for job in all_jobs]
        # The hash of a stream is the only sequential work. It runs while the shards are written.
        with ThreadPoolExecutor(1) as pool:
            hashes = {split: pool.submit(made.stream_sha256, split) for split in SPLITS}
            shards = iter(self._map("writing", parts.write_slices, all_jobs, sizes))
            write_index(self.directory, {split: made.documents(split) for split in SPLITS})
            return {
                split: Split(
                    **made.totals(split),
                    stream_sha256=hashes[split].result(),
                    shards=tuple(Shard(**next(shards)) for _ in jobs[split]),
                )
                for split in SPLITS
            }


def _versions(sources: list[Source]) -> list[tuple[int, int]]:
    found = [source.path.stat() for source in sources]
    return [(stat.st_size, stat.st_mtime_ns) for stat in found]


def _check_downloads(sources: list[Source], hashes: Mapping[str, str]) -> None:
    for source in sources:
        if source.url is not None and source.sha256 != hashes[str(source.path)]:
            raise UserError(
                f"{redact_text(source.url)}: its copy in {corpus.cache_folder()} is not what its "
                "SHA-256 says; delete it"
            )


class RayTasks:
    """Runs tasks on Ray: the Ray of this process or of $RAY_ADDRESS, else a local one meanwhile."""

    def __enter__(self) -> "RayTasks":
        import ray

        self.is_ours = not ray.is_initialized()
        if self.is_ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            start = ray.init if os.environ.get("RAY_ADDRESS") else local_ray.start
            start(log_to_driver=False, logging_level=logging.ERROR)
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        if self.is_ours:
            ray.shutdown()

    def cpus(self) -> int:
        """Return the number of CPUs; 1 if a cluster that grows has none yet."""
        import ray

        return int(ray.cluster_resources().get("CPU", 0)) or 1

    def map(self, task: Callable[..., Any], jobs: list[Job]) -> Iterator[tuple[int, Any]]:
        """Run `task(**job)` for each job on its own.

        Jobs and results travel as JSON: Arrow would guess a type for each field.

        Returns:
            Number of the job, and result; in the order in which the jobs end.

        Raises:
            UserError: A task raised it, or a file of the corpus cannot be opened.
        """
        rows = [{"job": json.dumps([number, job])} for number, job in enumerate(jobs)]
        run = functools.partial(_run_job, task, os.environ.get("TIKTOKEN_CACHE_DIR"))
        for row in self.run_rows(run, rows):
            number, result, error = json.loads(row["result"])
            if error is not None:
                raise UserError(error)
            yield number, result

    def run_rows(
        self, run: Callable[[dict[str, str]], dict[str, str]], rows: list[dict[str, str]]
    ) -> Iterator[dict[str, str]]:
        """Run a function of small rows in parallel."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # It warns that it shows no progress bars.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        yield from ray.data.from_items(rows, override_num_blocks=len(rows)).map(run).iter_rows()


def _run_job(
    task: Callable[..., Any], tiktoken_cache: str | None, row: dict[str, str]
) -> dict[str, str]:
    if tiktoken_cache is not None:
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", tiktoken_cache)
    number, job = json.loads(row["job"])
    result = error = None
    try:
        result = task(**job)
    except (UserError, PermissionError, FileNotFoundError) as raised:
        # Returned, not raised: Ray wraps exceptions and runs some tasks again.
        error = str(raised)
    return {"result": json.dumps([number, result, error])}
