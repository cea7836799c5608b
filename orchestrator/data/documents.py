"""From a stretch of a source to pieces of documents, so that a corpus can be read in any number of parts at once.

Eats a `Span`, bytes [start, end) of one source; yields the pieces that *begin* in it: the text between two safe cuts,
the JSON lines whose first byte, the Parquet row groups whose data lie there. Every piece belongs to exactly one span,
so the pieces of all spans in order are the corpus, wherever spans end. Text is UTF-8 and its newlines, a byte order mark
and NUL are left alone; what is not UTF-8 stops, or becomes U+FFFD, one for each longest sequence that begins a character
and does not end it, else for each byte (Unicode's recommendation, and Python's `replace`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.data.cuts import safe_cut
from orchestrator.errors import UserError


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a source (see `corpus.Source`) of `size` bytes. replace: what is not UTF-8, by U+FFFD."""

    path: str
    name: str
    kind: str
    size: int
    start: int
    end: int
    replace: bool = False


@dataclass(frozen=True)
class Piece:
    """document: `file.txt`, `file.jsonl@<byte>` or `file.parquet#<row>`. offset: byte of the document at which the
    piece begins. starts, ends: whether the document does so with this piece."""

    document: str
    text: str
    offset: int = 0
    starts: bool = True
    ends: bool = True


def plan_spans(sizes: list[int], chunk_bytes: int) -> list[list[tuple[int, int, int]]]:
    """Cut sources, laid end to end, every `chunk_bytes` bytes.

    Returns:
        Chunks of (source number, start, end); an empty source has one empty span.
    """
    chunks: list[list[tuple[int, int, int]]] = [[]]
    room = chunk_bytes
    for number, size in enumerate(sizes):
        start = 0
        while start < size or size == 0:
            if room == 0:
                chunks.append([])
                room = chunk_bytes
            end = min(size, start + room)
            chunks[-1].append((number, start, end))
            room -= end - start
            start = end
            if size == 0:
                break
    return chunks


def pieces(span: Span, text_field: str) -> Iterator[Piece]:
    """The pieces that begin in a span, in order.

    Raises:
        UserError: invalid UTF-8 (file and byte), a line that is no JSON object, a missing field.
    """
    yield from {"text": _text, "jsonl": _json_lines, "parquet": _parquet}[span.kind](
        span, text_field
    )


def _text(span: Span, _field: str) -> Iterator[Piece]:
    with open(span.path, "rb") as file:

        def read(offset: int, n: int) -> bytes:
            file.seek(offset)
            return file.read(n)

        start, end = (safe_cut(read, position, span.size) for position in (span.start, span.end))
        text = _decode(read(start, end - start), span, start)
    yield Piece(span.name, text, start, span.start == 0, span.end == span.size)


def _json_lines(span: Span, field: str) -> Iterator[Piece]:
    with open(span.path, "rb") as file:
        if span.start:
            file.seek(span.start - 1)
            file.readline()
        while (at := file.tell()) < span.end:
            line = file.readline()
            if line.strip():
                yield Piece(f"{span.name}@{at}", _field_of_line(line, field, span, at))


def _parquet(span: Span, field: str) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(span.path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(
                    f"{span.name}: has no column '{field}'; set data.text_field to one of "
                    f"{', '.join(file.schema_arrow.names)}"
                )
            row = 0
            for g in range(file.num_row_groups):
                group = file.metadata.row_group(g)
                if span.start <= _position(group) < span.end:
                    yield from _rows(file, g, row, span, field)
                row += group.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{span.name}: cannot be read as Parquet ({error})") from error


def _position(group) -> int:
    """The byte at which a row group's first page lies."""
    column = group.column(0)
    dictionary = column.dictionary_page_offset
    return (
        column.data_page_offset if dictionary is None else min(dictionary, column.data_page_offset)
    )


def _rows(file, group: int, row: int, span: Span, field: str) -> Iterator[Piece]:
    for batch in file.iter_batches(1024, row_groups=[group], columns=[field]):
        for value in batch.column(0):
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                if not span.replace:
                    raise UserError(
                        f"{span.name}: row {row}, byte {error.start} of '{field}' is not UTF-8; convert it, or "
                        f"set data.invalid_utf8=replace"
                    ) from None
                text = value.as_buffer().to_pybytes().decode("utf-8", "replace")
            if not isinstance(text, str):
                raise UserError(
                    f"{span.name}: row {row} holds no text in '{field}' but {_shown(text)}"
                )
            yield Piece(f"{span.name}#{row}", text)
            row += 1


def _field_of_line(line: bytes, field: str, span: Span, at: int) -> str:
    name, text = span.name, _decode(line, span, at).removeprefix("\ufeff")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: the line at byte {at} is no JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{name}: the line at byte {at} is no JSON object but {_shown(record)}")
    if field not in record:
        raise UserError(
            f"{name}: the line at byte {at} has no field '{field}'; set data.text_field to one of "
            f"{', '.join(record) or 'none: it is empty'}"
        )
    if not isinstance(record[field], str):
        raise UserError(
            f"{name}: field '{field}' of the line at byte {at} is no text but {_shown(record[field])}"
        )
    # An escape such as \ud800 alone is half a character; JSON lets it in, UTF-8 does not.
    return record[field].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decode(data: bytes, span: Span, at: int) -> str:
    try:
        return data.decode("utf-8", "replace" if span.replace else "strict")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{span.name}: byte {at + error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file, "
            f"leave it out of data.corpus, or set data.invalid_utf8=replace"
        ) from None


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
