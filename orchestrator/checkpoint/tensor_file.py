"""safetensors files: as one reusable buffer in memory for writing, and read back into tensors.

A checkpoint is copied into such buffers while training waits, and written from them in the
background. The buffers are allocated once and filled again for each checkpoint.

Layout of the file: length of the header (8 bytes, little-endian); the header (JSON: dtype, shape
and offsets of each tensor, padded with spaces); the tensors, contiguous.

Drivers read the final weights with this module, so torch is imported only when it is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import safetensors

from orchestrator.checkpoint.format import reading

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Tensor]"

_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
_LENGTH_BYTES = 8  # length of the header
_ALIGNMENT = 8  # bytes


class TensorFile:
    """A safetensors file in memory. The memory is pinned if a tensor is on a GPU.

    Args:
        tensors: Tensors of the shapes, dtypes and devices that `fill` will be given.

    Attributes:
        data: The bytes of the file, complete after `fill`.
    """

    def __init__(self, tensors: Tensors) -> None:
        import torch

        self._layout = _layout(tensors)
        # Large elements first, so that each tensor starts at a multiple of its element size.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header = {}
        end = 0
        for name in names:
            start = end
            end += tensors[name].nbytes
            header[name] = {
                "dtype": _DTYPES[str(tensors[name].dtype)],
                "shape": list(tensors[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)

        first = _LENGTH_BYTES + len(text)
        is_pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._buffer = torch.empty(first + end, dtype=torch.uint8, pin_memory=is_pinned)
        self.data = self._buffer.numpy().data
        self.data[:first] = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        self._views = {}
        for name in names:
            size = tensors[name].nbytes
            part = self._buffer[first : first + size]
            self._views[name] = part.view(tensors[name].dtype).view(tensors[name].shape)
            first += size

    def fits(self, tensors: Tensors) -> bool:
        """Return whether `fill` can be called with these tensors."""
        return self._layout == _layout(tensors)

    def fill(self, tensors: Tensors) -> None:
        """Start the copy. Synchronize a GPU before reading the bytes or changing the tensors."""
        for name, view in self._views.items():
            view.copy_(tensors[name].detach(), non_blocking=True)


def _layout(tensors: Tensors) -> dict[str, tuple[torch.dtype, torch.Size, bool]]:
    return {name: (tensor.dtype, tensor.shape, tensor.is_cuda) for name, tensor in tensors.items()}


def fill(files: Mapping[str, TensorFile], groups: Mapping[str, Tensors]) -> dict[str, TensorFile]:
    """Copy each group of tensors into a file, and return the files when the copies are complete.

    Args:
        files: Files of an earlier call, used again where the layout is the same.
        groups: Tensors by name of the file and name of the tensor.
    """
    filled = {}
    devices = set()
    for name, tensors in groups.items():
        file = files.get(name)
        if file is None or not file.fits(tensors):
            file = TensorFile(tensors)
        file.fill(tensors)
        filled[name] = file
        devices |= {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    if devices:
        import torch
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return filled


def load_tensors(path: Path, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Load `<name>.safetensors` of a verified checkpoint."""
    from safetensors.torch import load_file

    file = path / f"{name}.safetensors"
    return reading(path, lambda: load_file(file, device=str(device)))


def weights_sha256(weights: Tensors) -> str:
    """Return the SHA-256 of the sorted names and the float32 bytes of a model's weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def stored_weights_sha256(path: Path) -> str:
    """Return `weights_sha256` of a verified checkpoint, whose weights are float32."""
    return reading(path, lambda: _stored_weights_sha256(path / "model.safetensors"))


def _stored_weights_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with safetensors.safe_open(file, framework="numpy") as weights:
        for name in sorted(weights.keys()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(weights.get_tensor(name), dtype=np.float32).data)
    return digest.hexdigest()
