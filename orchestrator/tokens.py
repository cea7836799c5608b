"""Documents become a dataset: Parquet token shards, `documents.parquet`, `tokenizer.json` and, last, `manifest.json`.

Eats `config.Data`; yields a `Manifest`. The corpus is cut into chunks by a function of its sizes; Ray Data maps the jobs of
`parts.py` over them; the driver sees only counts, adds them up, and maps the shards, each an exact slice of the stream.
So the same corpus and settings give the same bytes on any number of CPUs and nodes, in bounded memory, and a killed
preparation goes on with the parts that it has. Nothing but this file knows of ray.data.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import corpus, parts
from orchestrator.corpus import Source
from orchestrator.documents import part_rows, write_index
from orchestrator.errors import UserError
from orchestrator.estimate import estimate
from orchestrator.manifest import ROW_TOKENS, Manifest, Shard, Split, load_manifest, write_manifest
from orchestrator.parts import SPLITS, is_val
from orchestrator.prepared import dataset_dir, prepared, settings_of
from orchestrator.progress import ProgressLine
from orchestrator.reading import Span, plan_spans
from orchestrator.shards import SHARD_ROWS
from orchestrator.tokenizer import Tokenizer, char_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from orchestrator.config import Data

__all__ = ["Manifest", "Shard", "Split", "dataset_dir", "estimate", "load_manifest", "prepare"]
PARTS = ".parts"
Progress = Callable[[str, int, int], None]


def prepare(data: "Data", directory: Path, *, progress: Progress | None = None, chunk_bytes: int | None = None,
            shard_rows: int = SHARD_ROWS) -> Manifest:
    """Make the dataset in `directory`, or find that it is already there.

    Args:
        progress: called with (stage, bytes done, bytes in all); None prints a line.
        chunk_bytes: of text per task; the result does not depend on it.
        shard_rows: rows of a shard, W tokens each.

    Raises:
        UserError: the folder holds another dataset, or something is wrong with the corpus or the tokenizer.
    """
    directory = Path(os.path.abspath(directory))
    if done := prepared(data, directory):
        return done
    corpus.resolve(data.corpus)  # a mistake in it should leave no folder behind
    if data.tokenizer != "char":
        load_tokenizer(data.tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        if done := prepared(data, directory):
            return done
        with _ray():
            return _Preparation(data, directory, progress or ProgressLine(), chunk_bytes, shard_rows).run()


@dataclass
class _Preparation:
    data: "Data"
    directory: Path
    progress: Progress
    chunk_bytes: int | None
    shard_rows: int

    def run(self) -> Manifest:
        work = self.directory / PARTS
        work.mkdir(exist_ok=True)
        self.sources = [self._fetch(s, work) for s in corpus.resolve(self.data.corpus)]
        self.stamps = _stamps(self.sources)
        self.chunks = plan_spans([s.size for s in self.sources], self.chunk_bytes or self._default_chunk())
        self.sizes = [sum(end - start for _, start, end in chunk) for chunk in self.chunks]
        hashes = self._hash_sources()
        characters, seen = self._scan()
        tokenizer = char_tokenizer(seen) if self.data.tokenizer == "char" else load_tokenizer(self.data.tokenizer)
        tokenizer.save(self.directory)
        self.parts = work / self._fingerprint(hashes, tokenizer)
        self.parts.mkdir(exist_ok=True)
        counts = self._tokenize(tokenizer, hashes, characters)
        splits = self._assemble(counts, tokenizer.dtype)
        if _stamps(self.sources) != self.stamps:
            raise UserError("data.corpus: a file was changed while it was prepared; run the same command again")
        write_manifest(self.directory, {
            "dtype": tokenizer.dtype.name, "row_tokens": ROW_TOKENS, "settings": settings_of(self.data), "splits": splits,
            "sources": [{"name": s.name, "size": s.size, "sha256": h} for s, h in zip(self.sources, hashes, strict=True)],
            "tokenizer": {k: v for k, v in tokenizer.describe().items() if k != "characters"}})
        shutil.rmtree(work, ignore_errors=True)
        return load_manifest(self.directory)

    # ---- the corpus ----
    def _fetch(self, source: Source, work: Path) -> Source:
        """Downloads are linked into the dataset's folder, which all nodes see; this machine's cache they do not."""
        if source.url is None:
            return source
        fetched = corpus.fetch(source, lambda done: self.progress("downloading", done, done + 1))
        shared = work / fetched.path.name
        shared.unlink(missing_ok=True)
        try:
            os.link(fetched.path, shared)
        except OSError:
            shutil.copyfile(fetched.path, shared)
        return replace(fetched, path=shared)

    def _default_chunk(self) -> int:
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 1)) or 1
        return max(1 << 20, min(32 << 20, sum(s.size for s in self.sources) // (4 * cpus)))

    def _hash_sources(self) -> list[str]:
        groups, size = [[]], 0
        for number, source in enumerate(self.sources):
            if groups[-1] and size + source.size > 64 << 20:
                groups.append([])
                size = 0
            groups[-1].append([number, str(source.path)])
            size += source.size
        found = {}
        for result in _map(parts.hash_sources, [{"sources": group} for group in groups]):
            found.update(dict(result["sha256"]))
            self.progress("hashing", sum(self.sources[n].size for n in found), sum(self.sizes))
        return [found[n] for n in range(len(self.sources))]

    def _scan(self) -> tuple[list[int] | None, str]:
        """Characters of each chunk and which there are; only where the split or the tokenizer needs them."""
        if self.data.split != "tail" and self.data.tokenizer != "char":
            return None, ""
        counts, seen = [0] * len(self.chunks), set()
        for result in self._map_chunks("reading", parts.scan, [{} for _ in self.chunks], {}):
            counts[result["id"]] = result["characters"]
            seen.update(result["seen"])
        return counts, "".join(seen)

    # ---- parts ----
    def _tokenize(self, tokenizer: Tokenizer, hashes: list[str], characters: list[int] | None) -> list[dict[str, Any]]:
        """Counts of every part, in order."""
        common = {"tokenizer": [tokenizer.name, tokenizer.sha256], "directory": str(self.directory), "parts": str(self.parts),
                  "append_eot": self.data.append_eot, "val_fraction": self.data.val_fraction, "cut": None}
        if self.data.append_eot and tokenizer.eot_id is None:
            raise UserError(f"data.append_eot: {tokenizer.name} has no end-of-text token")
        extra = [{"val_spans": [self._span_is_val(n, hashes) for n, _, _ in chunk]} for chunk in self.chunks]
        if self.data.split == "tail":
            before = [0, *accumulate(characters)]
            # As an exact fraction: 1 - 0.9 as a float is less than 0.1.
            cut = int((1 - Fraction(str(self.data.val_fraction))) * before[-1])
            extra = [{"cut": cut - b} for b in before[:-1]]
        counts: list[Any] = [None] * len(self.chunks)
        for result in self._map_chunks("tokenizing", parts.tokenize, extra, common):
            counts[result["id"]] = result
        self._refuse_empty({split: sum(c[split]["tokens"] for c in counts) for split in SPLITS})
        return counts

    def _span_is_val(self, number: int, hashes: list[str]) -> bool | None:
        return is_val(hashes[number], self.data.val_fraction) if self.sources[number].kind == "text" else None

    def _refuse_empty(self, tokens: dict[str, int]) -> None:
        empty = [split for split in SPLITS if not tokens[split]]
        if len(empty) == len(SPLITS):
            raise UserError(f"data.corpus: {self.data.corpus} holds no text")
        if empty:
            raise UserError(f"data.split: {self.data.split} with data.val_fraction={self.data.val_fraction} leaves {empty[0]} without a "
                            f"token; use another fraction" + (", data.split=tail" if self.data.split == "hash" else "") + " or more text")

    def _fingerprint(self, hashes: list[str], tokenizer: Tokenizer) -> str:
        content = [settings_of(self.data), tokenizer.sha256, self.chunks, [s.name for s in self.sources], hashes]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _map_chunks(self, stage: str, function: Callable, extra: list[dict], common: dict) -> Iterator[dict[str, Any]]:
        items = [{"id": i, "spans": [self._span(*s) for s in chunk], **extra[i]} for i, chunk in enumerate(self.chunks)]
        done, total = 0, sum(self.sizes)
        self.progress(stage, 0, total)
        for result in _map(function, items, {"text_field": self.data.text_field, **common}):
            done += self.sizes[result["id"]]
            self.progress(stage, done, total)
            yield result

    def _span(self, number: int, start: int, end: int) -> dict[str, Any]:
        s = self.sources[number]
        return vars(Span(str(s.path), s.name, s.kind, s.size, start, end))

    # ---- shards ----
    def _assemble(self, counts: list[dict[str, Any]], dtype: np.dtype) -> dict[str, Any]:
        """Write shards and the index of documents; returns the manifest's `splits`."""
        firsts = {split: [0, *accumulate(c[split]["tokens"] for c in counts)] for split in SPLITS}
        with ThreadPoolExecutor(1) as pool:  # the only sequential work: it runs beside the writing
            streams = {split: pool.submit(self._stream_sha256, split) for split in SPLITS}
            shards = self._write_shards(firsts, dtype)
            sidecars = [self.parts / f"{i:08d}.json" for i in range(len(counts))]
            write_index(self.directory, {split: part_rows(zip(sidecars, firsts[split], strict=False), split) for split in SPLITS})
            return {split: self._split_entry(split, counts, shards, streams[split]) for split in SPLITS}

    def _write_shards(self, firsts: dict[str, list[int]], dtype: np.dtype) -> list[dict[str, Any]]:
        jobs, per_shard = [], self.shard_rows * ROW_TOKENS
        for split, starts in firsts.items():
            for number, first in enumerate(range(0, starts[-1], per_shard)):
                end = min(first + per_shard, starts[-1])
                jobs.append({"path": str(self.directory / f"{split}-{number:05d}.parquet"), "tokens": end - first,
                             "dtype": dtype.str, "slices": self._slices(split, starts, first, end)})
        done, total = 0, sum(job["tokens"] for job in jobs) * dtype.itemsize
        shards = []
        for shard in _map(parts.assemble, jobs):
            shards.append(shard)
            done += shard["tokens"] * dtype.itemsize
            self.progress("writing", done, total)
        return sorted(shards, key=lambda shard: shard["name"])

    def _slices(self, split: str, starts: list[int], first: int, end: int) -> list[list[Any]]:
        found = []
        for i in range(max(0, bisect_right(starts, first) - 1), len(starts) - 1):
            if starts[i] >= end:
                break
            a, b = max(first, starts[i]), min(end, starts[i + 1])
            if a < b:
                found.append([str(self._part(i, split)), a - starts[i], b - a])
        return found

    def _part(self, i: int, split: str) -> Path:
        return self.parts / f"{i:08d}.{split}.bin"

    def _stream_sha256(self, split: str) -> str:
        digest = hashlib.sha256()
        for i in range(len(self.chunks)):
            with open(self._part(i, split), "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def _split_entry(self, split: str, counts: list[dict], shards: list[dict], stream: "Future[str]") -> dict[str, Any]:
        totals = {key: sum(c[split][key] for c in counts) for key in ("tokens", "bytes", "documents")}
        return {**totals, "stream_sha256": stream.result(), "shards": [s for s in shards if s["name"].startswith(f"{split}-")]}


def _stamps(sources: list[Source]) -> list[tuple[int, int]]:
    return [(s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in sources]


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One preparation per folder at a time; a second one waits, and finds the work done. The kernel frees a dead one's lock."""
    with open(directory / ".lock", "w") as file:
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
    local = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.WARNING, **local)
    try:
        yield
    finally:
        ray.shutdown()


def _map(function: Callable, items: list[dict[str, Any]], common: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Run `function({**common, **item})` for every item, one task each; results come as they end.

    Items and results travel as JSON: Arrow would guess at their types, row by row.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.print_on_execution_start = False, False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = [{"item": json.dumps(item)} for item in items]
    run = functools.partial(_run, function, common or {}, os.environ.get("TIKTOKEN_CACHE_DIR"))
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(run).iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise UserError(result["error"])
        yield result


def _run(function: Callable, common: dict[str, Any], cache: str | None, row: dict[str, str]) -> dict[str, str]:
    if cache:
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", cache)
    try:
        result = function({**common, **json.loads(row["item"])})
    except UserError as error:
        result = {"error": str(error)}  # as a value: Ray wraps exceptions, and tries some of them again
    return {"result": json.dumps(result)}
