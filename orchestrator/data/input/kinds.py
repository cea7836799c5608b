"""The kinds of files in a corpus: text, JSON lines, Parquet, and files that are not read.

The name of a file decides where it is clear. A name such as `x.json`, `x.json.gz`, `x.data` or
`part-00000` is not: the content of the file decides. Packed files are known by their first bytes.
"""

import functools
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from orchestrator.data.input.paths import LeftOut, below
from orchestrator.errors import UserError

TEXT = "text"
LINES = "JSON lines"
PARQUET = "Parquet"

PACKINGS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_ARCHIVES = {".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4"}
_LINES = {".jsonl", ".ndjson"}
_JSON = (".json", ".ndjson")  # starts of suffixes, such as .jsonl-00000-of-00512
_PARQUET = {".parquet", ".parq"}
_TABLES = {".csv", ".tsv"}
_BINARY_NAMES = {".arrow", ".feather", ".avro", ".orc", ".tfrecord", ".npy", ".npz", ".h5", ".pkl"}
_BINARY_NAMES |= {".pt", ".safetensors", ".db", ".sqlite", ".pdf", ".docx", ".xlsx", ".epub"}
_HEAD = 4096
_LINE = 1 << 16  # if the first line is longer, its first characters decide
_MARK = "\ufeff"  # byte order mark
_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"  # the same in UTF-8, and spaces
_CONTROL = bytes(range(32))
# First bytes of files of gzip, zstd, xz, bzip2 and zip
_PACKED = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh91AY&SY", b"PK\3\4")

# Files that describe the data beside them. Spark writes files whose names begin with "_".
_ABOUT_DATA = {"readme", "license", "licence", "notice", "citation", "changelog", "contributing"}
_ABOUT_DATA |= {"dataset_info", "dataset_infos", "dataset_dict", "state", "dataset-metadata"}


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: In words.
        problem: Why such a file cannot be read, and what to do; empty if it can.
        packing: `gzip` or `zstd`; empty if the file is not packed.
    """

    name: str
    problem: str = ""
    packing: str = ""


POINTER = Kind(
    "Git-LFS pointer", "is a Git-LFS pointer and not the file itself; run `git lfs pull` there"
)
_ARCHIVE = Kind("compressed", "is compressed; unpack it first")
_TABLE = Kind(
    "CSV",
    "is a table of characters (CSV); convert it to Parquet, for example with "
    "pyarrow.parquet.write_table(pyarrow.csv.read_csv(FILE), FILE.parquet)",
)
_DOCUMENT = Kind(
    "JSON document",
    "is one JSON value and not one object per line; convert it, for example with "
    "`jq -c '.[]' FILE > FILE.jsonl`",
)
_UTF16 = Kind(
    TEXT, "looks like UTF-16 or UTF-32; convert it, for example with `iconv -f UTF-16LE -t UTF-8`"
)
_BINARY = Kind(
    "binary", "is a binary file and not text; convert it to JSON lines or Parquet, or leave it out"
)


def kind_of(path: str | Path) -> Kind:
    """Return the kind of a file. A file that does not exist has the kind of its name.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return kind_of_name(path)
    return _kind_of(str(path), found.st_size, found.st_mtime_ns)


def kind_of_name(path: str | Path) -> Kind:
    """Return the kind that the name of a file says: text if it says none."""
    return _kind_by_name(*_suffix_and_packing(str(path))) or Kind(TEXT)


@functools.cache
def _kind_of(path: str, size: int, modified: int) -> Kind:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # `open` takes three times as long
    try:
        head = os.read(descriptor, _HEAD)
    finally:
        os.close(descriptor)
    if head.startswith(b"version https://git-lfs.github.com/"):
        return POINTER
    suffix, packing = _suffix_and_packing(path)
    by_name = _kind_by_name(suffix, packing)
    if not packing and head.startswith(_PACKED) and (by_name is None or not by_name.problem):
        return _ARCHIVE
    if by_name is not None:
        return by_name
    is_json = suffix.startswith(_JSON)
    if is_json or packing or (suffix != ".txt" and head.lstrip(_BEFORE_JSON).startswith(b"{")):
        with open_unpacked(path, packing) as file:
            lines = _kind_of_json(file.read(_LINE), is_json)
        if lines is not None:
            return Kind(lines.name, lines.problem, packing)
    return _ARCHIVE if packing else _kind_of_text(head, suffix)


