"""Reads a checkpoint with all ranks of a run: each reads and verifies some of its files.

So each byte is read from the storage once, also if no machine caches it. The ranks get the other
files from each other. A rank without the folder of the run gets all.
"""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.checkpoint import store
from orchestrator.checkpoint.format import (
    CheckpointManifest,
    named_manifest,
    read_parts,
    tensor_files,
    verify,
)
from orchestrator.checkpoint.tensor_file import Wanted
from orchestrator.checkpoint.tensor_read import assemble
from orchestrator.errors import DiskError, UnreadableError, UserError
from orchestrator.train.numerics import Worker, gather

BROADCAST_BYTES = 64 << 20
_AWAY = "away"  # instead of a manifest, from a rank without the folder


def read_together(path: Path, worker: Worker) -> "ReadTogether":
    """Read and verify a checkpoint. All ranks must call this function, and get the same errors.

    Raises:
        UnreadableError: A file cannot be read at the moment.
        UserError: The checkpoint is damaged, as rank 0 sees it.
        RuntimeError: Rank 0 can read the checkpoint, and another rank cannot.
    """

    def manifest_of_rank_0() -> str:
        if worker.is_main:
            return json.dumps(named_manifest(path))
        return "" if worker.has_folder else _AWAY

    def verify_on_rank_0() -> str:
        if worker.is_main:
            verify(path)
        return ""

    answers = _together(manifest_of_rank_0, worker)
    manifest: CheckpointManifest = json.loads(answers[0])
    readers = [rank for rank, answer in enumerate(answers) if answer != _AWAY]
    content = ReadTogether(path, manifest, worker, readers)
    try:
        _together(content.read_own, worker)
    except UnreadableError:
        raise
    except UserError as error:
        if worker.world_size > 1:
            _together(verify_on_rank_0, worker)
            raise RuntimeError(
                f"rank 0 could read this checkpoint, and another one cannot: {error}"
            ) from None
        raise
    return content


def _together(read: Callable[[], str], worker: Worker) -> list[str]:
    """Call `read` on each rank, and return the results of all. An error of one is raised on all."""
    if worker.world_size == 1:
        return [read()]
    kind, text = "", ""
    try:
        text = read()
    except UserError as error:
        known = (UnreadableError, DiskError)
        kind = next((k.__name__ for k in known if isinstance(error, k)), UserError.__name__)
        text = str(error) if worker.is_main else f"{error} ({_name(worker)})"
    found = [json.loads(line) for line in gather(json.dumps([kind, text]), worker)]
    # A file that may be valid is never called damaged.
    for error_class in (UnreadableError, DiskError, UserError):
        for kind, text in found:
            if kind == error_class.__name__:
                raise error_class(text)
    return [text for _, text in found]


def _name(worker: Worker) -> str:
    return f"rank {worker.rank} on {socket.gethostname()}"


class ReadTogether(store.Content):
    """A checkpoint of which each rank has read some files.

    All ranks must call the same methods in the same order. Each file is given once.

    Args:
        path: Folder of the checkpoint.
        manifest: Its manifest.
        worker: This process.
        ranks: The ranks that read.
    """

    def __init__(
        self, path: Path, manifest: CheckpointManifest, worker: Worker, ranks: list[int]
    ) -> None:
        super().__init__(path, manifest)
        self.worker = worker
        self.readers = self._deal(ranks)
        self._own: dict[str, bytearray] = {}

    def _deal(self, ranks: list[int]) -> dict[str, int]:
        """Return the rank that reads each file; these ranks read nearly as many bytes."""
        parts = self.manifest["parts"]
        loads = dict.fromkeys(ranks, 0)
        readers = {}
        for name in sorted(parts, key=lambda name: (-parts[name]["size"], name)):
            readers[name] = min(ranks, key=lambda rank: loads[rank])
            loads[readers[name]] += parts[name]["size"]
        return readers

    def read_own(self) -> str:
        """Read and verify the files of this rank."""
        parts = self.manifest["parts"]
        own = {n: part for n, part in parts.items() if self.readers[n] == self.worker.rank}
        self._own = read_parts(self.path, own)
        return ""

    def text(self, name: str) -> str:
        """As `Content` says."""
        return b"".join(piece.numpy().tobytes() for piece in self._receive(name)).decode()

    def tensors(
        self,
        group: str,
        device: str | torch.device = "cpu",
        wanted: Wanted | None = None,
    ) -> dict[str, Tensor]:
        """As `Content` says."""
        names = tensor_files(self.readers, group)
        # The tensors of a lone file are views of its bytes. A view of a piece would keep all of it,
        # also what was copied from it.
        is_on_cpu = torch.device(device).type == "cpu"
        is_view = wanted is None and len(names) == 1 and is_on_cpu
        files = (self._receive(name, in_one_piece=is_view) for name in names)
        return assemble(self.path, files, device, wanted, is_view)

    def _receive(self, name: str, in_one_piece: bool = False) -> Iterator[Tensor]:
        """Yield the bytes of a file, by default in pieces, on all ranks."""
        if name not in self.readers:
            raise UserError(f"{self.path / name}: missing; use another checkpoint")
        reader = self.readers[name]
        size = self.manifest["parts"][name]["size"]
        content = None
        if reader == self.worker.rank:
            content = torch.frombuffer(self._own.pop(name), dtype=torch.uint8)
        elif in_one_piece:
            content = torch.empty(size, dtype=torch.uint8)
        for first in range(0, size, BROADCAST_BYTES):
            count = min(BROADCAST_BYTES, size - first)
            if content is None:
                piece = torch.empty(count, dtype=torch.uint8)
            else:
                piece = content[first : first + count]
            if self.worker.world_size > 1:
                sent = piece.to(self.worker.device)
                dist.broadcast(sent, src=reader)
                piece.copy_(sent)
            if not in_one_piece:
                yield piece
        if in_one_piece and content is not None:
            yield content
