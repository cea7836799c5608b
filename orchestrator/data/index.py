"""The index of documents: which document lies at which token of a split.

`documents.parquet` has the columns `split`, `offset` (first token of the document in its split) and
`document`; train before val, offsets rising. A document that the split cuts has a row in both. Each
row group holds rows of one split, so that its statistics find a token quickly.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from orchestrator.data.dataset import INDEX_FILE, load_manifest, verify
from orchestrator.files import replacement

GROUP_ROWS = 65_536

Entry = tuple[int, str]  # first token, document


def write_index(directory: Path, splits: dict[str, Iterable[Entry]]) -> None:
    """Write the entries of each split, in order; one row group is in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("split", pa.string()), ("offset", pa.int64()), ("document", pa.string())])
    with (
        replacement(directory / INDEX_FILE) as temporary,
        pq.ParquetWriter(
            temporary, schema, version="2.6", compression="zstd", store_schema=False
        ) as writer,
    ):
        for split, entries in splits.items():
            for group in _groups(entries):
                offsets, documents = zip(*group, strict=True)
                table = pa.table([[split] * len(group), offsets, documents], schema)
                writer.write_table(table, row_group_size=GROUP_ROWS)


def documents_of(directory: Path, split: str, offset: int, length: int) -> list[tuple[str, int]]:
    """Return the documents that tokens [offset, offset + length) of a split come from.

    Returns:
        (document, its first token in the split), in order. The first one may begin before `offset`.

    Raises:
        UserError: The index is missing or changed.
    """
    file = Path(directory) / INDEX_FILE
    verify(file, load_manifest(directory).files[INDEX_FILE])
    return find_documents(file, split, offset, length)


def find_documents(file: Path, split: str, offset: int, length: int) -> list[tuple[str, int]]:
    """Do the same as `documents_of` in an index that was verified."""
    import numpy as np
    import pyarrow.parquet as pq

    stop = offset + length
    rows = [("split", "=", split), ("offset", "<", stop)]
    offsets = pq.read_table(file, columns=["offset"], filters=rows)["offset"].to_numpy()
    begin = offsets[np.searchsorted(offsets, offset, side="right") - 1]

    # The names are read for the few rows from there on.
    rows.append(("offset", ">=", begin))
    table = pq.read_table(file, columns=["document", "offset"], filters=rows).to_pydict()
    starts = table["offset"]
    ends = [*starts[1:], stop]
    # Of several documents that begin at one token, all but the last are empty.
    return [
        (document, start)
        for document, start, end in zip(table["document"], starts, ends, strict=True)
        if start < end
    ]


def _groups(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    rest = iter(entries)
    while group := list(islice(rest, GROUP_ROWS)):
        yield group
