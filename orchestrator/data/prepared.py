"""Finds the folder of a `data` section, and the dataset that was prepared in it.

The folder's name is a fingerprint of the settings and of the names and sizes of the corpus. The
content of a corpus file is read only if the file is newer than the dataset.
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
from orchestrator.text import differences

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

# Fields of the `data` section that decide the tokens, besides the corpus.
SETTINGS = ("append_eot", "invalid_utf8", "split", "text_field", "tokenizer", "val_fraction")
SHOWN = 3  # differences in one message


def settings_of(data: "Data") -> dict[str, Any]:
    """Return the fields that decide the tokens of a corpus."""
    return {key: getattr(data, key) for key in SETTINGS}


def dataset_dir(data: "Data", storage: Path) -> Path:
    """Return the folder of a dataset: `data.dir`, else `<storage>/data/<fingerprint>`; absolute.

    Raises:
        UserError: The corpus does not exist, so that its fingerprint is unknown.
    """
    if data.dir is not None:
        # Inside a Ray job the current directory is a temporary copy of the working directory.
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        base = storage if in_job else Path.cwd()
        return Path(os.path.abspath(base / os.path.expanduser(data.dir)))
    sources = [[s.name, s.sha256 or s.size] for s in corpus.resolve(data.corpus)]
    content = json.dumps([FORMAT, settings_of(data), sources], sort_keys=True)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Path(os.path.abspath(storage)) / "data" / fingerprint


def find_prepared(data: "Data", directory: Path) -> Manifest | None:
    """Return the finished dataset in `directory`; None if there is none.

    Raises:
        UserError: It was made with other settings or from another corpus, or a shard is missing.
    """
    if not (directory / FILE).exists():
        return None
    manifest = load_manifest(directory)
    differences = _differences(data, manifest)
    if differences:
        shown = "; ".join(differences[:SHOWN])
        if len(differences) > SHOWN:
            shown += f"; and {len(differences) - SHOWN} more"
        raise UserError(
            f"{directory} holds another dataset: {shown}. Set another data.dir, or delete this "
            "folder to prepare it anew"
        )
    for split in manifest.splits.values():
        for shard in split.shards:
            if not (directory / shard.name).is_file():
                raise UserError(
                    f"{directory}: {shard.name} is missing; delete the folder and prepare it again"
                )
    return manifest


def _differences(data: "Data", manifest: Manifest) -> list[str]:
    """Return one line for each difference between a dataset and the `data` section."""
    before = {f"data.{key}": value for key, value in manifest.settings.items()}
    now = {f"data.{key}": value for key, value in settings_of(data).items()}
    try:
        sources = corpus.resolve(data.corpus)
    except UserError:
        # The dataset may have been copied here without its corpus.
        if not _has_same_roots(data, manifest):
            raise
        sources = []
    else:
        before |= {f"size of {stored['name']}": stored["size"] for stored in manifest.sources}
        for source in sources:
            key = f"size of {source.name}"
            # None: a download that is not on this machine.
            now[key] = before.get(key) if source.size is None else source.size
    found = differences(before, dict.fromkeys(before) | now)
    if found or not sources:
        return found
    if [source.name for source in sources] != [stored["name"] for stored in manifest.sources]:
        return ["data.corpus has the same files in another order"]
    return _changed_content(sources, manifest)


def _has_same_roots(data: "Data", manifest: Manifest) -> bool:
    roots = {source["name"].split("/", 1)[0] for source in manifest.sources}
    return {corpus.root_name(entry) for entry in corpus.entries_of(data.corpus)} == roots


def _changed_content(sources: list[Source], manifest: Manifest) -> list[str]:
    """Return the files that were written after the dataset was made and have another content."""
    made = (manifest.directory / FILE).stat().st_mtime_ns
    found = []
    for source, stored in zip(sources, manifest.sources, strict=True):
        sha256 = source.sha256  # known for a download
        if sha256 is None and source.path.stat().st_mtime_ns >= made:
            sha256 = file_sha256(source.path)
        if sha256 not in (None, stored["sha256"]):
            found.append(f"{source.name} has changed since then")
    return found
