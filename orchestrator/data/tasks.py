"""The work of a preparation, as tasks that run on any node and in any order.

Each task is a function of files and of arguments that can be stored as JSON. `ray_tasks.py` runs
them; this module does not import Ray. The last task is `parts.write_slices`.
"""

import functools
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.data.corpus import CorpusFile
from orchestrator.data.dataset import SourceFile
from orchestrator.data.documents import Span, read_pieces
from orchestrator.data.input import objects
from orchestrator.data.input.cuts import safe_pieces
from orchestrator.data.parts import SPLITS, ChunkFacts, Part, find_complete, no_part, sidecar_file
from orchestrator.data.split import is_val, split_pieces
from orchestrator.data.tokenizer import kind_of, load_tokenizer
from orchestrator.data.tokenizers import encoder, merges
from orchestrator.data.tokenizers.base import Tokenizer
from orchestrator.errors import UserError
from orchestrator.files import file_sha256, write_atomically
from orchestrator.hashes import sha256s
from orchestrator.paths import cache_folder
from orchestrator.redact import redact_text

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

Job = dict[str, Any]  # the arguments of one task, which gets a dataclass as a dict
SpanJson = dict[str, Any]  # the fields of `Span`
PIECE = 1 << 20  # characters that are encoded in one call, which no signal ends
interrupted = threading.Event()  # the tasks in threads of this process shall end
_ALL = 1 << 62  # more characters than a chunk has


def plan_chunks(sources: list[CorpusFile], chunk_bytes: int, data: "Data") -> list[list[Span]]:
    """Lay the files end to end and cut them every `chunk_bytes` bytes.

    Returns:
        The spans of each chunk. An empty file has one empty span.
    """
    make = functools.partial(
        Span,
        text_field=data.text_field,
        replace=data.invalid_utf8 == "replace",
        skip_null=data.on_null == "skip",
        cut_anywhere=kind_of(data.tokenizer).counts is not None,
    )
    chunks: list[list[Span]] = [[]]
    room = chunk_bytes
    for source in sources:
        path = str(source.path)
        size = source.bytes
        start = 0
        while True:
            if room == 0:
                chunks.append([])
                room = chunk_bytes
            end = min(size, start + room)
            span = make(path, source.name, size, start, end)
            chunks[-1].append(replace(span, modified=source.modified, object=source.object))
            room -= end - start
            start = end
            if start == size:
                break
    return chunks


def _here(spans: list[SpanJson]) -> list[Span]:
    """Return spans whose files are on this machine."""
    found = [Span(**span) for span in spans]
    objects.fetch({Path(span.path): span.object for span in found if span.object})
    return found


# ---- hash ----


def hash_files(paths: list[str]) -> list[str]:
    """Return the SHA-256 of files."""
    return [file_sha256(path) for path in paths]


def source_files(sources: list[CorpusFile]) -> list[SourceFile]:
    """Return the files of the corpus with their hashes.

    Raises:
        UserError: The cached copy of a download was changed, or a file since it was hashed.
    """
    hashes = sha256s([str(source.path) for source in sources])
    found: list[SourceFile] = []
    for source, sha256 in zip(sources, hashes, strict=True):
        if source.sha256 not in (None, sha256):
            if source.url is None:
                raise UserError(f"{source.path}: was changed just now; run the same command again")
            raise UserError(
                f"{redact_text(source.url)}: its copy in {cache_folder()} has another SHA-256; "
                "delete it"
            )
        found.append({"name": source.name, "size": source.bytes, "sha256": sha256})
        if source.by_content:
            found[-1]["by_content"] = True
    return found


# ---- survey ----


def survey(spans: list[SpanJson]) -> tuple[int, str]:
    """Return the number of characters of a chunk, and which occur."""
    characters, seen = count(_here(spans))
    return characters, "".join(sorted(seen))


def count(spans: Iterable[Span]) -> tuple[int, set[str]]:
    """Return the number of characters, and which characters occur."""
    characters = 0
    seen: set[str] = set()
    for span in spans:
        for piece in read_pieces(span):
            characters += len(piece.text)
            seen.update(piece.text)
    return characters, seen


