"""Documents become a dataset: Parquet token shards, `documents.parquet`, `tokenizer.json` and, last, `manifest.json`.

Eats `config.Data`; yields a `Manifest`. The corpus is cut into chunks by a function of its sizes; Ray Data maps the
jobs of `parts.py` over them; the driver sees only counts, adds them up, and maps the shards, each an exact slice of the
stream. So the same corpus and settings give the same bytes on any number of CPUs and nodes, in bounded memory, and a
killed preparation goes on with the parts that it has. Nothing but this file knows of ray.data.
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
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import files
from orchestrator.cluster import local as local_ray
from orchestrator.data import corpus
from orchestrator.data import tasks as parts
from orchestrator.data.assembly import Parts
from orchestrator.data.corpus import Source
from orchestrator.data.dataset import ROW_TOKENS, Manifest, load_manifest, write_manifest
from orchestrator.data.documents import Span, plan_spans
from orchestrator.data.index import write_index
from orchestrator.data.prepared import find_prepared, settings_of
from orchestrator.data.progress import ProgressLine
from orchestrator.data.shards import SHARD_ROWS
from orchestrator.data.tasks import SPLITS, is_val, tail_cut
from orchestrator.data.tokenizer import Tokenizer, char_tokenizer, load_tokenizer
from orchestrator.errors import UserError
from orchestrator.redact import redact_text

if TYPE_CHECKING:
    from orchestrator.config.experiment import Data

WORK = ".parts"  # inside the dataset's folder, gone when it is done
HASH_BYTES = 64 << 20  # of small files that one task hashes
Progress = Callable[[str, int, int], None]


def prepare(
    data: "Data",
    directory: Path,
    *,
    progress: Progress | None = None,
    chunk_bytes: int | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Manifest:
    """Make the dataset in `directory`, or find that it is already there.

    Args:
        progress: called with (stage, bytes done, bytes in all); None prints a line.
        chunk_bytes: of text per task; the result does not depend on it.
        shard_rows: rows of a shard, W tokens each.

    Raises:
        UserError: the folder holds another dataset, or something is wrong with the corpus or the tokenizer.
    """
    directory = Path(os.path.abspath(directory))
    if done := find_prepared(data, directory):
        return done
    corpus.resolve(data.corpus)  # a mistake in these two should leave no folder behind
    if data.tokenizer != "char":
        load_tokenizer(data.tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        if done := find_prepared(data, directory):
            return done
        try:
            with _ray():
                return _Preparation(
                    data, directory, progress or ProgressLine(), chunk_bytes, shard_rows
                ).run()
        except UserError:
            shutil.rmtree(
                directory / WORK, ignore_errors=True
            )  # parts of a text that has to change first
            raise


@dataclass
class _Preparation:
    data: "Data"
    directory: Path
    progress: Progress
    chunk_bytes: int | None
    shard_rows: int

    def run(self) -> Manifest:
        work = self.directory / WORK
        work.mkdir(exist_ok=True)
        self.sources = [self._fetch(s, work) for s in corpus.resolve(self.data.corpus)]
        stamps = _stamps(self.sources)
        self.chunks = plan_spans(
            [s.size for s in self.sources], self.chunk_bytes or self._default_chunk()
        )
        self.sizes = [sum(end - start for _, start, end in chunk) for chunk in self.chunks]
        hashes, characters, seen = self._survey()
        tokenizer = (
            char_tokenizer(seen)
            if self.data.tokenizer == "char"
            else load_tokenizer(self.data.tokenizer)
        )
        tokenizer.save(self.directory)
        folder = work / self._fingerprint(hashes, tokenizer)
        folder.mkdir(exist_ok=True)
        made = Parts(folder, self._tokenize(folder, tokenizer, hashes, characters), SPLITS)
        self._refuse_empty(made)
        splits = self._assemble(made, tokenizer.dtype)
        if _stamps(self.sources) != stamps:
            raise UserError(
                "data.corpus: a file was changed while it was prepared; run the same command again"
            )
        sources = zip(self.sources, hashes, strict=True)
        write_manifest(
            self.directory,
            {
                "dtype": tokenizer.dtype.name,
                "row_tokens": ROW_TOKENS,
                "settings": settings_of(self.data),
                "splits": splits,
                "sources": [
                    {"name": s.name, "size": s.size, "sha256": sha256} for s, sha256 in sources
                ],
                "tokenizer": {k: v for k, v in tokenizer.describe().items() if k != "characters"},
            },
        )
        shutil.rmtree(work, ignore_errors=True)
        return load_manifest(self.directory)

    # ---- the corpus ----
    def _fetch(self, source: Source, work: Path) -> Source:
        """Downloads are linked into the dataset's folder, which all nodes see; this machine's cache they do not."""
        if source.url is None:
            return source
        return corpus.link(corpus.fetch(source, self.progress), work)

    def _default_chunk(self) -> int:
        return max(1 << 20, min(32 << 20, sum(s.size for s in self.sources) // (4 * _cpus())))

    def _survey(self) -> tuple[list[str], list[int], str]:
        """SHA-256 of every source; characters of every chunk, and which there are, where split or tokenizer ask."""
        scan = self.data.split == "tail" or self.data.tokenizer == "char"
        jobs = [{"sources": group} for group in self._hash_groups()]
        jobs += (
            [{"id": i, "spans": self._spans(chunk)} for i, chunk in enumerate(self.chunks)]
            if scan
            else []
        )
        hashes, counts, seen = {}, [0] * len(self.chunks), set()
        done, total = 0, sum(self.sizes) * (1 + scan)
        self.progress("reading", 0, total)
        for result in _map(parts.survey, jobs, {"text_field": self.data.text_field}):
            hashes.update(dict(result.get("sha256", [])))
            if "id" in result:
                counts[result["id"]] = result["characters"]
                seen.update(result["seen"])
            done += result["bytes"]
            self.progress("reading", done, total)
        for n, source in enumerate(self.sources):
            if source.sha256 and source.sha256 != hashes[n]:
                raise UserError(
                    f"{redact_text(source.url)}: its copy in {corpus.cache_folder()} is not what its "
                    f"SHA-256 says; delete it"
                )
        return [hashes[n] for n in range(len(self.sources))], counts, "".join(seen)

    def _hash_groups(self) -> list[list[list[Any]]]:
        groups, size = [[]], 0
        for number, source in enumerate(self.sources):
            if groups[-1] and size + source.size > HASH_BYTES:
                groups.append([])
                size = 0
            groups[-1].append([number, str(source.path)])
            size += source.size
        return groups

    # ---- parts ----
    def _tokenize(
        self, folder: Path, tokenizer: Tokenizer, hashes: list[str], characters: list[int]
    ) -> list[dict]:
        """Counts of every part, in order."""
        if self.data.append_eot and tokenizer.eot_id is None:
            raise UserError(f"data.append_eot: {tokenizer.name} has no end-of-text token")
        common = {
            "text_field": self.data.text_field,
            "tokenizer": [tokenizer.name, tokenizer.sha256],
            "directory": str(self.directory),
            "parts": str(folder),
            "append_eot": self.data.append_eot,
        }
        decide = self._cuts(characters) if self.data.split == "tail" else self._hashed(hashes)
        jobs = [
            {"id": i, "spans": self._spans(chunk), **decide[i]}
            for i, chunk in enumerate(self.chunks)
        ]
        counts: list[Any] = [None] * len(jobs)
        done, total = 0, sum(self.sizes)
        self.progress("tokenizing", 0, total)
        for result in _map(parts.tokenize, jobs, common):
            counts[result["id"]] = result
            done += self.sizes[result["id"]]
            self.progress("tokenizing", done, total)
        return counts

    def _cuts(self, characters: list[int]) -> list[dict[str, Any]]:
        before = [0, *accumulate(characters)]
        cut = tail_cut(before[-1], self.data.val_fraction)
        return [{"cut": cut - b} for b in before[:-1]]

    def _hashed(self, hashes: list[str]) -> list[dict[str, Any]]:
        share = self.data.val_fraction
        val = [
            is_val(h, share) if s.kind == "text" else None
            for s, h in zip(self.sources, hashes, strict=True)
        ]
        return [
            {"cut": None, "val_fraction": share, "val_spans": [val[n] for n, _, _ in c]}
            for c in self.chunks
        ]

    def _refuse_empty(self, made: Parts) -> None:
        empty = [split for split in SPLITS if not made.tokens(split)]
        if len(empty) == len(SPLITS):
            raise UserError(f"data.corpus: {redact_text(str(self.data.corpus))} holds no text")
        if empty:
            split, other = self.data.split, ", data.split=tail" if self.data.split == "hash" else ""
            raise UserError(
                f"data.split: {split} with data.val_fraction={self.data.val_fraction} leaves {empty[0]} "
                f"without a token; use another fraction{other} or more text"
            )

    def _fingerprint(self, hashes: list[str], tokenizer: Tokenizer) -> str:
        content = [
            settings_of(self.data),
            tokenizer.sha256,
            self.chunks,
            [s.name for s in self.sources],
            hashes,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _spans(self, chunk: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
        picked = [(self.sources[n], start, end) for n, start, end in chunk]
        replace = self.data.invalid_utf8 == "replace"
        return [
            vars(Span(str(s.path), s.name, s.kind, s.size, start, end, replace))
            for s, start, end in picked
        ]

    # ---- shards ----
    def _assemble(self, made: Parts, dtype: np.dtype) -> dict[str, Any]:
        """Write shards and the index of documents; returns the manifest's `splits`."""
        jobs = [
            job
            for split in SPLITS
            for job in made.shards(split, self.directory, self.shard_rows, dtype)
        ]
        shards, done, total = [], 0, sum(job["tokens"] for job in jobs) * dtype.itemsize
        with ThreadPoolExecutor(1) as pool:  # the only sequential work runs beside the writing
            streams = {split: pool.submit(made.stream_sha256, split) for split in SPLITS}
            self.progress("writing", 0, total)
            for shard in _map(parts.assemble, jobs):
                shards.append(shard)
                done += shard["tokens"] * dtype.itemsize
                self.progress("writing", done, total)
            write_index(self.directory, {split: made.documents(split) for split in SPLITS})
            shards.sort(key=lambda shard: shard["name"])
            return {
                split: {
                    **made.totals(split),
                    "stream_sha256": streams[split].result(),
                    "shards": [s for s in shards if s["name"].startswith(f"{split}-")],
                }
                for split in SPLITS
            }


