"""Writes a checkpoint with all ranks of a run: each writes and hashes its own files.

Rank 0 creates the temporary folder and tells its name; at the end it has the entries of all files,
looks for each of them, and writes the manifest. Until then there is no checkpoint. It also writes
the files of a rank that does not have the folder. The messages have a process group of their own,
because a thread sends them while training goes on.
"""

import errno
import functools
import json
import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
import torch.distributed as dist

from orchestrator.checkpoint import store
from orchestrator.checkpoint.format import FORMAT_IN_PARTS, Part, file_size
from orchestrator.cluster.layout import COLLECTIVE_TIMEOUT_S
from orchestrator.errors import UserError
from orchestrator.train.numerics import Worker, gather
from orchestrator.train.ranks.reading import BROADCAST_BYTES

Gather = Callable[[str], list[str]]  # returns the texts of all ranks


class _Written(TypedDict):
    """What a rank has done."""

    node: str
    parts: dict[str, Part]
    error: NotRequired[tuple[int, str]]  # `errno` and description
    sends: NotRequired[dict[str, int]]  # sizes of the files that rank 0 writes instead


def messages(worker: Worker) -> Gather:
    """Return a function that sends texts in another thread. All ranks must call this function."""
    group = None if worker.world_size == 1 else _group(dist.group.WORLD)
    return lambda text: gather(text, worker, group)


@functools.lru_cache(maxsize=1)  # all stages of a process use the group of its process group
def _group(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))


def lead(
    directory: Path,
    step: int,
    parts: store.Parts,
    facts: Mapping[str, Any],
    prepare: Callable[[], None],
    tell: Gather,
) -> None:
    """Write a checkpoint on rank 0, while the other ranks call `follow`.

    Args:
        directory: The run's `checkpoints/`.
        step: Number of updates done.
        parts: Content of the files of this rank.
        facts: Further fields of the manifest.
        prepare: Called before the first write.
        tell: Sends messages.

    Raises:
        OSError: As `store.commit` says, on any rank.
        UserError: Another rank writes to another folder.
    """
    try:
        prepare()
        # The tensors of the ranks are nearly of one size; only rank 0 has texts.
        sizes = {name: len(content) for name, content in parts.items()}
        tensors = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
        size = sum(sizes.values()) + tensors * (dist.get_world_size() - 1)
        temporary = store.begin(directory, step, size)
    except BaseException:
        skip(tell)
        raise
    with store.discarded_on_error(temporary):
        tell(temporary.name)
        written = [json.loads(text) for text in tell(json.dumps(_write(temporary, parts)))]
        for rank, found in enumerate(written):
            # Also after an error: the other rank sends.
            for name, size in sorted(found.get("sends", {}).items()):
                result = _write(temporary, {name: _received(rank, size)})
                found |= {**result, "parts": found["parts"] | result["parts"]}
        for rank, found in enumerate(written):
            _check(temporary, rank, found)
        entries = {name: entry for found in written for name, entry in found["parts"].items()}
        store.finish(temporary, step, dict(sorted(entries.items())), facts, FORMAT_IN_PARTS)


def skip(tell: Gather) -> None:
    """Tell the other ranks, which call `follow`, that this checkpoint is not written."""
    tell("")


def follow(directory: Path, parts: store.Parts, tell: Gather, has_folder: bool) -> None:
    """Write the files of a rank other than 0, or send them. Rank 0 raises the errors."""
    name = tell("")[0]
    if name and has_folder:
        tell(json.dumps(_write(directory / name, parts)))
    elif name:
        sizes = {part: len(content) for part, content in parts.items()}
        tell(json.dumps({"node": socket.gethostname(), "parts": {}, "sends": sizes}))
        for part in sorted(parts):
            for piece in _pieces(parts[part]):
                dist.send(piece, dst=0, group=_group(dist.group.WORLD))


def _received(rank: int, size: int) -> memoryview:
    """Return a file that a rank sends."""
    content = bytearray(size)
    for piece in _pieces(content):
        dist.recv(piece, src=rank, group=_group(dist.group.WORLD))
    return memoryview(content)


def _pieces(content: bytes | bytearray | memoryview) -> tuple[torch.Tensor, ...]:
    return torch.frombuffer(content, dtype=torch.uint8).split(BROADCAST_BYTES)


def _write(temporary: Path, parts: store.Parts) -> _Written:
    node = socket.gethostname()
    try:
        return {"node": node, "parts": store.write(temporary, parts)}
    except OSError as error:
        number = error.errno or errno.EIO
        return {"node": node, "parts": {}, "error": (number, os.strerror(number))}


def _check(temporary: Path, rank: int, written: _Written) -> None:
    """Raise the error of a rank, or one if its files are not in the folder of rank 0."""
    number, reason = written.get("error", (0, ""))
    if number and (rank == 0 or number != errno.ENOENT):
        place = "" if rank == 0 else f" (rank {rank} on {written['node']})"
        raise OSError(number, f"{reason}{place}", str(temporary.parent))
    is_here = all(
        file_size(temporary / name) == part["size"] for name, part in written["parts"].items()
    )
    if number or not is_here:
        raise UserError(
            f"{temporary.parent}: rank {rank} on {written['node']} does not write to the folder "
            f"that rank 0 on {socket.gethostname()} has at this path; mount the same storage "
            "there on all nodes"
        )
