"""The files of a corpus: paths, globs, folders, downloads, or Python's own standard library.

`resolve` finds the files without reading or downloading them. `fetch` downloads, and
`documents.py` reads.
"""

import glob
import hashlib
import os
import re
import shutil
import sysconfig
import urllib.parse
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.files import cache_folder, replacement
from orchestrator.redact import redact_text

STDLIB = "builtin:stdlib"
TIMEOUT_S = 60  # a download fails if the server sends nothing for this time

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_COMPRESSED = {".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".7z"}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file of text.

    Attributes:
        name: Name in the dataset, such as `folder/sub/file.txt`; the same on every machine.
        path: Absolute. For a download, its place in the cache.
        size: In bytes; None before a download.
        sha256: Known beforehand for a download, else None.
        url: Address of a download, else None.
    """

    name: str
    path: Path
    size: int | None
    sha256: str | None = None
    url: str | None = None

    @property
    def bytes(self) -> int:
        """Size of a file that is on this machine."""
        assert self.size is not None, f"{self.name} was not downloaded"
        return self.size


def resolve(corpus: str | list[str]) -> list[Source]:
    """Return the files of a corpus.

    Entries keep their order; the files of a folder or glob are sorted by name.

    Raises:
        UserError: An entry does not exist, a file is listed twice or compressed, a download has no
            SHA-256, or all files are empty.
    """
    entries = entries_of(corpus)
    sources = [source for entry in entries for source in _resolve_entry(entry)]
    seen: set[Path] = set()
    for source in sources:
        if source.path in seen:
            raise UserError(f"data.corpus: {source.path} is listed twice; list it once")
        seen.add(source.path)
        if source.path.suffix.lower() in _COMPRESSED:
            raise UserError(f"data.corpus: {source.path} is compressed; unpack it first")
    if all(source.size == 0 for source in sources):
        shown = redact_text(", ".join(entries))
        raise UserError(f"data.corpus: {shown} holds no text (every file is empty)")
    return sources


def entries_of(corpus: str | list[str]) -> list[str]:
    """Return the entries of `data.corpus` as a list; the setting may be a single entry."""
    return [corpus] if isinstance(corpus, str) else corpus


def root_name(entry: str) -> str:
    """Return the first part of the file names of an entry. The files need not exist."""
    if entry == STDLIB:
        return "stdlib"
    if _is_url(entry):
        return _url_name(entry)
    return _absolute(_fixed_part(entry)).name


# ---- entries ----


def _resolve_entry(entry: str) -> list[Source]:
    if entry == STDLIB:
        base = Path(sysconfig.get_paths()["stdlib"])
        return _named("stdlib", base, _files_below(base, _NOT_LIBRARY, ".py"))
    if entry.startswith("builtin:"):
        raise UserError(f"data.corpus: '{entry}' is unknown; the built-in corpus is {STDLIB}")
    if _is_url(entry):
        return [_resolve_url(entry)]
    path = _absolute(entry)
    if path.is_file():
        return [_source(path.name, path)]
    if path.exists():
        found = _named(path.name, path, _files_below(path))
        if not found:
            raise UserError(f"data.corpus: {path} holds no files")
        return found
    if not glob.has_magic(entry):
        raise UserError(f"data.corpus: {path} does not exist")
    files = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
    if not files:
        raise UserError(f"data.corpus: '{entry}' matches no file")
    base = _absolute(_fixed_part(entry))
    return _named(base.name, base, files)


def _files_below(base: Path, skipped: Collection[str] = (), suffix: str = "") -> list[Path]:
    """Return the files below a folder, without hidden files and folders."""
    found = []
    for parent, folders, files in os.walk(base):
        folders[:] = [name for name in folders if name not in skipped and _is_visible(name)]
        found += [
            Path(parent, name) for name in files if name.endswith(suffix) and _is_visible(name)
        ]
    return [path for path in found if path.is_file()]


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _named(root: str, base: Path, files: Iterable[Path]) -> list[Source]:
    """Name each file by its place below `base`, and sort by name."""
    sources = [_source(f"{root}/{file.relative_to(base).as_posix()}", file) for file in files]
    return sorted(sources, key=lambda source: source.name)


def _source(name: str, path: Path) -> Source:
    return Source(name, path, path.stat().st_size)


def _absolute(entry: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(entry)))


def _fixed_part(entry: str) -> Path:
    """Return the folder that a glob starts from; the entry itself if it is not a glob."""
    path = Path(entry)
    if os.path.exists(os.path.expanduser(entry)):
        return path
    parts = path.parts
    magic = [i for i, part in enumerate(parts) if glob.has_magic(part)]
    return Path(*parts[: magic[0]]) if magic else path


# ---- downloads ----


def _is_url(entry: str) -> bool:
    return entry.startswith(("https://", "http://"))


def without_hash(entry: str) -> str:
    """Return an entry of `data.corpus` without the #sha256=… of an address."""
    return entry.partition("#")[0] if _is_url(entry) else entry


def _url_name(entry: str) -> str:
    parts = urllib.parse.urlsplit(entry)
    return urllib.parse.unquote(parts.path).rstrip("/").rsplit("/", 1)[-1] or parts.netloc


def _resolve_url(entry: str) -> Source:
    url, _, fragment = entry.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if match is None:
        raise UserError(
            f"data.corpus: '{redact_text(entry)}' needs its SHA-256, so that everyone trains on "
            f"the same text: {redact_text(url)}#sha256=HEX, where HEX is the output of "
            "`curl -L URL | sha256sum`"
        )
    sha256 = match[1].lower()
    name = _url_name(url)
    path = cache_folder() / f"{sha256[:16]}-{name}"
    size = path.stat().st_size if path.is_file() else None
    return Source(name, path, size, sha256, url)


def fetch(source: Source, folder: Path, progress: Progress = lambda *_: None) -> Source:
    """Return a source that all nodes can read.

    A download is stored in the cache of this machine, unless it is there already, and linked into
    `folder`.

    Args:
        source: A file of the corpus.
        folder: Folder that all nodes see.
        progress: Called with ("downloading", bytes done, bytes in all).

    Raises:
        UserError: The address does not answer, or the file has another SHA-256.
    """
    if source.url is None:
        return source
    if source.size is None:
        source.path.parent.mkdir(parents=True, exist_ok=True)
        with replacement(source.path) as temporary:
            sha256 = _download(source, source.url, temporary, progress)
            if sha256 != source.sha256:
                raise UserError(
                    f"{redact_text(source.url)}: its SHA-256 is {sha256}, data.corpus says "
                    f"{source.sha256}; the file has changed or the download is broken"
                )
    path = folder / source.path.name
    path.unlink(missing_ok=True)
    try:
        os.link(source.path, path)
    except OSError:  # another file system
        shutil.copyfile(source.path, path)
    return replace(source, path=path, size=path.stat().st_size)


def _download(source: Source, url: str, file: Path, progress: Progress) -> str:
    """Download `url` into `file` and return its SHA-256."""
    import http.client
    import urllib.request

    digest = hashlib.sha256()
    done = 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, open(file, "wb") as out:
            total = int(response.headers.get("Content-Length") or 0)
            while block := response.read(_BLOCK):
                digest.update(block)
                out.write(block)
                done += len(block)
                progress("downloading", done, total or done + 1)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = redact_text(str(getattr(error, "reason", error)))
        if "@" in url:  # urllib mistakes a password for a port, and quotes it
            reason = "an address with a password"
        raise UserError(
            f"{redact_text(url)}: cannot be downloaded ({reason}); put the file at {source.path}, "
            "or name a local copy in data.corpus"
        ) from None
    return digest.hexdigest()