def _stamps(sources: list[Source]) -> list[tuple[int, int]]:
    return [(s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in sources]


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One preparation per folder at a time: a second one waits, and finds the work done. The kernel frees the lock."""
    with open(directory / ".lock", "w", opener=files.opener) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{directory}: another process is preparing it; waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- Ray ----
@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """The Ray that is there: this process's, the one of $RAY_ADDRESS, or a local one for as long as this takes."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    start = ray.init if os.environ.get("RAY_ADDRESS") else local_ray.start
    start(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 0)) or 1  # a cluster that grows may have none yet


def _map(
    function: Callable, items: list[dict], common: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Run `function({**common, **item})` for every item, one task each; results come as they end.

    Items and results travel as JSON: Arrow would guess at their types, row by row.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.print_on_execution_start = False, False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(
        logging.ERROR
    )  # warns that it shows no bars
    rows = [{"item": json.dumps(item)} for item in items]
    run = functools.partial(_run, function, common or {}, os.environ.get("TIKTOKEN_CACHE_DIR"))
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(run).iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise UserError(result["error"])
        yield result


def _run(
    function: Callable, common: dict[str, Any], cache: str | None, row: dict[str, str]
) -> dict[str, str]:
    if cache:
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", cache)
    try:
        result = function({**common, **json.loads(row["item"])})
    except (UserError, PermissionError, FileNotFoundError) as error:
        result = {
            "error": str(error)
        }  # as a value: Ray wraps exceptions, and tries some of them again
    return {"result": json.dumps(result)}
