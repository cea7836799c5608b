"""Copies a dataset to a mirror."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator import files
from orchestrator.mirror import manifest
from orchestrator.mirror.manifest import Manifest, Part, object_name
from orchestrator.objects.address import Address
from orchestrator.objects.store import ChangedObjectError, Store


def upload_dataset(
    store: Store, address: Address, folder: Path, after_part: Callable[[], object] = lambda: None
) -> None:
    """Copy a finished dataset, whose files never change, unless the copy is complete.

    Args:
        store: The store.
        address: Address of the copy.
        folder: Folder of the dataset.
        after_part: Called after each part.
    """
    if manifest.read(store, address) is not None:
        return
    content = Manifest()
    for path in sorted(folder.iterdir()):
        if not manifest.is_file_path(path.name) or not files.is_plain(path):
            continue
        with open(path, "rb", opener=files.opener) as file:
            parts = []
            for part, data in read_parts(file.fileno(), 0):
                key = (address / object_name(path.name, part)).key
                if store.size(key) != part.size:  # else a killed process has sent it
                    store.put(key, data, part.sha256)
                parts.append(part)
                after_part()
        content.files[path.name] = tuple(parts)
    with contextlib.suppress(ChangedObjectError):  # another run has copied it
        store.put_if((address / manifest.NAME).key, content.to_bytes(), None)


def read_parts(descriptor: int, start: int) -> Iterator[tuple[Part, bytes]]:
    """Yield the parts of an open file from a byte on. An empty file has no part.

    Ends where the file ends now: a journal may grow faster than its parts are sent.
    """
    end = os.fstat(descriptor).st_size
    while data := os.pread(descriptor, min(manifest.PART_BYTES, max(0, end - start)), start):
        yield Part(len(data), hashlib.sha256(data).hexdigest()), data
        start += len(data)
