"""Prepare a dataset: token shards, `documents.parquet`, `tokenizer.json` and `manifest.json`.

Read `_Preparation.run` first. The corpus is cut into chunks by a function of its sizes. Ray runs a
task for each chunk, which writes part files and returns only counts: tokens never enter Ray's
object store. Then each shard is written from exact slices of the parts.

A corpus of a few megabytes is prepared in this process: starting Ray Data would take longer.

The same corpus and settings give the same bytes on any number of CPUs and nodes. A killed
preparation continues with the part files that it has written.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import files
from orchestrator.cluster import local as local_ray
from orchestrator.data import corpus, tasks
from orchestrator.data.corpus import Progress, Source
from orchestrator.data.dataset import Manifest, Shard, Split, load_manifest, write_manifest
from orchestrator.data.documents import Span
from orchestrator.data.index import write_index
from orchestrator.data.parts import SPLITS, Parts, write_slices
from orchestrator.data.prepared import find_prepared, settings_of
from orchestrator.data.progress import ProgressLine
from orchestrator.data.shards import SHARD_ROWS
from orchestrator.data.tasks import Job, Survey
from orchestrator.data.tokenizer import Tokenizer, kind_of, load_tokenizer
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

WORK = ".parts"  # folder of part files, inside the dataset; removed at the end
MIN_CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 32 << 20
SMALL_BYTES = 4 * MIN_CHUNK_BYTES  # a corpus up to this size is prepared without Ray


def prepare(
    data: "Data",
    directory: Path,
    *,
    progress: Progress | None = None,
    chunk_bytes: int | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Manifest:
    """Prepare the dataset in `directory`, unless it is there already.

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
    # Find mistakes in these two before the folder is created.
    corpus.resolve(data.corpus)
    if kind_of(data.tokenizer).learn is None:
        load_tokenizer(data.tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    shown = progress or ProgressLine()
    with _lock(directory):
        found = find_prepared(data, directory)
        if found is not None:
            return found
        with RayTasks() as ray:
            preparation = _Preparation(data, directory, ray, shown, chunk_bytes, shard_rows)
            try:
                return preparation.run()
            except UserError:
                # The corpus or the settings have to change; then these parts are of no use.
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
        found = corpus.resolve(self.data.corpus)
        sources = [corpus.fetch(source, work, self.progress) for source in found]
        versions = [source.version() for source in sources]
        chunks = tasks.plan_chunks(sources, self._chunk_bytes(sources), self.data)
        sizes = [sum(span.end - span.start for span in spans) for spans in chunks]

        # The characters are counted if the split or the tokenizer depends on them.
        learn = kind_of(self.data.tokenizer).learn
        count = self.data.split == "tail" or learn is not None
        jobs: list[Job] = [{"spans": spans, "count_characters": count} for spans in chunks]
        surveys = self._map("reading", tasks.survey, jobs, sizes)
        source_files = tasks.source_files(sources, surveys)
        if learn is None:
            tokenizer = load_tokenizer(self.data.tokenizer)
        else:
            tokenizer = learn("".join(survey["seen"] for survey in surveys))
        if self.data.append_eot and tokenizer.eot_id is None:
            raise UserError(f"data.append_eot: {tokenizer.name} has no end-of-text token")
        tokenizer.save(self.directory)

        parts = self._tokenize(chunks, sizes, surveys, tokenizer)
        splits = self._write_shards(parts, tokenizer.dtype)
        if [source.version() for source in sources] != versions:
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

    def _chunk_bytes(self, sources: list[Source]) -> int:
        if self.chunk_bytes is not None:
            return self.chunk_bytes
        total = sum(source.bytes for source in sources)
        if total <= SMALL_BYTES:
            return MIN_CHUNK_BYTES
        share = total // (4 * self.ray_tasks.cpus())
        return max(MIN_CHUNK_BYTES, min(MAX_CHUNK_BYTES, share))

    def _map(
        self, stage: str, task: Callable[..., Any], jobs: list[Job], sizes: list[int]
    ) -> list[Any]:
        """Return the result of a task for each job, in order; `sizes` are the bytes of the jobs."""
        results = [None] * len(jobs)
        done = 0
        total = sum(sizes)
        self.progress(stage, done, total)
        here = self.chunk_bytes is None and total <= SMALL_BYTES
        for number, result in self.ray_tasks.map(task, jobs, here):
            results[number] = result
            done += sizes[number]
            self.progress(stage, done, total)
        return results

    def _tokenize(
        self,
        chunks: list[list[Span]],
        sizes: list[int],
        surveys: list[Survey],
        tokenizer: Tokenizer,
    ) -> Parts:
        """Write the part files, in a folder named by the hash of all that decides them."""
        jobs = tasks.tokenize_jobs(chunks, surveys, self.data)
        content = _to_json([settings_of(self.data), tokenizer.sha256, jobs, surveys])
        folder = self.directory / WORK / hashlib.sha256(content.encode()).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        task = functools.partial(
            tasks.tokenize,
            val_fraction=self.data.val_fraction,
            tokenizer=(tokenizer.name, tokenizer.sha256),
            append_eot=self.data.append_eot,
            dataset=str(self.directory),
            folder=str(folder),
        )
        return Parts(folder, self._map("tokenizing", task, jobs, sizes))

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
            shards = iter(self._map("writing", write_slices, all_jobs, sizes))
            write_index(self.directory, {split: parts.documents(split) for split in SPLITS})
            return {
                split: Split(
                    **parts.totals(split),
                    stream_sha256=hashes[split].result(),
                    shards=tuple(Shard(**next(shards)) for _ in jobs[split]),
                )
                for split in SPLITS
            }


class RayTasks:
    """Runs tasks on the Ray of this process or of $RAY_ADDRESS, else on a temporary local Ray.

    The temporary Ray starts when it is needed first.
    """

    is_ours = False

    def __enter__(self) -> "RayTasks":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_ours:
            import ray

            ray.shutdown()

    def _connect(self) -> None:
        import ray

        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            start = ray.init if os.environ.get("RAY_ADDRESS") else local_ray.start
            start(log_to_driver=False, logging_level=logging.ERROR)
            self.is_ours = True

    def cpus(self) -> int:
        """Return the number of CPUs; 1 if a cluster that grows has none yet."""
        import ray

        self._connect()
        return int(ray.cluster_resources().get("CPU", 0)) or 1

    def map(
        self, task: Callable[..., Any], jobs: list[Job], here: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Run `task(**job)` for each job. Yield its number and its result as soon as it ends.

        Jobs and results are passed as JSON, because Arrow would guess a type for each field.

        Args:
            task: A function of `tasks` or `parts`.
            jobs: Its arguments.
            here: Run the tasks in this process, without Ray.

        Raises:
            UserError: A task raised it, or a file of the corpus cannot be opened.
        """
        rows = [{"job": _to_json([number, job])} for number, job in enumerate(jobs)]
        run = functools.partial(_run_job, task, os.environ.get("TIKTOKEN_CACHE_DIR"))
        for row in map(run, rows) if here else self.run_rows(run, rows):
            number, result, error = json.loads(row["result"])
            if error is not None:
                raise UserError(error)
            yield number, result

    def run_rows(
        self, run: Callable[[dict[str, str]], dict[str, str]], rows: list[dict[str, str]]
    ) -> Iterator[dict[str, str]]:
        """Run a function on small rows with Ray Data, one task per row."""
        import ray.data

        self._connect()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # This logger warns that no progress bars are shown.
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
    return {"result": _to_json([number, result, error])}


def _to_json(content: list[Any]) -> str:
    return json.dumps(content, default=vars)  # vars: a dataclass becomes a dict
