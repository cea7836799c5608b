"""`manifest.json` is what makes a folder of token shards a dataset: written last, and all that a reader trusts.

Eats the folder; yields a `Manifest`. No Ray, no tokenizer, no Parquet: workers read it by the thousand.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError

FILE = "manifest.json"
FORMAT = 1
ROW_TOKENS = 1024  # W: tokens in one row of a shard


@dataclass(frozen=True)
class Shard:
    """A Parquet file: `rows` rows of W tokens of which `tokens` are real, the rest padding."""

    name: str
    rows: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One continuous stream of `tokens` ids out of `bytes` bytes of text in `documents` documents or parts of one."""

    tokens: int
    documents: int
    bytes: int
    stream_sha256: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """digest: SHA-256 of the manifest file, the dataset's identity. dtype: of the ids, uint16 or uint32."""

    directory: Path
    format_version: int
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    dtype: str
    splits: dict[str, Split]
    sources: list[dict[str, Any]]
    digest: str


def load_manifest(directory: Path) -> Manifest:
    """Read the manifest of a dataset.

    Raises:
        UserError: the folder is no finished dataset, or one of another format.
    """
    file = Path(directory) / FILE
    try:
        data = file.read_bytes()
        raw = json.loads(data)
        if raw["format_version"] != FORMAT:
            raise UserError(f"{file}: format {raw['format_version']}, this program reads {FORMAT}; prepare it again "
                            f"in another data.dir")
        splits = {name: Split(s["tokens"], s["documents"], s["bytes"], s["stream_sha256"],
                              tuple(Shard(**shard) for shard in s["shards"])) for name, s in raw["splits"].items()}
        return Manifest(Path(directory), raw["format_version"], raw["tokenizer"], raw["settings"], raw["dtype"],
                        splits, raw["sources"], hashlib.sha256(data).hexdigest())
    except FileNotFoundError:
        raise UserError(f"{directory}: no finished dataset, {FILE} is missing; run pipelines/prepare.py") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: cannot be read as a dataset's manifest ({error}); delete the folder and prepare it "
                        f"again") from None


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Commit a dataset: the last thing that happens to it."""
    data = json.dumps({"format_version": FORMAT, **content}, indent=1, sort_keys=True) + "\n"
    write_atomically(directory / FILE, data.encode())
    fsync(directory)


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
