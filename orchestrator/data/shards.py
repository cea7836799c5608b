"""The layout of a token shard: an ordinary Parquet file whose payload a trainer can memory-map.

One column `tokens` of fixed_size_binary[W tokens], W = 1,024, little-endian uint16 (uint32 for vocabularies above
65,536), non-null, PLAIN, uncompressed, without statistics, one data page per row group: so the payload of a column
chunk is its last `rows · row_bytes` bytes, and rows are one continuous stream of which only the last one is padded.
"""

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.data.dataset import ROW_TOKENS
from orchestrator.errors import UserError
from orchestrator.files import file_sha256

ROW_GROUP_ROWS = 32768  # 64 MiB of uint16
SHARD_ROWS = 131072  # 256 MiB of uint16


def write_shard(path: Path, dtype: np.dtype, row_groups: Iterable[np.ndarray]) -> int:
    """Write row groups of whole rows, each a flat array of n · 1,024 tokens; returns the number of rows."""
    width, rows = ROW_TOKENS * np.dtype(dtype).itemsize, 0
    schema = pa.schema([pa.field("tokens", pa.binary(width), nullable=False)])
    # max_rows_per_page: pyarrow's default of 20,000 would cut a row group into several pages without a word.
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
        data_page_size=width * ROW_GROUP_ROWS + 1,
        max_rows_per_page=ROW_GROUP_ROWS,
    ) as writer:
        for tokens in row_groups:
            count = len(tokens) // ROW_TOKENS
            assert len(tokens) == count * ROW_TOKENS
            assert 0 < count <= ROW_GROUP_ROWS
            payload = np.ascontiguousarray(tokens, dtype=np.dtype(dtype).newbyteorder("<")).view(
                np.uint8
            )
            column = pa.Array.from_buffers(pa.binary(width), count, [None, pa.py_buffer(payload)])
            writer.write_table(
                pa.Table.from_arrays([column], schema=schema), row_group_size=ROW_GROUP_ROWS
            )
            rows += count
    return rows


def map_shard(path: Path) -> list[np.ndarray]:
    """The token payload of each row group, (rows · 1,024,), memory-mapped.

    Raises:
        UserError: the file is not laid out as `write_shard` does; nothing is guessed.
    """
    try:
        metadata = pq.read_metadata(path)
        width = metadata.schema.to_arrow_schema().field("tokens").type.byte_width
    except (OSError, pa.ArrowException, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as a token shard ({error}); prepare the tokens again"
        ) from None
    dtype = np.dtype("<u2" if width == 2 * ROW_TOKENS else "<u4")
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    payloads = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunk = group.column(0)
        size = group.num_rows * width
        end = chunk.data_page_offset + chunk.total_compressed_size
        if (
            chunk.compression != "UNCOMPRESSED"
            or chunk.has_dictionary_page
            or not _one_plain_page(raw, chunk.data_page_offset, end - size, size, group.num_rows)
        ):
            raise UserError(
                f"{path}: row group {i} is not one plain, uncompressed page; prepare the tokens again"
            )
        # A plain ndarray over the mapping: slicing np.memmap itself costs twice as much per window.
        payloads.append(
            np.frombuffer(raw, dtype=dtype, count=size // dtype.itemsize, offset=end - size)
        )
    return payloads


def verify(path: Path, sha256: str) -> None:
    """Compare a file of a dataset with its hash, once per node: a stamp in the temporary folder remembers path, size,
    and when content and inode were last changed (the latter nobody can set back).

    Raises:
        UserError: names the file that is missing or changed.
    """
    try:
        found = path.stat()
        key = f"{path.resolve()}/{found.st_ino}/{found.st_size}/{found.st_mtime_ns}/{found.st_ctime_ns}/{sha256}"
        with open(_stamps() / hashlib.sha256(key.encode()).hexdigest(), "a+") as stamp:
            fcntl.flock(
                stamp, fcntl.LOCK_EX
            )  # the other workers of this node wait, and find it done
            stamp.seek(0)
            if stamp.read() == "verified":
                return
            if file_sha256(path) == sha256:
                stamp.write("verified")
                return
    except FileNotFoundError:
        raise UserError(
            f"{path}: it is missing; delete its folder and prepare the tokens again"
        ) from None
    raise UserError(
        f"{path}: not what was written (SHA-256 differs); delete its folder and prepare the "
        f"tokens again"
    )


def _stamps() -> Path:
    """The folder of this user's stamps; the temporary folder is everybody's, and who writes a stamp vouches for a file."""
    folder = Path(tempfile.gettempdir()) / f"espalier-verified-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            f"{folder}: not a folder of yours alone ({stat.filemode(found.st_mode)}, owner {found.st_uid}), so what "
            f"it says of verified shards counts for nothing; remove it, or set TMPDIR to a folder of your own"
        )
    return folder


def as_lists(table: pa.Table) -> pa.Table:
    """A shard's table with `tokens` as lists of integers, for people who look; no copy."""

    def view(chunk: pa.Array) -> pa.Array:
        width = chunk.type.byte_width
        kind = pa.uint16() if width == 2 * ROW_TOKENS else pa.uint32()
        first, count = chunk.offset * ROW_TOKENS, len(chunk) * ROW_TOKENS
        values = pa.Array.from_buffers(kind, first + count, [None, chunk.buffers()[1]]).slice(first)
        return pa.FixedSizeListArray.from_arrays(values, ROW_TOKENS)

    return pa.table({"tokens": pa.chunked_array([view(c) for c in table.column("tokens").chunks])})


# ---- the page header: Thrift's compact protocol, as far as it is needed ----
def _one_plain_page(raw: np.ndarray, start: int, payload: int, size: int, rows: int) -> bool:
    """Whether a v1 data page header begins at `start`, ends exactly at `payload` and announces `rows` PLAIN values."""
    try:
        fields, end = _read_struct(raw, start)
    except (IndexError, RecursionError):
        return False
    page = fields.get(5, {})
    return (
        end == payload
        and fields.get(1) == 0
        and fields.get(2) == size
        and fields.get(3) == size
        and page.get(1) == rows
        and page.get(2) == 0
    )


def _read_struct(raw: np.ndarray, at: int) -> tuple[dict, int]:
    fields: dict = {}
    number = 0
    while raw[at]:
        head, at = int(raw[at]), at + 1
        if head >> 4:
            number += head >> 4
        else:
            value, at = _read_varint(raw, at)
            number = _unzigzag(value)
        kind = head & 15
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (3, 4, 5, 6):
            value, at = _read_varint(raw, at)
            fields[number] = _unzigzag(value)
        elif kind == 8:
            length, at = _read_varint(raw, at)
            at += length
        elif kind == 12:
            fields[number], at = _read_struct(raw, at)
        else:
            raise IndexError(kind)  # nothing else stands in a data page header
    return fields, at + 1


def _read_varint(raw: np.ndarray, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = int(raw[at]), at + 1  # int: uint8 would overflow silently
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _unzigzag(value: int) -> int:
    return value >> 1 ^ -(value & 1)