def is_by_content(path: Path, *, read: bool) -> bool:
    """Return whether the content decides that a file is not text, and not its name.

    Args:
        path: The file.
        read: Read the file if its name does not tell.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".txt" or suffix in PACKINGS or _kind_by_name(suffix, "") is not None:
        return False
    return suffix.startswith(_JSON) or (read and kind_of(path).name != TEXT)


def _suffix_and_packing(path: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(path.lower())
    packing = PACKINGS.get(suffix, "")
    return (os.path.splitext(stem)[1] if packing else suffix), packing


def _kind_by_name(suffix: str, packing: str) -> Kind | None:
    """Return the kind that a name alone decides."""
    if suffix in _LINES:
        return Kind(LINES, packing=packing)
    if packing:
        return None if suffix == "" or suffix.startswith(_JSON) else _ARCHIVE
    if suffix in _PARQUET:
        return Kind(PARQUET)
    if suffix in _ARCHIVES:
        return _ARCHIVE
    if suffix in _BINARY_NAMES:
        return _BINARY
    return _TABLE if suffix in _TABLES else None


def _kind_of_json(head: bytes, is_json: bool) -> Kind | None:
    """Return the kind of a file by its first bytes; None if it is no JSON.

    Args:
        head: The first `_LINE` bytes, or the whole file.
        is_json: The name says that it is JSON.
    """
    text = head.decode("utf-8", "replace").removeprefix(_MARK).lstrip()
    line, line_end, _ = text.partition("\n")
    if text.startswith("{"):
        if not line_end and len(head) == _LINE:
            return Kind(LINES)
        try:
            json.loads(line)
            return Kind(LINES)
        except (ValueError, RecursionError):
            return _DOCUMENT if is_json else None
    if not is_json or "\0" in text:  # with NUL it is not UTF-8
        return None
    return _DOCUMENT if text.startswith("[") else Kind(LINES)


def _kind_of_text(head: bytes, suffix: str) -> Kind:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # its byte order mark
        return _UTF16
    if b"\0" in head and len(head) >= 32:
        sides = [head[side::2].translate(None, _CONTROL) for side in (0, 1)]
        shares = sorted(1 - 2 * len(side) / len(head) for side in sides)  # of control characters
        if shares[0] < 0.6 and shares[1] > 0.9:
            return _UTF16
    if suffix == ".txt":  # the name says that it is text
        return Kind(TEXT)
    if head.startswith(b"PAR1"):
        return Kind(PARQUET)
    if b"\0" in head:
        try:
            head[:-4].decode()  # the last character may be cut
        except UnicodeDecodeError:
            return _BINARY
    return Kind(TEXT)


def open_unpacked(path: str | Path, packing: str) -> BinaryIO:
    """Open a file for reading bytes, and unpack it if `packing` is not empty."""
    if not packing:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=packing))


# ---- files of several kinds ----


def check_readable(path: Path) -> Kind:
    """Return the kind of a file of the corpus.

    Raises:
        UserError: Files of this kind are not read.
    """
    kind = _kind(path)
    if kind.problem:
        raise UserError(f"data.corpus: {path} {kind.problem}")
    return kind


def one_kind(
    base: Path,
    files: list[Path],
    left_out: LeftOut,
    size_of: Callable[[Path], int] = os.path.getsize,
) -> list[Path]:
    """Return the files of the kind that holds the data: the one with the most bytes.

    Files that describe data do not count, and are taken only together with text.

    Raises:
        UserError: Files of that kind are not read, or a file is a Git-LFS pointer.
    """
    kinds = [_kind(path) for path in files]
    names = below(base, files)
    about = [_describes_data(name) for name in names]
    if all(about):  # there is no data that they could describe
        about = [False] * len(names)
    sizes: Counter[str] = Counter()
    for path, kind, describes in zip(files, kinds, about, strict=True):
        if kind is POINTER:
            check_readable(path)
        sizes[kind.name] += 0 if describes else size_of(path)
    taken = max(sizes, key=lambda kind: (sizes[kind], kind == TEXT))
    found = []
    for path, kind, name, describes in zip(files, kinds, names, about, strict=True):
        if kind.name != taken or (taken != TEXT and describes):
            left_out[kind.name].append(name)
        else:
            if kind.problem:
                check_readable(path)
            found.append(path)
    return found


def _kind(path: Path) -> Kind:
    try:
        return kind_of(path)
    except OSError as error:
        raise UserError(f"data.corpus: {path} cannot be read ({error.strerror or error})") from None


def _describes_data(path: str) -> bool:
    parts = path.split("/")
    has_mark = any(part.startswith("_") for part in parts)
    return has_mark or parts[-1].lower().partition(".")[0] in _ABOUT_DATA
