"""`documents.parquet`: which document lies at which token of a split, so that a window's origin can be told.

Columns `split`, `offset` (the document's first token in its split) and `document`; train before val, offsets rising. A
document that the split cuts has a row in both. Row groups hold one split each, so that their statistics find a token.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from orchestrator.data.dataset import load_manifest
from orchestrator.data.shards import verify
from orchestrator.files import fsync

FILE = "documents.parquet"
GROUP_ROWS = 65_536


def write_index(directory: Path, rows: dict[str, Iterable[tuple[int, str]]]) -> None:
    """Write the index from (offset, document) of each split, in order; one row group is in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("split", pa.string()), ("offset", pa.int64()), ("document", pa.string())])
    temporary = directory / f".{FILE}.{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with pq.ParquetWriter(
            temporary, schema, version="2.6", compression="zstd", store_schema=False
        ) as writer:
            for split, entries in rows.items():
                for group in _groups(iter(entries)):
                    offsets, names = zip(*group, strict=True)
                    table = pa.table([[split] * len(group), offsets, names], schema)
                    writer.write_table(table, row_group_size=GROUP_ROWS)
        fsync(temporary)
        os.replace(temporary, directory / FILE)
    finally:
        temporary.unlink(missing_ok=True)


def documents_of(directory: Path, split: str, offset: int, length: int) -> list[tuple[str, int]]:
    """The documents that tokens [offset, offset + length) of a split come from.

    Returns:
        (document, its first token in the split), in order; the first may begin before `offset`.

    Raises:
        UserError: the index is missing, or not what was written.
    """
    verify(Path(directory) / FILE, load_manifest(directory).files.get(FILE, ""))
    return find(Path(directory) / FILE, split, offset, length)


def find(file: Path, split: str, offset: int, length: int) -> list[tuple[str, int]]:
    """`documents_of` an index that was verified."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as index:
        groups = _groups_at(index, split, offset, offset + length)
        table = index.read_row_groups(groups, columns=["document", "offset"]).to_pydict()
    rows = list(zip(table["document"], table["offset"], strict=True))
    # Of several documents that begin at one token, all but the last are empty.
    stop = offset + length
    ends = [begins for _, begins in rows[1:]] + [stop]
    return [
        row for row, end in zip(rows, ends, strict=True) if row[1] < min(end, stop) and end > offset
    ]


def _groups(entries: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    for entry in entries:
        group.append(entry)
        if len(group) == GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def _groups_at(index, split: str, first: int, end: int) -> list[int]:
    """Row groups with documents that may overlap [first, end): from the last that begins at or before `first`."""
    found: list[int] = []
    for g in range(index.num_row_groups):
        group = index.metadata.row_group(g)
        begins = group.column(1).statistics.min
        if group.column(0).statistics.min != split or begins >= end:
            continue
        # A group that begins exactly at `first` may only hold the end of a run of empty documents: keep the one before.
        found = [*([] if begins < first else found), g]
    return found