def count_words(
    spans: list[SpanJson],
    train_characters: int | None,
    val_files: list[str],
    *,
    before: int,
    total: int,
    val_fraction: float,
) -> dict[str, int]:
    """Return how often each word occurs in the sample of a chunk's train.

    Args:
        spans: Spans of the chunk.
        train_characters: As in `tokenize`.
        val_files: As in `tokenize`.
        before: Characters of the corpus before the chunk.
        total: Characters that are sampled, see `merges.windows`.
        val_fraction: As in `tokenize`.
    """

    def texts() -> Iterator[str]:
        first = before
        pieces = split_pieces(_here(spans), train_characters, set(val_files), val_fraction, [])
        for split, piece, _ in pieces:
            if split == "train":
                for window in merges.windows(first, len(piece.text), total):
                    yield piece.text[window]
            first += len(piece.text)

    return merges.count_words(texts())


# ---- tokenize ----


def tokenize_jobs(chunks: list[list[Span]], hashes: dict[str, str], data: "Data") -> list[Job]:
    """Return the arguments of `tokenize` that differ between the chunks.

    Where `split: tail` cuts is known when all characters are counted. Until then all is train.

    Args:
        chunks: The spans of each chunk.
        hashes: SHA-256 of each file, by path.
        data: The `data` section.
    """
    val_files = {path for path, sha256 in hashes.items() if is_val(sha256, data.val_fraction)}
    return [
        {
            "chunk": i,
            "spans": spans,
            "train_characters": _ALL if data.split == "tail" else None,
            "val_files": [span.path for span in spans if span.path in val_files],
        }
        for i, spans in enumerate(chunks)
    ]


def cut_tail(jobs: list[Job], facts: list[ChunkFacts], cut: int) -> dict[int, Job]:
    """Change train to val in the results of all chunks after the first `cut` characters.

    Args:
        jobs: The jobs of all chunks.
        facts: Their results, which are changed.
        cut: See `tail_cut`.

    Returns:
        Jobs that tokenize the chunks at the cut again, by the number of the chunk.
    """
    again = {}
    before = 0
    for i, job in enumerate(jobs):
        after = before + facts[i]["train"]["characters"]
        if before > cut:
            facts[i] = {"train": no_part(), "val": facts[i]["train"]}
        elif after >= cut:
            again[i] = job | {"chunk": len(jobs) + i, "train_characters": cut - before}
        before = after
    return again


def tokenize(
    chunk: int,
    spans: list[SpanJson],
    train_characters: int | None,
    val_files: list[str],
    *,
    val_fraction: float,
    tokenizer: tuple[str, str],
    fast: bool,
    append_eot: bool,
    dataset: str,
    folder: str,
) -> ChunkFacts:
    """Write the part files of a chunk, unless they are complete.

    Args:
        chunk: Number of the chunk.
        spans: Spans of the chunk.
        train_characters: Number of characters of the chunk that are train, if `split` is `tail`.
            None: the hash of each document decides.
        val_files: Files that are val if they are one document; their hashes are known already.
        val_fraction: Share of all other documents that are val.
        tokenizer: Name and SHA-256.
        fast: Use gigatoken.
        append_eot: End each document with the end-of-text id.
        dataset: Folder of the dataset, which has the tokenizer.
        folder: Folder of the part files.

    Returns:
        The sidecar of the chunk.
    """
    parts = Path(folder)
    facts = find_complete(parts, chunk)
    if facts is not None:
        return facts
    loaded = _tokenizer(*tokenizer, dataset, fast)
    chunk_spans = _here(spans)
    nulls: list[Span] = []
    pieces = split_pieces(chunk_spans, train_characters, set(val_files), val_fraction, nulls)
    with ExitStack() as files:
        made = {split: Part(files, parts, chunk, split) for split in SPLITS}
        for split, piece, begins in pieces:
            part = made[split]
            if begins:
                part.begin(piece.document)
            for text in safe_pieces(piece.text, PIECE):
                if interrupted.is_set():
                    raise InterruptedError
                try:
                    part.add(loaded.encode(text), text)
                except UserError as error:
                    raise UserError(f"{piece.document}: {error}") from None
            if append_eot and piece.ends:
                part.add(np.array([loaded.eot_id], loaded.dtype))
    facts = {split: part.finish() for split, part in made.items()}
    facts["train"]["nulls"] = len(nulls)
    write_atomically(sidecar_file(parts, chunk), json.dumps(facts))
    return facts


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str, _sha256: str, dataset: str, fast: bool) -> Tokenizer:
    """Load a tokenizer once per process, and compare gigatoken with it on this machine.

    The SHA-256 is in the key of the cache: a process may prepare another corpus in the same folder,
    which has other characters.
    """
    exact = load_tokenizer(name, Path(dataset))
    return (encoder.fast_tokenizer(exact) if fast else None) or exact


def forget_tokenizers() -> None:
    """Free the memory of the tokenizers of this process."""
    _tokenizer.cache_clear()
    encoder.forget()
