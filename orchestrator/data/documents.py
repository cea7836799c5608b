"""Reads the documents of a corpus, in any number of parts in parallel.

`read_pieces` reads a `Span`, bytes [start, end) of one file, and returns the pieces that begin in
it: the text between two safe cuts, the JSON lines whose first byte is in the span, or the Parquet
row groups whose data begin there. Each piece begins in exactly one span. The pieces of all spans in
order are therefore the corpus, wherever the spans end.

Text is UTF-8. Line ends, byte order marks and NUL stay as they are. Invalid UTF-8 is an error, or
is replaced by U+FFFD as with Python's `errors="replace"`.

To read another kind of file, write a function and one entry of `READERS`.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import UserError


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file.

    Attributes:
        path: The file.
        name: Its name in the corpus.
        size: Its size in bytes.
        start: First byte.
        end: Byte after the last one.
        text_field: Field of JSON lines or column of Parquet that holds the text.
        replace: Replace invalid UTF-8 by U+FFFD instead of raising an error.
    """

    path: str
    name: str
    size: int
    start: int
    end: int
    text_field: str = "text"
    replace: bool = False


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one.

    Attributes:
        document: `file.txt`, `file.jsonl@<byte>` or `file.parquet#<row>`.
        text: The text.
        starts: The document begins with this piece.
        ends: The document ends with this piece.
    """

    document: str
    text: str
    starts: bool = True
    ends: bool = True


def read_pieces(span: Span) -> Iterator[Piece]:
    """Return the pieces that begin in a span, in order.

    Raises:
        UserError: The text is not UTF-8, a line is not a JSON object, or a field is missing.
    """
    return reader_of(span.name).read(span)


# ---- where a text may be cut ----
#
# The pieces of a text, tokenized one by one, must give the tokens of the whole text. A byte-pair
# encoding never merges across two matches of its pattern, so a cut is safe where every pattern ends
# a match: after any non-space before a space or tab, and after a letter or digit before a line end
# or a listed mark. This holds for the patterns of gpt2 (r50k, p50k), cl100k and o200k:
# - No pattern has a lookbehind, so the text after a cut is matched as in the whole text.
# - No match continues from a non-space to a space or tab, or from a letter or digit to a line end
#   or a listed mark.
# - The patterns have a lookahead only after whitespace, and a cut comes after a non-space.
#
# These cuts look safe but are not: after a line end (punctuation is matched together with it),
# before an apostrophe or a combining mark (o200k matches both as parts of a word), and between
# letters and other non-letters (Ⅷ, ²).

# Python's \s also matches \x1c-\x1f, the \s of the patterns does not. No cut is made after these
# characters (\S, on the left) or before them (they are excluded on the right).
SAFE = re.compile(
    r"""(?<=\S)(?=[^\S\r\n\x1c-\x1f])|(?<=[^\W_])(?=[\r\n])"""
    r"""|(?<=[^\W_])(?=[.,;:!?()\[\]{}"=+*…。、，．！？；：])"""
)
PROBE = 4096  # bytes that are searched first; two cuts are 5 to 8 characters apart on average


def safe_cut(file: BinaryIO, position: int, size: int) -> int:
    """Return the first safe cut at or after byte `position`; `size` if there is none.

    The result depends only on the text around it, and grows with `position`. Invalid UTF-8 may be
    cut anywhere; decoding the pieces reports it.

    Args:
        file: A text file, opened for reading bytes.
        position: Byte at which the search starts.
        size: Size of the file.
    """
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    first = max(0, position - 4)  # the longest character has 4 bytes
    probe = PROBE
    while True:
        file.seek(first)
        data = file.read(position - first + probe)
        cut = _first_cut(data, position - first)
        if cut is not None:
            return first + cut
        if first + len(data) >= size:
            return size
        probe *= 4


def _first_cut(data: bytes, start: int) -> int | None:
    while start < len(data) and data[start] & 0xC0 == 0x80:  # inside of a character
        start += 1
    # surrogateescape decodes each invalid byte as one character, also the bytes of incomplete
    # characters at both ends. Offsets therefore stay right.
    before = data[:start].decode("utf-8", "surrogateescape")
    text = data[start:].decode("utf-8", "surrogateescape")
    match = SAFE.search(before + text, len(before))
    if match is None:
        return None
    skipped = text[: match.start() - len(before)]
    return start + len(skipped.encode("utf-8", "surrogateescape"))


# ---- kinds of files ----


def _read_text(span: Span) -> Iterator[Piece]:
    with open(span.path, "rb") as file:
        start = safe_cut(file, span.start, span.size)
        end = safe_cut(file, span.end, span.size)
        file.seek(start)
        data = file.read(end - start)
    text = _decode(data, span, start)
    yield Piece(span.name, text, span.start == 0, span.end == span.size)


def _read_json_lines(span: Span) -> Iterator[Piece]:
    with open(span.path, "rb") as file:
        if span.start > 0:
            # A line that begins at `start` belongs to this span, one that began before it does not.
            file.seek(span.start - 1)
            file.readline()
        offset = file.tell()
        while offset < span.end:
            line = file.readline()
            if not line:  # the file has become shorter in the meantime
                break
            if line.strip():
                yield Piece(f"{span.name}@{offset}", _text_of_line(line, span, offset))
            offset += len(line)


def _text_of_line(line: bytes, span: Span, offset: int) -> str:
    where = f"{span.name}: the line at byte {offset}"
    field = span.text_field
    decoded = _decode(line, span, offset)
    try:
        record = json.loads(decoded.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object but {_shown(record)}")
    if field not in record:
        names = ", ".join(record) or "none: it is empty"
        raise UserError(f"{where} has no field '{field}'; set data.text_field to one of {names}")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field '{field}' is not text but {_shown(text)}")
    # JSON allows an unpaired surrogate such as \ud800, UTF-8 does not.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_parquet(span: Span) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(span.path) as file:
            columns = file.schema_arrow.names
            if span.text_field not in columns:
                raise UserError(
                    f"{span.name}: has no column '{span.text_field}'; set data.text_field to one "
                    f"of {', '.join(columns)}"
                )
            row = 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if span.start <= _first_byte(group) < span.end:
                    yield from _read_rows(file, number, row, span)
                row += group.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{span.name}: cannot be read as Parquet ({error})") from error


def _first_byte(group: Any) -> int:
    column = group.column(0)
    pages = (column.dictionary_page_offset, column.data_page_offset)
    return min(page for page in pages if page is not None)


def _read_rows(file: Any, group: int, row: int, span: Span) -> Iterator[Piece]:
    for batch in file.iter_batches(1024, row_groups=[group], columns=[span.text_field]):
        for value in batch.column(0):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                if not span.replace:
                    raise UserError(
                        f"{span.name}: row {row}, byte {error.start} of '{span.text_field}' is not "
                        "UTF-8; convert it, or set data.invalid_utf8=replace"
                    ) from None
                text = value.as_buffer().to_pybytes().decode("utf-8", "replace")
            if not isinstance(text, str):
                raise UserError(
                    f"{span.name}: row {row} has no text in '{span.text_field}' but {_shown(text)}"
                )
            yield Piece(f"{span.name}#{row}", text)
            row += 1


def _decode(data: bytes, span: Span, offset: int) -> str:
    try:
        return data.decode("utf-8", "replace" if span.replace else "strict")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{span.name}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; "
            "convert the file, leave it out of data.corpus, or set data.invalid_utf8=replace"
        ) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@dataclass(frozen=True)
class Reader:
    """How one kind of file is read.

    Attributes:
        read: Returns the pieces that begin in a span.
        suffixes: Suffixes of such files, in lower case.
        one_document: The whole file is one document.
    """

    read: Callable[[Span], Iterator[Piece]]
    suffixes: tuple[str, ...] = ()
    one_document: bool = False


READERS: dict[str, Reader] = {
    "text": Reader(_read_text, one_document=True),  # also files with an unknown suffix
    "jsonl": Reader(_read_json_lines, (".jsonl", ".ndjson")),
    "parquet": Reader(_read_parquet, (".parquet",)),
}


def reader_of(name: str) -> Reader:
    """Return the reader for the suffix of a file name."""
    suffix = Path(name).suffix.lower()
    for reader in READERS.values():
        if suffix in reader.suffixes:
            return reader
    return READERS["text"]
