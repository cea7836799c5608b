"""The files of a corpus: paths, globs, folders, downloads, or Python's own standard library.

`resolve` finds the files without downloading them, and reads only their first bytes. `fetch`
downloads, and `documents.py` reads.
"""

import os
import re
import shutil
import sysconfig
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.data.input import objects
from orchestrator.data.input.download import Progress, download
from orchestrator.data.input.kinds import check_readable, is_by_content, kind_of, one_kind
from orchestrator.data.input.paths import (
    LeftOut,
    MissingCorpusError,
    below,
    check_unchanged,
    expand,
    fixed_part,
    identity,
    refuse_missing,
)
from orchestrator.errors import UserError
from orchestrator.files import replacement
from orchestrator.hashes import sha256s
from orchestrator.objects.address import is_address
from orchestrator.paths import cache_folder, expand_home, local_path
from orchestrator.redact import redact_text

STDLIB = "builtin:stdlib"


_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SHOWN = 3  # names in one message


@dataclass(frozen=True)
class CorpusFile:
    """One file of text.

    Attributes:
        name: Name in the dataset, such as `folder/sub/file.txt`; the same on every machine.
        path: Absolute. For a download, its place in the cache.
        size: In bytes; None before a download.
        modified: Time of the last write in nanoseconds; None before a download.
        sha256: Known beforehand for a download, else None.
        url: Address of a download, else None.
    """

    name: str
    path: Path
    size: int | None
    sha256: str | None = None
    url: str | None = None
    modified: int | None = None
    object: str = ""

    @property
    def bytes(self) -> int:
        """Size of a file that is on this machine."""
        assert self.size is not None, f"{self.name} was not downloaded"
        return self.size

    @property
    def by_content(self) -> bool:
        """The content decides how the file is read, and not its name."""
        # The name of a dataset must not change when its corpus is downloaded.
        return is_by_content(self.path, read=self.url is None)

    def check_unchanged(self) -> None:
        """Raise UserError if the file is not the one that was listed."""
        check_unchanged(self.name, self.path, self.size, self.modified)


class Listing(list[CorpusFile]):
    """The files of a corpus, in order.

    Attributes:
        left_out: Names of other files that were found, by the reason.
    """

    def __init__(self, files: Iterable[CorpusFile] = (), left_out: LeftOut | None = None):
        super().__init__(files)
        self.left_out: LeftOut = defaultdict(list) if left_out is None else left_out

    def __str__(self) -> str:
        """Return `3 Parquet, 12,345 bytes; left out: 1 text (README.md)`."""
        kinds = Counter(kind_of(source.path).name for source in self)
        size = sum(source.size or 0 for source in self)
        taken = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        left_out = [
            f"{len(names):,} {reason} ({shown(names)})" for reason, names in self.left_out.items()
        ]
        line = f"{taken}, {size:,} bytes"
        return f"{line}; left out: {', '.join(left_out)}" if left_out else line


