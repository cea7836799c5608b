"""The work of a preparation, as tasks that run on any node and in any order.

Each task is a function of files and of arguments that can be stored as JSON. `ray_tasks.py` runs
them; this module does not import Ray. The last task is `parts.write_slices`.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.data import encoder
from orchestrator.data.corpus import CorpusFile
from orchestrator.data.dataset import SourceFile
from orchestrator.data.documents import Piece, Span, read_pieces, reader_of
from orchestrator.data.parts import SPLITS, ChunkFacts, Part, find_complete, no_part, sidecar_file
from orchestrator.data.tokenizer import Tokenizer, kind_of, load_tokenizer
from orchestrator.errors import UserError
from orchestrator.files import file_sha256, write_atomically
from orchestrator.hashes import sha256s
from orchestrator.paths import cache_folder
from orchestrator.redact import redact_text

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

Job = dict[str, Any]  # the arguments of one task, which gets a dataclass as a dict
SpanJson = dict[str, Any]  # the fields of `Span`
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
            chunks[-1].append(make(path, source.name, size, start, end, modified=source.modified))
            room -= end - start
            start = end
            if start == size:
                break
    return chunks


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


def survey(spans: list[SpanJson]) -> str:
    """Return the characters that occur in a chunk."""
    return "".join(sorted(count(Span(**span) for span in spans)[1]))


def count(spans: Iterable[Span]) -> tuple[int, set[str]]:
    """Return the number of characters, and which characters occur."""
    characters = 0
    seen: set[str] = set()
    for span in spans:
        for piece in read_pieces(span):
            characters += len(piece.text)
            seen.update(piece.text)
    return characters, seen


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
    """Make val of the chunks after the first `cut` characters, which are train.

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
    chunk_spans = [Span(**span) for span in spans]
    nulls: list[Span] = []
    pieces = _split_pieces(chunk_spans, train_characters, set(val_files), val_fraction, nulls)
    with ExitStack() as files:
        made = {split: Part(files, parts, chunk, split) for split in SPLITS}
        for split, piece, begins in pieces:
            part = made[split]
            if begins:
                part.begin(piece.document)
            try:
                part.add(loaded.encode(piece.text), piece.text)
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


# ---- which split a piece belongs to ----


def tail_cut(characters: int, val_fraction: float) -> int:
    """Return the number of characters that are train if `split` is `tail`.

    It is computed as an exact fraction: as a float, 1 − 0.9 is less than 0.1.
    """
    return int((1 - Fraction(str(val_fraction))) * characters)


def is_val(content_sha256: str, val_fraction: float) -> bool:
    """Return whether a document is val if `split` is `hash`.

    Only its content decides, so adding other documents never moves it to the other split.
    """
    return int(content_sha256[:16], 16) < val_fraction * 2**64


def _split_pieces(
    spans: list[Span],
    train_characters: int | None,
    val_files: set[str],
    val_fraction: float,
    nulls: list[Span],
) -> Iterator[tuple[str, Piece, bool]]:
    """Yield (split, piece, begins): whether a document, or its val part, begins with the piece.

    The span of each null text that is left out is appended to `nulls`.
    """
    for span in spans:
        one_document = train_characters is None and reader_of(span.path).one_document
        for piece in read_pieces(span, functools.partial(nulls.append, span)):
            if train_characters is not None:
                yield from _cut(piece, train_characters)
                train_characters -= len(piece.text)
                continue
            if one_document:
                val = span.path in val_files
            else:
                val = is_val(hashlib.sha256(piece.text.encode()).hexdigest(), val_fraction)
            yield "val" if val else "train", piece, piece.starts


def _cut(piece: Piece, cut: int) -> Iterator[tuple[str, Piece, bool]]:
    """Cut a piece after `cut` characters, which are train. Yields as `_split_pieces`."""
    text = piece.text
    if not text and not piece.starts:
        # The empty rest of a document, after which its end-of-text id follows. It belongs to the
        # split of the last character. A document that ends exactly at the cut: its end-of-text id
        # is train.
        yield "val" if cut < 0 else "train", piece, False
    elif cut <= 0:
        yield "val", piece, piece.starts or cut == 0
    elif cut >= len(text):
        yield "train", piece, piece.starts
    else:
        yield "train", replace(piece, text=text[:cut], ends=False), piece.starts
        yield "val", replace(piece, text=text[cut:], starts=False), True
