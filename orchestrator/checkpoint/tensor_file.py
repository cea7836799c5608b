"""A safetensors file as one buffer in memory: laid out once, filled again for every checkpoint.

Eats named tensors on any device; yields the bytes of their file. The format: the header's length (8 bytes, little-endian),
the header (JSON: dtype, shape and offsets of each tensor, padded with spaces), then the tensors, contiguous. With the file
laid out like this a checkpoint is one copy, and what is written and hashed while training goes on is plain memory.
"""

import json

import torch

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


class TensorFile:
    """`fill` copies tensors into the buffer; `data` is the file's bytes. Pinned where there is a tensor on a GPU."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        # Wide types first: then every tensor lies at a multiple of its element's size.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header, spans, end = {}, {}, 0
        for name in names:
            start, end = end, end + tensors[name].numel() * tensors[name].element_size()
            spans[name] = start, end
            header[name] = {
                "dtype": _DTYPES[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        first = _ALIGNMENT + len(text)
        self._shapes = _shapes(tensors)
        self._buffer = torch.empty(
            first + end, dtype=torch.uint8, pin_memory=any(t.is_cuda for t in tensors.values())
        )
        self.data = memoryview(self._buffer.numpy())
        self.data[:first] = len(text).to_bytes(_ALIGNMENT, "little") + text
        self._views = {
            name: self._buffer[first + start : first + end]
            .view(tensors[name].dtype)
            .view(tensors[name].shape)
            for name, (start, end) in spans.items()
        }

    def fits(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether the layout is that of `tensors`."""
        return self._shapes == _shapes(tensors)

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy; from a GPU the copies have only begun: synchronize before the bytes are read or the tensors changed."""
        for name, view in self._views.items():
            view.copy_(tensors[name].detach(), non_blocking=True)


def fill(
    files: dict[str, TensorFile], tensors: dict[str, dict[str, torch.Tensor]]
) -> dict[str, TensorFile]:
    """A filled file for each group of tensors, out of `files` where one fits; when it returns the bytes are there."""
    files = {
        name: file if (file := files.get(name)) and file.fits(group) else TensorFile(group)
        for name, group in tensors.items()
    }
    for name, group in tensors.items():
        files[name].fill(group)
    for device in {t.device for group in tensors.values() for t in group.values() if t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return files


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bool]]:
    return {name: (t.dtype, t.shape, t.is_cuda) for name, t in tensors.items()}
