"""Reads the documents of a corpus, in any number of parts in parallel.

`read_pieces` reads a `Span`, bytes [start, end) of one file, and returns the pieces that begin in
it: the text between two safe cuts, the JSON lines whose first byte is in the span, or the Parquet
row groups whose data begin there. Each piece begins in exactly one span. The pieces of all spans in
order are therefore the corpus, wherever the spans end.

Text is UTF-8. Line ends, byte order marks and NUL stay as they are. Invalid UTF-8 is an error, or
is replaced by U+FFFD as with Python's `errors="replace"`. To read another kind of file, write a
function and one entry of `READERS`.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.input.cuts import character_cut, read_at, safe_cut
from orchestrator.data.input.kinds import (
    LINES,
    PARQUET,
    TEXT,
    check_readable,
    kind_of,
    open_unpacked,
)
from orchestrator.data.input.paths import check_unchanged
from orchestrator.errors import UserError
from orchestrator.hashes import Stamp, stamp


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
        skip_null: Leave out null texts instead of raising an error.
        cut_anywhere: A text may be cut before each character, and not only at safe cuts.
        modified: Time of the file's last write in nanoseconds; None: it is not compared.
        object: As in `CorpusFile`.
    """

    path: str
    name: str
    size: int
    start: int
    end: int
    text_field: str = "text"
    replace: bool = False
    skip_null: bool = False
    cut_anywhere: bool = False
    modified: int | None = None
    object: str = ""


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one.

    Attributes:
        document: `file.txt`, `file.jsonl@<byte>` or `file.parquet#<row>`.
        text: The text.
        size: Bytes of the file that it takes; of Parquet, and of packed files, an average or 0.
        starts: The document begins with this piece.
        ends: The document ends with this piece.
    """

    document: str
    text: str
    size: float
    starts: bool = True
    ends: bool = True


def read_pieces(span: Span, skipped: Callable[[], object] = lambda: None) -> Iterator[Piece]:
    """Return the pieces that begin in a span, in order.

    Args:
        span: The part of a file.
        skipped: Called for each null text that is left out.

    Raises:
        UserError: The text is not UTF-8, a line is not a JSON object, or a field is missing; the
            file cannot be read, or was changed in the meantime.
    """
    try:
        for piece in reader_of(span.path).read(span):
            if piece is None:
                skipped()
            else:
                yield piece
    except (UserError, OSError, EOFError) as error:
        check_unchanged(span.name, span.path, span.size, span.modified)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{span.name}: cannot be read ({error})") from None
    check_unchanged(span.name, span.path, span.size, span.modified)


# ---- kinds of files ----


def _read_text(span: Span) -> Iterator[Piece]:
    with open(span.path, "rb") as file:
        if span.cut_anywhere:
            start = character_cut(file, span.start, span.size)
            end = character_cut(file, span.end, span.size)
        else:
            start = safe_cut(file, span.start, span.size, stop=span.end)
            # Without a cut in the span, its text belongs to the span in which the run begins.
            end = safe_cut(file, span.end, span.size) if start < span.end else start
        data = read_at(file, start, end - start)
    text = _decode(data, span, start)
    yield Piece(span.name, text, len(data), span.start == 0, span.end == span.size)


def _read_json_lines(span: Span) -> Iterator[Piece | None]:
    packing = kind_of(span.path).packing
    if packing and span.start > 0:
        return  # all lines of a packed file belong to its first span
    with open_unpacked(span.path, packing) as file:
        if span.start > 0:
            # A line that begins at `start` belongs to this span, one that began before it does not.
            file.seek(span.start - 1)
            file.readline()
            offset = file.tell()
        else:
            offset = 0
        while packing or offset < span.end:
            line = file.readline()
            if not line and packing:
                break
            if not line:
                raise EOFError("it has become shorter")
            if line.strip():
                text = _text_of_line(line, span, offset)
                size = 0 if packing else len(line)
                yield None if text is None else Piece(f"{span.name}@{offset}", text, size)
            offset += len(line)


def _text_of_line(line: bytes, span: Span, offset: int) -> str | None:
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
    if text is None and span.skip_null:
        return None
    if not isinstance(text, str):
        raise _no_text(f"{where}: field '{field}'", text)
    # JSON allows an unpaired surrogate such as \ud800, UTF-8 does not.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_parquet(span: Span) -> Iterator[Piece | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer, first_bytes, first_rows = _footer(span.path, stamp(span.path))
        with pq.ParquetFile(span.path, metadata=footer) as file:
            columns = file.schema_arrow.names
            if span.text_field not in columns:
                raise UserError(
                    f"{span.name}: has no column '{span.text_field}'; set data.text_field to one "
                    f"of {', '.join(columns)}"
                )
            if columns.count(span.text_field) > 1:
                raise UserError(
                    f"{span.name}: has {columns.count(span.text_field)} columns "
                    f"'{span.text_field}'; rename them, or set data.text_field to another"
                )
            for number, first_byte in enumerate(first_bytes):
                if span.start <= first_byte < span.end:
                    yield from _read_rows(file, number, first_rows[number], span)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{span.name}: cannot be read as Parquet ({error})") from error


@functools.lru_cache(maxsize=8)
def _footer(path: str, _version: Stamp) -> tuple[Any, list[int], list[int]]:
    """Return the footer of a Parquet file, and first byte and first row of each row group.

    A file may have many spans, and tens of thousands of row groups.
    """
    import pyarrow.parquet as pq

    footer = pq.read_metadata(path)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    rows = [0, *itertools.accumulate(group.num_rows for group in groups)]
    return footer, [_first_byte(group) for group in groups], rows


def _first_byte(group: Any) -> int:
    column = group.column(0)
    pages = (column.dictionary_page_offset, column.data_page_offset)
    return min(page for page in pages if page is not None)


def _read_rows(file: Any, group: int, row: int, span: Span) -> Iterator[Piece | None]:
    import pyarrow as pa

    for batch in file.iter_batches(1024, row_groups=[group], columns=[span.text_field]):
        column = batch.column(0)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        # As bytes, invalid UTF-8 can be read. A column may hold text without the mark UTF8.
        if column.type in (pa.string(), pa.string_view(), pa.binary_view()):
            column = column.cast(pa.binary())
        elif column.type == pa.large_string():
            column = column.cast(pa.large_binary())
        for value in column:
            yield _text_of_row(value.as_py(), row, span, span.size / file.metadata.num_rows)
            row += 1


def _text_of_row(value: Any, row: int, span: Span, size: float) -> Piece | None:
    if value is None and span.skip_null:
        return None
    if not isinstance(value, bytes):
        raise _no_text(f"{span.name}: row {row} of column '{span.text_field}'", value)
    try:
        text = value.decode("utf-8", "replace" if span.replace else "strict")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{span.name}: row {row}, byte {error.start} of '{span.text_field}' is not "
            "UTF-8; convert it, or set data.invalid_utf8=replace"
        ) from None
    return Piece(f"{span.name}#{row}", text, size)


def _decode(data: bytes, span: Span, offset: int) -> str:
    try:
        return data.decode("utf-8", "replace" if span.replace else "strict")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{span.name}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; "
            "convert the file, leave it out of data.corpus, or set data.invalid_utf8=replace"
        ) from None


def _no_text(where: str, value: Any) -> UserError:
    change = "set data.text_field to one that has text"
    if value is None:
        change = "data.on_null=skip leaves out such documents"
    return UserError(f"{where} is not text but {_shown(value)}; {change}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@dataclass(frozen=True)
class Reader:
    """How one kind of file is read.

    Attributes:
        read: Returns the pieces that begin in a span; None in place of a null text.
        one_document: The whole file is one document.
    """

    read: Callable[[Span], Iterator[Piece | None]]
    one_document: bool = False


READERS: dict[str, Reader] = {  # by the name of the kind of file
    TEXT: Reader(_read_text, one_document=True),
    LINES: Reader(_read_json_lines),
    PARQUET: Reader(_read_parquet),
}


def reader_of(path: str | Path) -> Reader:
    """Return the reader of a file.

    Raises:
        UserError: Files of this kind are not read.
    """
    kind = check_readable(Path(path))
    return READERS[kind.name]
