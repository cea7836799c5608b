"""The manifest of a mirrored folder: which objects its files are made of.

A file is one or more parts. The object of a part has the name of the file and the SHA-256 of the
part, so it is written once and never changes. What grows, such as a journal, gets new parts.
"""

import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from orchestrator.errors import UserError
from orchestrator.objects.address import CONTROL, Address, is_plain_key
from orchestrator.objects.store import MissingObjectError, Store
from orchestrator.runs.folder import RunFolder

NAME = "mirror.json"
HIDDEN = RunFolder("").checkpointed_file.name  # the only hidden file that is copied
FORMAT = 1
MOST_SMALL = 32  # small parts of a file that grows, before they become one
PART_BYTES = 32 << 20  # of one object: what a broken connection costs


class DamagedCopyError(UserError):
    """An object differs from the manifest, or the manifest cannot be read."""


class Part(NamedTuple):
    """A piece of a file."""

    size: int
    sha256: str


Files = dict[str, tuple[Part, ...]]  # by the path in the folder


@dataclass
class Manifest:
    """Content of mirror.json.

    Attributes:
        files: The parts of each file.
        links: Target of each symlink, by its path.
        key: Key of the run in run.json; empty for a dataset.
        data: Names of the datasets, which are folders of `<mirror>/data/`.
        id: Different in each version.
    """

    files: Files = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    key: str = ""
    data: list[str] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def has_content_of(self, other: "Manifest") -> bool:
        """Return whether both are the same but for their ids."""
        return asdict(self) | {"id": ""} == asdict(other) | {"id": ""}

    def objects(self) -> set[str]:
        """Return the names of all objects, below the folder's address."""
        return {object_name(path, part) for path, parts in self.files.items() for part in parts}

    def below(self, folder: str) -> Iterator[str]:
        """Yield the paths of the files in a folder, "" for all."""
        return (path for path in self.files if not folder or path.startswith(f"{folder}/"))

    def resolved(self, path: str) -> str:
        """Return a path in the folder without the symlinks on its way."""
        done = ""
        for part in path.split("/") if path else []:
            done = os.path.normpath(os.path.join(done, part))
            if done in self.links:
                done = os.path.normpath(os.path.join(os.path.dirname(done), self.links[done]))
        return done

    def check_paths(self) -> None:
        """Raise ValueError if a path or a link is not one of a folder that was copied."""
        paths = [*self.files, *self.links]
        if not all(map(is_plain_key, [*paths, *self.data])):
            raise ValueError("a path leads out of the folder")
        taken = set(paths)
        for path in paths:
            parents = map(str, PurePosixPath(path).parents)
            if path in self.files and not is_file_path(path):
                raise ValueError(f"{path}: is a hidden file")
            if not taken.isdisjoint(parents) or (path in self.files and path in self.links):
                raise ValueError(f"{path}: is also a folder or a link")
        for path, target in self.links.items():
            if not is_link(path, target):
                raise ValueError(f"{path}: a link leads out of the folder")
            self._check_end(path)

    def _check_end(self, path: str) -> None:
        """Raise ValueError if a link leads to itself."""
        followed = path
        for _ in range(len(self.links) + 1):
            if self.links.keys().isdisjoint([followed, *map(str, PurePosixPath(followed).parents)]):
                return
            followed = self.resolved(followed)
        raise ValueError(f"{path}: a link leads to itself")

    def to_bytes(self) -> bytes:
        """Return mirror.json, which contains its own SHA-256."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({**content, "sha256": _sha256(content)}).encode()


def is_file_path(path: str) -> bool:
    """Return whether a copy can have a file at a path."""
    hidden = [part for part in path.split("/") if part.startswith(".")]
    return is_plain_key(path) and hidden in ([], [HIDDEN])


def is_link(path: str, target: str) -> bool:
    """Return whether a copy can have a link at a path."""
    is_text = not CONTROL.search(target)
    return is_text and is_plain_key(path) and is_inside(Path("/x"), f"/x/{path}", target)


def is_inside(folder: Path, path: str, target: str) -> bool:
    """Return whether a link at `path` to a relative `target` leads to a place in the folder.

    After a name, `..` is refused: the name may be of another link.
    """
    after_name = itertools.dropwhile(lambda part: part == "..", Path(target).parts)
    if os.path.isabs(target) or ".." in after_name:
        return False
    place = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return place.startswith(f"{os.path.normpath(folder)}/")


def object_name(path: str, part: Part) -> str:
    """Return the name of the object of a part, below the folder's address."""
    return f"{path}@{part.sha256[:32]}"


def without_small_ones(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Return the parts to keep. If too many are small, the first small one and later ones go."""
    small = [i for i, part in enumerate(parts) if part.size < PART_BYTES]
    return parts[: small[0]] if len(small) > MOST_SMALL else parts


def parse(data: bytes, address: Address) -> Manifest:
    """Return the content of mirror.json.

    Raises:
        DamagedCopyError: It is damaged, or of another format.
    """
    try:
        content = json.loads(data)
        if content.pop("sha256") != _sha256(content) or content.pop("format") != FORMAT:
            raise ValueError("changed, or another format")
        files = {
            path: tuple(Part(int(size), str(sha256)) for size, sha256 in parts)
            for path, parts in content.pop("files").items()
        }
        found = Manifest(files, **content)
        found.check_paths()
        return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCopyError(
            f"{address}/{NAME}: cannot be read ({error}); restore an earlier version of it, or use "
            "another mirror"
        ) from None


def read(store: Store, address: Address) -> tuple[Manifest, str] | None:
    """Return the manifest of a mirrored folder and its version; None if there is none."""
    try:
        found = store.get((address / NAME).key)
    except MissingObjectError:
        return None
    return parse(found.data, address), found.version


def _sha256(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
