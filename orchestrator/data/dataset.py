"""`manifest.json` is what makes a folder of token shards a dataset: written last, and all that a reader trusts.

Eats the folder; yields a `Manifest`. No Ray, no tokenizer, no Parquet: workers read it by the thousand. It has the
SHA-256 of every other file and of itself, so that one changed byte anywhere is found before a token is read:
`tokenizer.json`, which is small, whenever the manifest is loaded; a shard or `documents.parquet` when it is opened.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.files import file_sha256, fsync, write_atomically

FILE = "manifest.json"
FORMAT = 2
OTHER_FILES = ("documents.parquet", "tokenizer.json")  # beside the shards
ROW_TOKENS = 1024  # W: tokens in one row of a shard
_SHARD = re.compile(r"[a-z]+-[0-9]{5,}\.parquet")


@dataclass(frozen=True)
class Shard:
    """A Parquet file: `rows` rows of W tokens of which `tokens` are real, the rest padding."""

    name: str
    rows: int
    tokens: int
    sha256: str

    def __post_init__(self):
        # A name is a file of the dataset's folder, and nothing that leads out of it.
        if not _SHARD.fullmatch(self.name) or not (_is_count(self.rows) and _is_count(self.tokens)):
            raise ValueError(
                f"shard {self.name!r:.80} of {self.rows!r} rows and {self.tokens!r} tokens"
            )


@dataclass(frozen=True)
class Split:
    """One continuous stream of `tokens` ids out of `bytes` bytes of text in `documents` documents or parts of one."""

    tokens: int
    documents: int
    bytes: int
    stream_sha256: str
    shards: tuple[Shard, ...]

    def __post_init__(self):
        if not all(map(_is_count, (self.tokens, self.documents, self.bytes))):
            raise ValueError(
                f"{self.tokens!r} tokens, {self.documents!r} documents, {self.bytes!r} bytes"
            )


@dataclass(frozen=True)
class Manifest:
    """digest: SHA-256 of the manifest file, the dataset's identity. dtype: of the ids, uint16 or uint32. files: SHA-256
    of `OTHER_FILES`."""

    directory: Path
    format_version: int
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    dtype: str
    splits: dict[str, Split]
    sources: list[dict[str, Any]]
    digest: str
    files: dict[str, str] = field(default_factory=dict)


def load_manifest(directory: Path) -> Manifest:
    """Read the manifest of a dataset, and compare it and `tokenizer.json` with their hashes.

    Raises:
        UserError: the folder is no finished dataset, or one of another format; a file of it is not what was written.
    """
    file = Path(directory) / FILE
    try:
        data = file.read_bytes()
        raw = json.loads(data)
        if raw["format_version"] != FORMAT:
            raise UserError(
                f"{file}: a dataset of format {raw['format_version']!r:.20}, this program reads {FORMAT}; delete "
                f"the folder, or set another data.dir, to prepare it anew"
            )
        # Its text, not only its content: what JSON does not care about is a changed byte too.
        if data != _text(raw) or raw.pop("sha256") != _digest(raw):
            raise UserError(
                f"{file}: not what was written (SHA-256 differs); delete the folder and prepare it again"
            )
        splits = {
            name: Split(
                s["tokens"],
                s["documents"],
                s["bytes"],
                s["stream_sha256"],
                tuple(Shard(**shard) for shard in s["shards"]),
            )
            for name, s in raw["splits"].items()
        }
        facts, files, sources = raw["tokenizer"], raw["files"], raw["sources"]
        if not (
            isinstance(facts["name"], str)
            and _is_count(facts["n_vocab"])
            and isinstance(sources, list)
            and raw["dtype"] in ("uint16", "uint32")
            and isinstance(raw["settings"], dict)
        ):
            raise ValueError("a field has a value of another kind")
        found = Manifest(
            Path(directory),
            FORMAT,
            facts,
            raw["settings"],
            raw["dtype"],
            splits,
            sources,
            hashlib.sha256(data).hexdigest(),
            files,
        )
        if "tokenizer.json" in files:
            _verify_small(Path(directory) / "tokenizer.json", files["tokenizer.json"])
        return found
    except FileNotFoundError:
        raise UserError(
            f"{directory}: no finished dataset, {FILE} is missing; run pipelines/prepare.py"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file}: cannot be read as a dataset's manifest ({error}); delete the folder and prepare it "
            f"again"
        ) from None


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Commit a dataset: the last thing that happens to it. `content` is the manifest without format and hashes."""
    files = {
        name: file_sha256(directory / name) for name in OTHER_FILES if (directory / name).exists()
    }
    raw = {"format_version": FORMAT, "files": files, **content}
    write_atomically(directory / FILE, _text({**raw, "sha256": _digest(raw)}), durable=True)
    fsync(directory)


def _text(raw: dict[str, Any]) -> bytes:
    return (json.dumps(raw, indent=1, sort_keys=True) + "\n").encode()


def _digest(raw: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _verify_small(path: Path, sha256: str) -> None:
    """Compare a file that needs no stamp: hashing it costs less than finding out whether that was done."""
    try:
        changed = "is not what was written (SHA-256 differs)" if file_sha256(path) != sha256 else ""
    except FileNotFoundError:
        changed = "is missing"
    if changed:
        raise UserError(f"{path}: {changed}; delete the folder and prepare it again")


def data_identity(dataset: Manifest) -> str:
    """SHA-256 of what the trainer sees of a dataset: its tokenizer and its token streams, wherever they lie."""
    streams = {name: split.stream_sha256 for name, split in dataset.splits.items()}
    return hashlib.sha256(
        json.dumps([dataset.tokenizer, streams], sort_keys=True).encode()
    ).hexdigest()
