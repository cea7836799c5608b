"""The layout of a token shard: ordinary Parquet whose payload can be memory-mapped.

The one column `tokens` is fixed_size_binary[W tokens], W = 1,024, of little-endian uint16 (uint32
for vocabularies above 65,536). It is non-null, PLAIN, uncompressed, without statistics, and has one
data page per row group. The payload of a column chunk is therefore its last `rows · row_bytes`
bytes. The rows are one continuous stream; only the last row of a split is padded.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.data.dataset import ROW_TOKENS
from orchestrator.errors import UserError

ROW_GROUP_ROWS = 32768  # 64 MiB of uint16
SHARD_ROWS = 131072  # 256 MiB of uint16
MAX_PAGE_HEADER = 40  # bytes; pyarrow writes 22 to 34 for one page, and more than 40 for two


def write_shard(path: Path, dtype: np.dtype, row_groups: Iterable[np.ndarray]) -> int:
    """Write row groups, each a flat array of whole rows. Return the number of rows."""
    row_bytes = ROW_TOKENS * dtype.itemsize
    row_type = pa.binary(row_bytes)
    schema = pa.schema([pa.field("tokens", row_type, nullable=False)])
    rows = 0
    with pq.ParquetWriter(
        path,
        schema,
        version="2.6",
        store_schema=False,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        data_page_version="1.0",
        column_encoding={"tokens": "PLAIN"},
        data_page_size=row_bytes * ROW_GROUP_ROWS + 1,
        # The default of 20,000 rows would cut a row group into several pages.
        max_rows_per_page=ROW_GROUP_ROWS,
    ) as writer:
        for tokens in row_groups:
            count = len(tokens) // ROW_TOKENS
            assert len(tokens) == count * ROW_TOKENS
            assert 0 < count <= ROW_GROUP_ROWS
            payload = np.ascontiguousarray(tokens, dtype.newbyteorder("<"))
            column = pa.Array.from_buffers(row_type, count, [None, pa.py_buffer(payload)])
            writer.write_table(pa.table([column], schema), row_group_size=ROW_GROUP_ROWS)
            rows += count
    return rows


def map_shard(path: Path) -> list[np.ndarray]:
    """Return the tokens of each row group, (rows · 1,024,), memory-mapped.

    The caller has compared the file with its SHA-256. The metadata is checked as well, because
    another version of pyarrow may write another layout.

    Raises:
        UserError: The layout differs from that of `write_shard`.
    """
    metadata = pq.read_metadata(path)
    row_bytes = metadata.schema.column(0).length
    dtype = np.dtype("<u2" if row_bytes == 2 * ROW_TOKENS else "<u4")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    row_groups = []
    for i in range(metadata.num_row_groups):
        chunk = metadata.row_group(i).column(0)
        payload = metadata.row_group(i).num_rows * row_bytes
        header = chunk.total_compressed_size - payload
        if (
            chunk.compression != "UNCOMPRESSED"
            or chunk.has_dictionary_page
            or not 0 < header <= MAX_PAGE_HEADER
        ):
            raise UserError(
                f"{path}: row group {i} is not one plain, uncompressed page; prepare the tokens "
                "again"
            )
        # A plain ndarray over the mapping, because slicing an np.memmap takes twice as long.
        start = chunk.data_page_offset + header
        row_groups.append(np.frombuffer(raw, dtype, payload // dtype.itemsize, start))
    return row_groups
