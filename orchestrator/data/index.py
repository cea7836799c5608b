"""The index of documents: which document each token of a split comes from.

`documents.parquet` has the columns `split`, `offset` (first token of the document in its split) and
`document`. The rows of train come first, and offsets rise within a split. A document that the split
cuts has a row in both. Each row group holds rows of one split, so that a search reads few groups.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.data.dataset import INDEX_FILE, load_manifest, verify
from orchestrator.files import replacement

GROUP_ROWS = 65_536

Entry = tuple[int, str]  # first token, document


def write_index(directory: Path, splits: dict[str, Iterable[Entry]]) -> None:
    """Write the entries of each split, in order; one row group is in memory at a time."""
    import numpy as np
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
                first = pa.py_buffer(np.array(offsets, np.int64))
                columns = [
                    _texts([split] * len(group)),
                    pa.Int64Array.from_buffers(pa.int64(), len(group), [None, first]),
                    _texts(documents),
                ]
                table = pa.table(columns, schema)
                writer.write_table(table, row_group_size=GROUP_ROWS)


def _texts(texts: Sequence[str]) -> Any:
    """Return texts as an array of Arrow. `pa.array` would import pandas: half a second."""
    import numpy as np
    import pyarrow as pa

    data = [text.encode() for text in texts]
    ends = pa.py_buffer(np.cumsum([0, *map(len, data)], dtype=np.int32))
    return pa.StringArray.from_buffers(len(data), ends, pa.py_buffer(b"".join(data)))


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
    """Do the same as `documents_of` with an index file that was verified before."""
    import numpy as np
    import pyarrow.parquet as pq

    stop = offset + length
    filters = [("split", "=", split), ("offset", "<", stop)]
    offsets = pq.read_table(file, columns=["offset"], filters=filters)["offset"].to_numpy()
    begin = offsets[np.searchsorted(offsets, offset, side="right") - 1]

    # Read the names only of the few documents from `begin` on.
    filters.append(("offset", ">=", begin))
    table = pq.read_table(file, columns=["document", "offset"], filters=filters).to_pydict()
    starts = table["offset"]
    ends = [*starts[1:], stop]
    # If several documents begin at one token, all but the last one are empty.
    return [
        (document, start)
        for document, start, end in zip(table["document"], starts, ends, strict=True)
        if start < end
    ]


def _groups(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    rest = iter(entries)
    while group := list(islice(rest, GROUP_ROWS)):
        yield group
