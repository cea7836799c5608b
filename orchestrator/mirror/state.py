"""What a folder knows of its mirror, `.mirror.json` in it."""

from dataclasses import dataclass, field
from typing import Any

from orchestrator import files
from orchestrator.runs.folder import RunFolder


@dataclass
class State:
    """Content of .mirror.json.

    Attributes:
        folder: The folder.
        address: Address of its copy.
        ids: Id of the manifest that the copy has, "" for none, and of one that was perhaps written
            after it. If the copy has another one, another folder has written it.
        token: Token of the last holder of the lock that worked in this folder.
        inode: That of the folder. A copy of the folder has another one: the holder may then live.
        data: Names of the datasets that the mirror has.
        is_partial: The folder is being made from the copy.
        was_restored: The folder was made from the copy, or another folder wrote to the copy: MLflow
            may have values that this folder has not.
    """

    folder: RunFolder
    address: str
    ids: list[str] = field(default_factory=list)
    token: str | None = None
    inode: int = 0
    data: list[str] = field(default_factory=list)
    is_partial: bool = False
    was_restored: bool = False

    @classmethod
    def read(cls, folder: RunFolder, address: str) -> "State":
        """Read the state; that of another address counts as missing."""

        def parse(stored: dict[str, Any]) -> "State":
            return cls(folder, **stored)

        found = files.read_derived(folder.mirror_file, parse)
        return found if found is not None and found.address == address else cls(folder, address)

    @property
    def ended_token(self) -> str | None:
        """The token of a holder that has ended, for a process that has the lock of the folder."""
        is_same = self.folder.path.exists() and self.folder.path.stat().st_ino == self.inode
        return self.token if is_same else None

    def write(self) -> None:
        """Store the state, as durably as checkpoints: it says which of folder and copy is newer."""
        self.inode = self.folder.path.stat().st_ino
        content = {**vars(self)}
        del content["folder"]
        files.write_json(self.folder.mirror_file, content, durable=True)

    def expect(self, manifest_id: str) -> None:
        """Remember the id of a manifest that is going to be written."""
        self.ids = [*(self.ids[:1] or [""]), manifest_id]
        self.write()

    def confirm(self, manifest_id: str) -> None:
        """Remember that the copy has this manifest."""
        self.ids = [manifest_id]
        self.write()
