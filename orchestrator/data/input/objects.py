"""The files of a corpus in object storage, `s3://bucket/folder/*.txt`, as copies on this machine.

A copy has the name, the bytes and the time of its object, so the dataset is that of a local corpus.
"""

import fcntl
import glob
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from orchestrator import files
from orchestrator.data.input.kinds import kind_of_name
from orchestrator.data.input.paths import LeftOut, MissingCorpusError, matches
from orchestrator.errors import UserError
from orchestrator.folders import file_bytes
from orchestrator.hashes import stamp
from orchestrator.objects import cache, threads
from orchestrator.objects.address import Address, is_plain_key, parse
from orchestrator.objects.store import (
    ChangedObjectError,
    Info,
    MissingObjectError,
    Store,
    open_store,
)

THREADS = 8
PART_BYTES = 16 << 20  # of one request


def fixed_part(entry: str) -> tuple[Address, list[str]]:
    """Return the address that a glob starts from, and the pattern below it."""
    address = parse("data.corpus", entry)
    parts = address.key.split("/") if address.key else []
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Address(address.scheme, address.bucket, "/".join(parts[:first])), parts[first:]


def copies(entry: str, left_out: LeftOut) -> tuple[Path, dict[Path, str]]:
    """Copy the objects of an entry to this machine, unless they are there.

    Objects whose names say that they cannot be read, such as archives, are not copied.

    Returns:
        The path that stands for the start of the glob, and the source (see `fetch`) of each copy.

    Raises:
        UserError: No object matches, or the store refuses the request.
        StoreAwayError: The store does not answer.
    """
    base, pattern = fixed_part(entry)
    store = open_store(base)
    found = dict(_listed(store, base, left_out))
    if "" in found and not pattern:
        found = {"": found[""]}
    else:
        found = _matching(found, pattern or ["**"], left_out)
    if not found:
        raise MissingCorpusError(f"data.corpus: '{entry}' matches no object")
    _check_parents(base, found)
    place = cache.use("corpus", base) / base.name
    sources = {place / name if name else place: _source(base, info) for name, info in found.items()}
    missing = {
        path: source
        for path, source in sources.items()
        if not kind_of_name(path).problem and not _is_copy(path, source)
    }
    if missing:
        size = sum(map(size_of, missing.values()))
        print(f"downloading {len(missing):,} objects of {base}, {size / 1e6:,.1f} MB", flush=True)
        cache.make_room(place.parent, size - sum(map(file_bytes, missing)))
        threads.for_each(missing, lambda path: _copy(store, path, missing[path]), THREADS)
    return place, sources


def _listed(store: Store, base: Address, left_out: LeftOut) -> Iterator[tuple[str, Info]]:
    """Return the objects at or below an address, by their names below it."""
    for info in store.list(base.key):
        below = info.key[len(base.key) :]
        if below.endswith("/") or (base.key and below and below[0] != "/"):
            continue  # the mark of a folder; or a key that only begins with the same text
        name = below.removeprefix("/") if base.key else below
        if is_plain_key(name):
            yield name, info
        else:
            left_out["key that is no path"].append(name)


def _matching(found: dict[str, Info], pattern: list[str], left_out: LeftOut) -> dict[str, Info]:
    result = {}
    for name, info in found.items():
        parts = name.split("/")
        if name and matches(parts, pattern):
            result[name] = info
        elif pattern == ["**"] and any(part.startswith(".") for part in parts):
            left_out["hidden"].append(parts[-1])
    return result


def _check_parents(base: Address, names: Collection[str]) -> None:
    """Raise UserError if one object would be a file and another one a file in it."""
    for name in names:
        for parent in PurePosixPath(name).parents:
            if str(parent) in names:
                raise UserError(
                    f"data.corpus: {base / str(parent)} and {base / name} would be a file and a "
                    "folder of the same name; name the objects one by one, or by a narrower glob"
                )


# ---- one object ----


def size_of(source: str) -> int:
    """Return the bytes of an object."""
    return int(source.split()[0])


def _source(base: Address, info: Info) -> str:
    """Return size, time, version and address of an object as a text; see `fetch`."""
    address = Address(base.scheme, base.bucket, info.key)
    return f"{info.size} {int(info.modified)} {info.version} {address}"


def fetch(sources: dict[Path, str]) -> None:
    """Copy objects, unless they are there. For the nodes that did not list the corpus.

    Args:
        sources: Of `copies`; the paths are those of the node that listed the corpus.
    """
    missing = {path: source for path, source in sources.items() if not _is_copy(path, source)}
    sizes: Counter[Path] = Counter()
    for path, source in missing.items():
        sizes[cache.use_folder_of(path)] += size_of(source) - file_bytes(path)
    for unit, size in sizes.items():  # once: it walks through the cache
        cache.make_room(unit, size)

    def copy(path: Path) -> None:
        address = missing[path].split(" ", 3)[3]
        _copy(open_store(parse("data.corpus", address)), path, missing[path])

    threads.for_each(missing, copy, THREADS)


def _mark(path: Path) -> Path:
    """Return the file that says of which object and version a file is a copy."""
    return path.with_name(f".{path.name}.object")


def _is_copy(path: Path, source: str) -> bool:
    try:
        return files.read_text(_mark(path)) == f"{source} {tuple(stamp(path))}"
    except (FileNotFoundError, NotADirectoryError):
        return False


def _copy(store: Store, path: Path, source: str) -> None:
    size, modified, version, address = source.split(" ", 3)
    key = parse("data.corpus", address).key
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(_mark(path), "a+", opener=files.opener) as mark:
            # The other processes of this machine wait here, and then find the copy.
            files.lock(mark, fcntl.LOCK_EX)
            if _is_copy(path, source):
                return
            path.unlink(missing_ok=True)  # an older copy, whose room this one has
            with files.replacement(path, durable=False) as temporary:
                with open(temporary, "xb") as file:
                    for start in range(0, int(size), PART_BYTES):
                        length = min(PART_BYTES, int(size) - start)
                        file.write(store.get(key, start, length, version).data)
                os.utime(temporary, (int(modified), int(modified)))
            mark.truncate(0)
            mark.write(f"{source} {tuple(stamp(path))}")
    except (ChangedObjectError, MissingObjectError):
        raise UserError(
            f"data.corpus: {address} was changed while it was read; run the same command again "
            "when the corpus is complete"
        ) from None
    except (FileExistsError, IsADirectoryError, NotADirectoryError, files.NotPlainFileError):
        raise UserError(
            f"data.corpus: the copy of {address}, {path}, would be in the way of an earlier one; "
            f"remove {cache.unit_of(path)}, and run the same command again"
        ) from None
