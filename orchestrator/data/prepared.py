"""Finds the folder of a `data` section, and the dataset that was prepared in it.

The folder's name is a fingerprint of the settings and of the corpus: the paths of its files below
its root, in their order, and their SHA-256. The corpus may therefore move to another place.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.data import corpus
from orchestrator.data.corpus import Listing
from orchestrator.data.dataset import FILE, FORMAT, ROW_TOKENS, Manifest, load_manifest
from orchestrator.data.input.paths import MissingCorpusError
from orchestrator.data.tokenizer import kind_of
from orchestrator.errors import UserError
from orchestrator.hashes import HashFiles, known_sha256s, sha256s
from orchestrator.paths import local_path
from orchestrator.text import differences

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

# Fields of the `data` section that decide the tokens, besides the corpus.
SETTINGS = ("append_eot", "invalid_utf8", "split", "text_field", "tokenizer", "val_fraction")
END_OF_PARQUET = b"PAR1"
SHOWN = 3  # differences in one message

# Path below the root, and SHA-256, of each file; None: it was not hashed yet.
Content = list[tuple[str, str | None]]


def settings_of(data: "Data") -> dict[str, Any]:
    """Return the fields that decide the tokens of a corpus."""
    settings = {key: getattr(data, key) for key in SETTINGS}
    if data.on_null != "stop":  # the default gives the fingerprint that it had without this field
        settings["on_null"] = data.on_null
    return settings


def dataset_dir(data: "Data", storage: Path) -> Path:
    """Return the folder of a dataset: `data.dir`, else `<storage>/data/<fingerprint>`; absolute.

    Files that this machine has not hashed yet are read.

    Raises:
        UserError: The corpus does not exist, so that its fingerprint is unknown.
    """
    directory = known_dir(data, storage, read=True)
    assert directory is not None
    return directory


def known_dir(
    data: "Data", storage: Path, *, read: bool = False, sources: Listing | None = None
) -> Path | None:
    """Do the same as `dataset_dir` without reading a file; None if one was not hashed yet.

    Args:
        data: The `data` section.
        storage: Folder of all runs and datasets.
        read: Read the files that were not hashed yet.
        sources: The files of the corpus, if they were listed already.
    """
    if data.dir is not None:
        # Inside a Ray job the current directory is a temporary copy of the working directory.
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        base = storage if in_job else Path.cwd()
        return Path(os.path.abspath(base / local_path("data.dir", data.dir)))
    sources = sources or corpus.resolve(data.corpus)
    content = _content(sources, read)
    if any(sha256 is None for _, sha256 in content):
        return None
    folder = Path(os.path.abspath(storage)) / "data"
    # Earlier versions named the folder by the sizes of the files.
    sizes = [(s.name, s.sha256 if s.url else s.size) for s in sources]
    before = folder / _fingerprint(data, sizes)
    if (before / FILE).exists() and _content_of(load_manifest(before)) == content:
        return before
    return folder / _fingerprint(data, content)


def _fingerprint(data: "Data", files: Sequence[tuple[str, str | int | None]]) -> str:
    content = json.dumps([FORMAT, settings_of(data), files], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def with_hashes(sources: Listing, hash_files: HashFiles | None = None) -> Listing:
    """Return the sources with the SHA-256 of each file; see `sha256s`."""
    missing = [str(source.path) for source in sources if source.sha256 is None]
    found = iter(sha256s(missing, hash_files))
    hashed = (s if s.sha256 is not None else replace(s, sha256=next(found)) for s in sources)
    return Listing(hashed, sources.left_out)


def _content(sources: Listing, read: bool) -> Content:
    if read:
        return [(_content_name(s.name, s.by_content), s.sha256) for s in with_hashes(sources)]
    known = known_sha256s(str(source.path) for source in sources if source.sha256 is None)
    return [
        (_content_name(s.name, s.by_content), s.sha256 or known.get(str(s.path))) for s in sources
    ]


def _content_of(manifest: Manifest) -> Content:
    return [
        (_content_name(source["name"], source.get("by_content", False)), source["sha256"])
        for source in manifest.sources
    ]


def _content_name(name: str, by_content: bool) -> str:
    """Mark files whose kind the content decides: earlier versions read them as text."""
    return f"{_below_root(name)} (by content)" if by_content else _below_root(name)


def _below_root(name: str) -> str:
    """Return the path below the folder that `data.corpus` names; the name of a single file."""
    return name.partition("/")[2] or name


def find_in(
    data: "Data", storage: Path, *, read: bool = True, sources: Listing | None = None
) -> Manifest | None:
    """Return the finished dataset of a `data` section; see `known_dir` and `find_prepared`."""
    directory = known_dir(data, storage, read=read, sources=sources)
    if directory is None:
        return None
    return find_prepared(data, directory, read=read, sources=sources)


def list_sources(data: "Data") -> Listing | None:
    """Return the files of the corpus; None if they are not here, but the dataset may be.

    Raises:
        UserError: The corpus does not exist, and `data.dir` is not set; or that is not a path; or
            the tokenizer is unknown.
    """
    kind_of(data.tokenizer)
    if data.dir is not None:
        local_path("data.dir", data.dir)
    try:
        return corpus.resolve(data.corpus)
    except MissingCorpusError:
        if data.dir is None:
            raise
        return None


def find_prepared(
    data: "Data", directory: Path, *, read: bool = True, sources: Listing | None = None
) -> Manifest | None:
    """Return the finished dataset in `directory`; None if there is none.

    Args:
        data: The `data` section.
        directory: Folder of the dataset.
        read: Read the files that this machine has not hashed yet. False: do not compare them.
        sources: The files of the corpus, if they were listed already.

    Raises:
        UserError: It was made with other settings or from another corpus, or a shard is missing or
            cut.
    """
    if not (directory / FILE).exists():
        return None
    manifest = load_manifest(directory)
    changes = _differences(data, manifest, read, sources)
    if changes:
        shown = "; ".join(changes[:SHOWN])
        if len(changes) > SHOWN:
            shown += f"; and {len(changes) - SHOWN} more"
        raise UserError(
            f"{directory} holds another dataset: {shown}. Set another data.dir, or delete this "
            "folder to prepare it anew"
        )
    for split in manifest.splits.values():
        for shard in split.shards:
            payload = shard.rows * ROW_TOKENS * int(manifest.dtype.removeprefix("uint")) // 8
            if not _is_whole(directory / shard.name, payload):
                raise UserError(
                    f"{directory}: {shard.name} is missing or cut; delete the folder and prepare "
                    "it again"
                )
    return manifest


def _is_whole(path: Path, payload: int) -> bool:
    """Return whether a shard has its length and its end. Workers compare the SHA-256."""
    try:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) < payload + len(END_OF_PARQUET):
                return False
            file.seek(-len(END_OF_PARQUET), os.SEEK_END)
            return file.read() == END_OF_PARQUET
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _differences(
    data: "Data", manifest: Manifest, read: bool, sources: Listing | None
) -> list[str]:
    """Return one line for each difference between a dataset and the `data` section."""
    before = {f"data.{key}": value for key, value in manifest.settings.items()}
    now = {f"data.{key}": value for key, value in settings_of(data).items()}
    try:
        sources = sources or corpus.resolve(data.corpus)
    except MissingCorpusError:
        # The dataset may have been copied here without its corpus.
        if not _has_same_roots(data, manifest):
            raise
        sources = Listing()
    else:
        for stored in manifest.sources:
            before[f"size of {_below_root(stored['name'])}"] = stored["size"]
        for source in sources:
            key = f"size of {_below_root(source.name)}"
            # None: a download that is not on this machine.
            now[key] = before.get(key) if source.size is None else source.size
    found = differences(before, dict.fromkeys(before) | now)
    if found or not sources:
        return found
    return _changed_content(_content(sources, read), _content_of(manifest))


def _has_same_roots(data: "Data", manifest: Manifest) -> bool:
    roots = {source["name"].split("/", 1)[0] for source in manifest.sources}
    return {corpus.root_name(entry) for entry in corpus.entries_of(data.corpus)} == roots


def _changed_content(now: Content, before: Content) -> list[str]:
    """Return the differences between the files of the corpus and those of a dataset."""
    if len(now) != len(before):
        return [f"data.corpus has {len(before)} files there and {len(now)} here"]
    changed = [
        name
        for (name, sha256), old in zip(now, before, strict=True)
        if (name, sha256 or old[1]) != old
    ]
    if changed and sorted(now, key=str) == sorted(before, key=str):
        return ["data.corpus has the same files in another order"]
    return [f"{name} has changed since then" for name in changed]
