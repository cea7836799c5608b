"""A prepared dataset: a folder of token shards and its manifest.

`manifest.json` is written last; a folder without it is not a dataset. It holds the SHA-256 of every
other file and of itself, so a changed byte is found before a token is read: `tokenizer.json` is
compared whenever the manifest is loaded, a shard or `documents.parquet` when it is opened.

Every training worker imports this module, so it imports neither Ray nor pydantic nor pyarrow.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from orchestrator import files
from orchestrator.data.tokenizers.base import TOKENIZER_FILE, TokenizerFacts
from orchestrator.errors import UserError
from orchestrator.files import file_sha256, fsync, write_atomically
from orchestrator.hashes import Stamp, private_folder, stamp

FILE = "manifest.json"
FORMAT = 2
INDEX_FILE = "documents.parquet"
ROW_TOKENS = 1024  # W: tokens in one row of a shard


@dataclass(frozen=True)
class Shard:
    """A Parquet file of `rows` rows of W tokens. The first `tokens` are real, the rest padding."""

    name: str
    rows: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """A continuous stream of token ids: `train` or `val`.

    Attributes:
        tokens: Number of ids.
        documents: Number of documents; a document that the split cuts counts in both splits.
        bytes: UTF-8 bytes of the text.
        stream_sha256: SHA-256 of the ids as little-endian integers, without padding.
        shards: The files, in order.
    """

    tokens: int
    documents: int
    bytes: int
    stream_sha256: str
    shards: tuple[Shard, ...]


class SourceFile(TypedDict):
    """A file of the corpus, as the manifest lists it."""

    name: str
    size: int
    sha256: str
    by_content: NotRequired[bool]  # see `CorpusFile.by_content`; only if it is true


class ManifestContent(TypedDict):
    """Content of manifest.json, without its format version and hashes."""

    dtype: str
    settings: dict[str, Any]
    splits: dict[str, Split]
    sources: list[SourceFile]
    tokenizer: TokenizerFacts


@dataclass(frozen=True)
class Manifest:
    """A dataset.

    Attributes:
        directory: Its folder.
        tokenizer: Name, size and SHA-256 of the tokenizer.
        splits: `train` and `val`.
        settings: Fields of the `data` section that decide the tokens.
        dtype: Type of the ids, `uint16` or `uint32`.
        sources: Files of the corpus.
        files: SHA-256 of `tokenizer.json` and `documents.parquet`.
        digest: SHA-256 of the manifest file.
    """

    directory: Path
    tokenizer: TokenizerFacts
    splits: dict[str, Split]
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "uint16"
    sources: list[SourceFile] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    digest: str = ""


def load_manifest(directory: Path) -> Manifest:
    """Read the manifest of a dataset and compare it and `tokenizer.json` with their hashes.

    Raises:
        UserError: The folder has no finished dataset, one of another format, or a changed file.
    """
    file = Path(directory) / FILE
    try:
        data = file.read_bytes()
        raw = json.loads(data)
        version = raw["format_version"]
    except FileNotFoundError:
        raise UserError(
            f"{directory}: not a finished dataset, {FILE} is missing; run pipelines/prepare.py"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}: cannot be read as a manifest ({error}); delete the folder and prepare it "
            "again"
        ) from None
    if version != FORMAT:
        raise UserError(
            f"{file}: has dataset format {version!r:.20}, this program reads {FORMAT}; delete the "
            "folder, or set another data.dir, to prepare it anew"
        )
    sha256 = raw.pop("sha256", None)
    digest = hashlib.sha256(data).hexdigest()
    mark = _marks() / f"manifest-{digest}"
    # The mark saves a second for a corpus of 100,000 files.
    if not mark.exists():
        # The text is compared as well: JSON with a changed byte may have the same content.
        if sha256 != _digest(raw) or data != _text({**raw, "sha256": sha256}):
            raise UserError(f"{file}: {_CHANGED}")
        mark.touch()
    manifest = Manifest(
        Path(directory),
        raw["tokenizer"],
        {name: _split(stored) for name, stored in raw["splits"].items()},
        raw["settings"],
        raw["dtype"],
        raw["sources"],
        raw["files"],
        digest,
    )
    if TOKENIZER_FILE in manifest.files:
        verify(manifest.directory / TOKENIZER_FILE, manifest.files[TOKENIZER_FILE])
    return manifest


def write_manifest(directory: Path, content: ManifestContent) -> None:
    """Write the manifest, the last file of a dataset. The folder is a dataset from then on."""
    hashes = {
        name: file_sha256(directory / name)
        for name in (INDEX_FILE, TOKENIZER_FILE)
        if (directory / name).exists()
    }
    raw = {"format_version": FORMAT, "row_tokens": ROW_TOKENS, "files": hashes, **content}
    write_atomically(directory / FILE, _text({**raw, "sha256": _digest(raw)}), durable=True)
    fsync(directory)


def data_identity(dataset: Manifest) -> str:
    """Return the SHA-256 of the tokenizer and the token streams, on which training depends."""
    streams = {name: split.stream_sha256 for name, split in dataset.splits.items()}
    content = json.dumps([dataset.tokenizer, streams], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _split(stored: Mapping[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in stored["shards"])
    return Split(**{**stored, "shards": shards})


def _text(raw: Mapping[str, Any]) -> bytes:
    return (json.dumps(raw, indent=1, sort_keys=True, default=vars) + "\n").encode()


def _digest(raw: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True, default=vars).encode()).hexdigest()


# ---- files of a dataset ----

_CHANGED = "its content has changed (SHA-256 differs); delete the folder and prepare it again"


def verify(path: Path, sha256: str) -> Stamp:
    """Compare a file of a dataset with its SHA-256, once per node and version of the file.

    A mark in the temporary folder records that this version of the file was verified.

    Returns:
        The version, from before the file was read.

    Raises:
        UserError: The file is missing or changed.
    """
    try:
        found = stamp(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; delete the folder and prepare it again") from None
    version = f"{path.resolve()}/{found}/{sha256}"
    with open(_marks() / hashlib.sha256(version.encode()).hexdigest(), "a+") as mark:
        # The other workers of the node wait here, and then find the file verified.
        files.lock(mark, fcntl.LOCK_EX)
        mark.seek(0)
        if mark.read() != "verified":
            if file_sha256(path) != sha256:
                raise UserError(f"{path}: {_CHANGED}")
            mark.write("verified")
    return found


def _marks() -> Path:
    """Return the folder of this user's marks; the temporary folder itself is world-writable."""
    folder = Path(tempfile.gettempdir()) / f"espalier-verified-{os.getuid()}"
    return private_folder(folder, "remove it, or set TMPDIR to a folder of your own")