def shown(names: Sequence[str]) -> str:
    """Return the first names on one line, and how many more there are."""
    first = [name if name.isprintable() else ascii(name) for name in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(first) + more


def resolve(corpus: str | list[str]) -> Listing:
    """Find the files of a corpus.

    Entries keep their order; the files of a folder or glob are sorted by name. Links are followed,
    and a file that has several names in one folder is taken once. If a folder has several kinds of
    files, the kind that holds the data is taken.

    Raises:
        UserError: An entry does not exist, a file cannot be read as text or is listed twice, a
            download has no SHA-256, or all files are empty.
    """
    entries = entries_of(corpus)
    listing = Listing()
    for entry in entries:
        listing += _resolve_entry(entry, listing.left_out)
    seen: set[object] = set()
    for source in listing if len(entries) > 1 else []:
        key: object = source.object or source.path
        if source.url is None and not source.object:
            key = identity(source.path)
        if key in seen:
            raise UserError(f"data.corpus: {source.path} is listed twice; list it once")
        seen.add(key)
    if all(source.size == 0 for source in listing):
        names = redact_text(", ".join(entries))
        raise UserError(f"data.corpus: {names} holds no text (every file is empty)")
    return listing


def entries_of(corpus: str | list[str]) -> list[str]:
    """Return the entries of `data.corpus` as a list; the setting may be a single entry."""
    return [corpus] if isinstance(corpus, str) else corpus


def root_name(entry: str) -> str:
    """Return the first part of the file names of an entry. The files need not exist."""
    if entry == STDLIB:
        return "stdlib"
    if _is_url(entry):
        return _url_name(entry)
    if is_address(entry):
        return objects.fixed_part(entry)[0].name
    return fixed_part(_absolute(entry))[0].name


# ---- entries ----


def _resolve_entry(entry: str, left_out: LeftOut) -> list[CorpusFile]:
    if entry == STDLIB:
        base = Path(sysconfig.get_paths()["stdlib"])
        return _named("stdlib", base, _library_files(base))
    if entry.startswith("builtin:"):
        raise UserError(f"data.corpus: '{entry}' is unknown; the built-in corpus is {STDLIB}")
    if _is_url(entry):
        return [_resolve_url(entry)]
    if is_address(entry):
        return _resolve_objects(entry, left_out)
    base, pattern = fixed_part(_absolute(local_path("data.corpus", entry)))
    if not base.exists():
        refuse_missing(base)
    if base.is_file() and not pattern:
        check_readable(base)
        return [_source(base.name, base)]
    files = expand(base, pattern, left_out)
    if not files:
        problem = f"'{entry}' matches no file" if pattern else f"{base} holds no files"
        raise MissingCorpusError(f"data.corpus: {problem}")
    return _named(base.name, base, one_kind(base, files, left_out))


def _resolve_objects(entry: str, left_out: LeftOut) -> list[CorpusFile]:
    base, found = objects.copies(entry, left_out)
    if base in found:
        check_readable(base)
        sources = [_source(base.name, base)]
    else:
        # Not all of them are copied.
        taken = one_kind(base, list(found), left_out, lambda path: objects.size_of(found[path]))
        sources = _named(base.name, base, taken)
    # Other nodes may not have the copies, so they are hashed here.
    hashes = sha256s([str(source.path) for source in sources])
    return [
        replace(source, sha256=sha256, object=found[source.path])
        for source, sha256 in zip(sources, hashes, strict=True)
    ]


def _library_files(base: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(base):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY and name[0] != "."]
        found += [Path(parent, name) for name in files if name.endswith(".py") and name[0] != "."]
    return [path for path in found if path.is_file()]


def _named(root: str, base: Path, files: list[Path]) -> list[CorpusFile]:
    """Name each file by its place below `base`, and sort by name."""
    names = below(base, files)
    sources = [_source(f"{root}/{name}", file) for name, file in zip(names, files, strict=True)]
    return sorted(sources, key=lambda source: source.name)


def _source(name: str, path: Path) -> CorpusFile:
    found = os.stat(path)
    return CorpusFile(name, path, found.st_size, modified=found.st_mtime_ns)


def _absolute(entry: str | Path) -> Path:
    return Path(os.path.abspath(expand_home(entry)))


# ---- downloads ----


def _is_url(entry: str) -> bool:
    return entry.startswith(("https://", "http://"))


def without_hash(entry: str) -> str:
    """Return an entry of `data.corpus` without the #sha256=… of an address."""
    return entry.partition("#")[0] if _is_url(entry) else entry


def _url_name(entry: str) -> str:
    parts = urllib.parse.urlsplit(entry)
    return urllib.parse.unquote(parts.path).rstrip("/").rsplit("/", 1)[-1] or parts.netloc


def _resolve_url(entry: str) -> CorpusFile:
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
    check_readable(path)
    if path.is_file():
        return replace(_source(name, path), sha256=sha256, url=url)
    return CorpusFile(name, path, None, sha256, url)


def fetch(source: CorpusFile, folder: Path, progress: Progress = lambda *_: None) -> CorpusFile:
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
            sha256 = download(source.url, temporary, source.path, progress)
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
    fetched = _source(source.name, path)
    return replace(fetched, sha256=source.sha256, url=source.url)
