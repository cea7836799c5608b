"""safetensors files as reusable buffers in memory, for writing.

A checkpoint is copied into such buffers while training waits, and written from them in the
background. The buffers are allocated once and filled again for each checkpoint.

Several ranks write the tensors of a group in parts: each writes a slice of some tensors.

Layout of the file: length of the header (8 bytes, little-endian); the header (JSON: dtype, shape
and offsets of each tensor, padded with spaces); the tensors, contiguous. A slice is a tensor with
one dimension; the metadata of the file have its start, the shape of the whole tensor, and its name
if the slice has another one.
`tensor_read` reads such files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Tensor]"
TensorsOrSlices: TypeAlias = "Mapping[str, Tensor | Slice]"
Wanted: TypeAlias = Mapping[str, Sequence[range]]  # numbers of each flattened tensor

DTYPES = {
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
LENGTH_BYTES = 8  # length of the header
ALIGNMENT = 8  # bytes
METADATA = "__metadata__"


@dataclass(frozen=True)
class Slice:
    """Some consecutive numbers of a tensor.

    Attributes:
        numbers: The numbers, with one dimension.
        start: Index of the first one in the flattened tensor.
        shape: Shape of the tensor.
        tensor: Name of the tensor, if the slice has another one.
    """

    numbers: Tensor
    start: int
    shape: tuple[int, ...]
    tensor: str | None = None

    def place(self) -> tuple[int | tuple[int, ...] | str, ...]:
        """Return the entry of the slice in the metadata of a file."""
        named = () if self.tensor is None else (self.tensor,)
        return (self.start, self.shape, *named)


def own_share(tensors: TensorsOrSlices, rank: int, ranks: int) -> TensorsOrSlices:
    """Return what one rank writes.

    Tensors are the same on all ranks. They form one sequence of bytes, in the order of a file, and
    each rank writes as many of these bytes. Slices are held by this rank alone, so it writes them.
    """
    whole = {name: t for name, t in tensors.items() if not isinstance(t, Slice)}
    total = sum(tensor.nbytes for tensor in whole.values())
    borders = [total * place // ranks // ALIGNMENT * ALIGNMENT for place in range(ranks)]
    first, last = [*borders, total][rank : rank + 2]
    share: dict[str, Tensor | Slice] = {k: t for k, t in tensors.items() if k not in whole}
    for name in _in_order(whole):
        tensor = whole[name].detach()
        begin = max(first, 0) // tensor.element_size()
        end = min(last, tensor.nbytes) // tensor.element_size()
        if begin < end or (rank == 0 and tensor.numel() == 0):
            share[name] = Slice(tensor.reshape(-1)[begin:end], begin, tuple(tensor.shape))
        first -= tensor.nbytes
        last -= tensor.nbytes
    return share


def _in_order(tensors: Tensors) -> list[str]:
    """Return the names in the order of a file.

    Large elements come first, so that each tensor starts at a multiple of its element size.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


class TensorFile:
    """A safetensors file in memory. The memory is pinned if a tensor is on a GPU.

    Args:
        content: Tensors or slices of the shapes, dtypes and devices that `fill` will be given.

    Attributes:
        data: The bytes of the file, complete after `fill`.
    """

    def __init__(self, content: TensorsOrSlices) -> None:
        import torch

        self._layout = _layout(content)
        places = {
            name: json.dumps(item.place())
            for name, item in content.items()
            if isinstance(item, Slice)
        }
        tensors = _numbers(content)
        names = _in_order(tensors)
        header: dict[str, Any] = {METADATA: places} if places else {}
        end = 0
        for name in names:
            start = end
            end += tensors[name].nbytes
            header[name] = {
                "dtype": DTYPES[str(tensors[name].dtype)],
                "shape": list(tensors[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)

        first = LENGTH_BYTES + len(text)
        is_pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._buffer = torch.empty(first + end, dtype=torch.uint8, pin_memory=is_pinned)
        self.data = self._buffer.numpy().data
        self.data[:first] = len(text).to_bytes(LENGTH_BYTES, "little") + text
        self._views = {}
        for name in names:
            size = tensors[name].nbytes
            part = self._buffer[first : first + size]
            self._views[name] = part.view(tensors[name].dtype).view(tensors[name].shape)
            first += size

    def fits(self, content: TensorsOrSlices) -> bool:
        """Return whether `fill` can be called with this content."""
        return self._layout == _layout(content)

    def fill(self, content: TensorsOrSlices) -> None:
        """Start the copy. Synchronize a GPU before reading the bytes or changing the tensors."""
        tensors = _numbers(content)
        for name, view in self._views.items():
            view.copy_(tensors[name].detach(), non_blocking=True)


def _numbers(content: TensorsOrSlices) -> dict[str, Tensor]:
    return {
        name: item.numbers if isinstance(item, Slice) else item for name, item in content.items()
    }


def _layout(content: TensorsOrSlices) -> dict[str, tuple[Any, ...]]:
    layout: dict[str, tuple[Any, ...]] = {}
    for name, tensor in _numbers(content).items():
        item = content[name]
        place = item.place() if isinstance(item, Slice) else ()
        layout[name] = (tensor.dtype, tensor.shape, tensor.is_cuda, *place)
    return layout


def fill(
    files: Mapping[str, TensorFile], groups: Mapping[str, TensorsOrSlices]
) -> dict[str, TensorFile]:
    """Copy each group of tensors or slices into a file; return the complete files.

    Args:
        files: Files of an earlier call, used again where the layout is the same.
        groups: Content by name of the file and name of the tensor.
    """
    filled = {}
    devices = set()
    for name, content in groups.items():
        file = files.get(name)
        if file is None or not file.fits(content):
            file = TensorFile(content)
        file.fill(content)
        filled[name] = file
        devices |= {tensor.device for tensor in _numbers(content).values() if tensor.is_cuda}
    if devices:
        import torch
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return filled
