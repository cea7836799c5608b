"""Is a dataset already there, and is it the one that was asked for? Where it lies follows from what it is made of.

Eats `config.Data` and a folder; yields its manifest, or None where it is still to be made. Reads names, sizes and times
of the corpus, and its content only where a file is newer than the dataset.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.data import corpus
from orchestrator.data.corpus import Source
from orchestrator.data.dataset import FILE, FORMAT, Manifest, load_manifest
from orchestrator.errors import UserError
from orchestrator.files import file_sha256

if TYPE_CHECKING:
    from orchestrator.config.experiment import Data


def settings_of(data: "Data") -> dict[str, Any]:
    """What beside the corpus decides the bytes of a dataset."""
    keys = ("append_eot", "invalid_utf8", "split", "text_field", "tokenizer", "val_fraction")
    return {key: getattr(data, key) for key in keys}


def dataset_dir(data: "Data", storage: Path) -> Path:
    """Where the dataset of these settings lies: `data.dir`, else `<storage>/data/<fingerprint>`; absolute.

    Raises:
        UserError: the corpus is not there (its names and sizes are in the fingerprint).
    """
    if data.dir is not None:
        # Inside a Ray job the current directory is a throw-away copy: there it lies below the storage.
        base = storage if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else Path.cwd()
        return Path(os.path.abspath(base / os.path.expanduser(data.dir)))
    sources = [[s.name, s.sha256 or s.size] for s in corpus.resolve(data.corpus)]
    content = json.dumps([FORMAT, settings_of(data), sources], sort_keys=True)
    return (
        Path(os.path.abspath(storage)) / "data" / hashlib.sha256(content.encode()).hexdigest()[:16]
    )


def prepared(data: "Data", directory: Path) -> Manifest | None:
    """The finished dataset in `directory`, or None.

    Raises:
        UserError: it was made with other settings or from another corpus, and says what differs.
    """
    if not (directory / FILE).exists():
        return None
    manifest = load_manifest(directory)
    try:
        sources = corpus.resolve(data.corpus)
    except UserError:
        if not _names_cover(data, manifest):
            raise
        sources = []  # the tokens were brought here without their text, and nothing speaks against them
    differences = _setting_differences(data, manifest) + (
        _source_differences(sources, manifest) if sources else []
    )
    differences = differences or _changed_content(sources, manifest)
    if differences:
        raise UserError(
            f"{directory} holds another dataset: {'; '.join(differences)}. Set another data.dir, or delete "
            f"this folder to prepare it anew"
        )
    missing = [
        s.name
        for split in manifest.splits.values()
        for s in split.shards
        if not (directory / s.name).is_file()
    ]
    if missing:
        raise UserError(
            f"{directory}: {missing[0]} is missing; delete the folder and prepare it again"
        )
    return manifest


def _names_cover(data: "Data", manifest: Manifest) -> bool:
    entries = [data.corpus] if isinstance(data.corpus, str) else data.corpus
    roots = {source["name"].split("/", 1)[0] for source in manifest.sources}
    return {corpus.root_name(entry) for entry in entries} == roots


def _setting_differences(data: "Data", manifest: Manifest) -> list[str]:
    asked = settings_of(data)
    return [
        f"data.{key} is {manifest.settings.get(key)} there and {value} here"
        for key, value in asked.items()
        if manifest.settings.get(key) != value
    ]


def _source_differences(sources: list[Source], manifest: Manifest) -> list[str]:
    then, now = [s["name"] for s in manifest.sources], [s.name for s in sources]
    lost = [f"{n} was in its corpus and is not in data.corpus" for n in then if n not in set(now)]
    new = [f"{n} is in data.corpus and was not in its corpus" for n in now if n not in set(then)]
    if lost or new:
        more = len(lost) + len(new) - 3
        return [*(lost + new)[:3], *([f"and {more} more files"] if more > 0 else [])]
    if then != now:
        return ["data.corpus has the same files in another order"]
    pairs = [(s, old["size"]) for s, old in zip(sources, manifest.sources, strict=True)]
    return [
        f"{s.name} had {size} bytes and has {s.size}"
        for s, size in pairs
        if s.size not in (None, size)
    ][:3]


def _changed_content(sources: list[Source], manifest: Manifest) -> list[str]:
    """Files that were touched after the dataset was made and now hold something else."""
    made = (manifest.directory / FILE).stat().st_mtime_ns
    changed = []
    for source, old in zip(sources, manifest.sources, strict=False):
        touched = source.url is None and source.path.stat().st_mtime_ns >= made
        if (source.sha256 or (file_sha256(source.path) if touched else old["sha256"])) != old[
            "sha256"
        ]:
            changed.append(f"{source.name} has changed since then")
    return changed
