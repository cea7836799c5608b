"""Reads the safetensors files of checkpoints back into tensors, and hashes weights.

Drivers read the final weights with this module, so torch is imported only when it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors

from orchestrator.checkpoint.format import read_manifest, reading, tensor_files
from orchestrator.checkpoint.tensor_file import (
    DTYPES,
    LENGTH_BYTES,
    METADATA,
    Slice,
    Tensors,
    Wanted,
)
from orchestrator.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def load_tensors(
    path: Path,
    name: str,
    device: str | torch.device = "cpu",
    wanted: Wanted | None = None,
) -> dict[str, Tensor]:
    """Load the tensors of a group, such as "model", from a verified checkpoint of any format.

    Args:
        path: The checkpoint.
        name: The group.
        device: Device of the tensors.
        wanted: As for `assemble`.
    """
    import torch

    def load() -> dict[str, Tensor]:
        names = tensor_files(read_manifest(path)["parts"], name)
        files = ([torch.from_numpy(np.memmap(path / name, np.uint8, "c"))] for name in names)
        return assemble(path, files, device, wanted)

    return reading(path, load)


def assemble(
    path: Path,
    files: Iterable[Iterable[Tensor]],
    device: str | torch.device,
    wanted: Wanted | None = None,
    is_view: bool = True,
) -> dict[str, Tensor]:
    """Return the tensors whose slices are in some files.

    Args:
        path: The checkpoint.
        files: Bytes of the files in pieces. Each piece is taken after the one before was used.
        device: Device of the tensors.
        wanted: Numbers to copy of each tensor, as ranges, which are returned one after another in
            one dimension. None: all numbers of all tensors.
        is_view: A tensor in one piece of a file is a view of it, if `wanted` is None and the device
            is the CPU.

    Raises:
        UserError: Numbers are missing.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for name, part in itertools.chain.from_iterable(map(_slices, files)):
        count = part.numbers.numel()
        if wanted is None and count == math.prod(part.shape):
            tensors[name] = part.numbers.view(part.shape).to(device, copy=not is_view)
            continue
        ranges = [range(math.prod(part.shape))] if wanted is None else wanted.get(name, [])
        size = sum(map(len, ranges))
        if name not in tensors and size:
            shape = part.shape if wanted is None else (size,)
            tensors[name] = torch.empty(shape, dtype=part.numbers.dtype, device=device)
            missing[name] = size
        done = 0  # numbers of the ranges before
        for numbers in ranges:
            first = max(part.start, numbers.start)
            last = min(part.start + count, numbers.stop)
            if first < last:
                begin = done + first - numbers.start
                found = part.numbers[first - part.start : last - part.start]
                tensors[name].view(-1)[begin : begin + last - first] = found
                missing[name] -= last - first
            done += len(numbers)
    if any(missing.values()):
        name = max(missing, key=missing.__getitem__)
        raise UserError(f"{path}: a part of {name} is missing; use another checkpoint")
    return tensors


def _slices(pieces: Iterable[Tensor]) -> Iterator[tuple[str, Slice]]:
    """Yield the tensors of a file as slices, which are views of its pieces.

    The header is in the first piece. The sizes of the pieces are multiples of
    `tensor_file.ALIGNMENT`.
    """
    import torch

    dtypes = {short: getattr(torch, name.removeprefix("torch.")) for name, short in DTYPES.items()}
    offset = 0
    for piece in pieces:
        if offset == 0:
            first = LENGTH_BYTES + int.from_bytes(piece[:LENGTH_BYTES].numpy().tobytes(), "little")
            header = json.loads(piece[LENGTH_BYTES:first].numpy().tobytes())
            places = header.pop(METADATA, {})
        for name, entry in header.items():
            start, stop = (first + place for place in entry["data_offsets"])
            begin = max(start, offset)
            end = min(stop, offset + len(piece))
            if start == stop and offset == 0:  # no numbers: with the first piece
                begin = end = 0
            elif begin >= end:
                continue
            numbers = piece[begin - offset : end - offset].view(dtypes[entry["dtype"]])
            place, shape, *other = (
                json.loads(places[name]) if name in places else (0, entry["shape"])
            )
            place += max(begin - start, 0) // numbers.element_size()
            yield other[0] if other else name, Slice(numbers, place, tuple(shape))
        offset += len(piece)


def weights_sha256(weights: Tensors) -> str:
    """Return the SHA-256 of the sorted names and the float32 bytes of a model's weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def stored_weights_sha256(path: Path) -> str:
    """Return `weights_sha256` of a verified checkpoint, whose weights are float32."""
    names = tensor_files(read_manifest(path)["parts"], "model")
    return reading(path, lambda: _stored_weights_sha256([path / name for name in names]))


def _stored_weights_sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    slices = []
    with contextlib.ExitStack() as opened:
        for path in paths:
            file = opened.enter_context(safetensors.safe_open(path, framework="numpy"))
            places = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                start = json.loads(places[name])[0] if name in places else 0
                slices.append((name, start, file))
        for name, start, file in sorted(slices, key=lambda item: item[:2]):
            if start == 0:
                digest.update(name.encode())
            digest.update(np.ascontiguousarray(file.get_tensor(name), dtype=np.float32).data)
    return digest.hexdigest()
