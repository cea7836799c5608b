"""Where text comes from: files, globs, folders, addresses on the web, or the running Python's own library.

Eats what `data.corpus` says; yields `Source`s in an order that depends on names alone. Nothing is downloaded before
`fetch`, and nothing is read here: `reading.py` turns a source into documents.
"""

import glob
import hashlib
import http.client
import os
import re
import shutil
import sysconfig
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.redact import redact_text

STDLIB = "builtin:stdlib"
_NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_PACKED = {".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".7z"}
_BLOCK = 1 << 20
TIMEOUT_S = 60


@dataclass(frozen=True)
class Source:
    """One file of text.

    name: the same on every machine, `folder/sub/file.txt`. kind: text, jsonl or parquet. path: absolute; of a download,
    where it is cached. size: bytes, None before a download. sha256, url: known beforehand of a download only.
    """

    name: str
    path: Path
    kind: str
    size: int | None
    sha256: str | None = None
    url: str | None = None


def resolve(corpus: str | list[str]) -> list[Source]:
    """The files of a corpus: entries in the order given, files of a folder or glob by name.

    Raises:
        UserError: nothing there, no text in it, a file that comes twice, an address without its SHA-256.
    """
    entries = [corpus] if isinstance(corpus, str) else list(corpus)
    sources = [source for entry in entries for source in _resolve_one(entry)]
    seen: set[Path] = set()
    for source in sources:
        if source.path in seen:
            raise UserError(f"data.corpus: {source.path} comes twice; name it once")
        seen.add(source.path)
        if source.path.suffix.lower() in _PACKED:
            raise UserError(f"data.corpus: {source.path} is compressed; unpack it first")
    if not any(source.size is None or source.size for source in sources):
        raise UserError(
            f"data.corpus: {redact_text(', '.join(entries))} holds no text (every file is empty)"
        )
    return sources


def root_name(entry: str) -> str:
    """What the names of an entry's sources begin with, also where the entry itself is gone."""
    if entry == STDLIB:
        return "stdlib"
    if _is_url(entry):
        return _url_name(urllib.parse.urlsplit(entry))
    return _absolute(_fixed_part(entry)).name


def fetch(source: Source, progress: Callable[[str, int, int], None] = lambda *_: None) -> Source:
    """The source on this machine, downloaded and verified if it is not cached yet.

    Args:
        progress: called with ("downloading", bytes done, bytes in all), where the server says how many.

    Raises:
        UserError: not reachable, or not what its SHA-256 says.
    """
    if source.url is None or source.size is not None:
        return source
    source.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = source.path.with_name(f".{uuid.uuid4().hex}")
    digest, done = hashlib.sha256(), 0
    try:
        with (
            urllib.request.urlopen(source.url, timeout=TIMEOUT_S) as response,
            open(temporary, "wb") as file,
        ):
            total = int(response.headers.get("Content-Length") or 0)
            while block := response.read(_BLOCK):
                digest.update(block)
                file.write(block)
                done += len(block)
                progress("downloading", done, total or done + 1)
        if digest.hexdigest() != source.sha256:
            raise UserError(
                f"{redact_text(source.url)}: its SHA-256 is {digest.hexdigest()}, data.corpus says {source.sha256}; "
                f"the file has changed or the download is broken"
            )
        os.replace(temporary, source.path)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        # urllib takes a password for a port, and says it.
        reason = (
            "an address with a password"
            if "@" in source.url
            else redact_text(str(getattr(error, "reason", error)))
        )
        raise UserError(
            f"{redact_text(source.url)}: cannot be downloaded ({reason}); put the file at {source.path}, or name "
            f"a local copy in data.corpus"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return replace(source, size=done)


def link(source: Source, folder: Path) -> Source:
    """The source under a second name in `folder`, a copy where that is another file system."""
    path = folder / source.path.name
    path.unlink(missing_ok=True)
    try:
        os.link(source.path, path)
    except OSError:
        shutil.copyfile(source.path, path)
    return replace(source, path=path)


# ---- entries ----
def _resolve_one(entry: str) -> list[Source]:
    if entry == STDLIB:
        return _stdlib()
    if entry.startswith("builtin:"):
        raise UserError(f"data.corpus: '{entry}' is unknown; the built-in corpus is {STDLIB}")
    if _is_url(entry):
        return [_download(entry)]
    path = _absolute(entry)
    if path.is_file():
        return [_file(path, path.name)]
    base, paths = path, _files_below(path)
    if not path.exists() and glob.has_magic(entry):
        base = _absolute(_fixed_part(entry))
        paths = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
        if not paths:
            raise UserError(f"data.corpus: '{entry}' matches no file")
    elif not path.exists():
        raise UserError(f"data.corpus: {path} does not exist")
    elif not paths:
        raise UserError(f"data.corpus: {path} holds no files")
    named = [(f"{base.name}/{p.relative_to(base).as_posix()}", p) for p in paths]
    return [_file(p, name) for name, p in sorted(named)]


def _files_below(folder: Path) -> list[Path]:
    """Every file below a folder but the hidden ones."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [
            Path(parent, n)
            for n in names
            if not n.startswith(".") and os.path.isfile(os.path.join(parent, n))
        ]
    return found


def _stdlib() -> list[Source]:
    base = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for parent, folders, names in os.walk(base):
        folders[:] = [f for f in folders if f not in _NO_LIBRARY]
        found += [Path(parent, n) for n in names if n.endswith(".py")]
    return [
        _file(p, name)
        for name, p in sorted((f"stdlib/{p.relative_to(base).as_posix()}", p) for p in found)
    ]


def _file(path: Path, name: str) -> Source:
    return Source(name, path, _kind(path.name), path.stat().st_size)


def _download(entry: str) -> Source:
    parts = urllib.parse.urlsplit(entry)
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
    if not match:
        shown = redact_text(entry)
        raise UserError(
            f"data.corpus: '{shown}' needs its SHA-256, so that everyone trains on the same text: "
            f"{shown.split('#')[0]}#sha256=HEX, where `curl -L URL | sha256sum` prints HEX"
        )
    name, sha256 = _url_name(parts), match[1].lower()
    path = cache_folder() / f"{sha256[:16]}-{name}"
    size = path.stat().st_size if path.is_file() else None
    return Source(name, path, _kind(name), size, sha256, entry.split("#")[0])


def cache_folder() -> Path:
    """Where downloads stay, on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espalier"


def _kind(name: str) -> str:
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(
        Path(name).suffix.lower(), "text"
    )


def _is_url(entry: str) -> bool:
    return entry.startswith(("https://", "http://"))


def _url_name(parts: urllib.parse.SplitResult) -> str:
    return urllib.parse.unquote(parts.path).rstrip("/").rsplit("/", 1)[-1] or parts.netloc


def _absolute(entry: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(entry)))


def _fixed_part(entry: str) -> Path:
    """The folder that a glob starts from, or the entry itself."""
    path = Path(entry)
    if not glob.has_magic(entry) or os.path.exists(os.path.expanduser(entry)):
        return path
    fixed = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)
