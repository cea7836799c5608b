"""Keys and values of earlier tokens, in buffers of fixed size, for sampling.

Shapes: B sequences, T tokens in this call, S tokens stored after it, H heads, D channels of a head.
"""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, in buffers of fixed size.

    Args:
        capacity: Largest number of tokens.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None  # keys and values, (B, H, capacity, D)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, each (B, H, T, D). Return all stored ones, each (B, H, S, D)."""
        if self._buffers is None:
            # Batch size, device and dtype (autocast may change it) are known only now.
            b, h, _, d = k.shape
            shape = (b, h, self.capacity, d)
            self._buffers = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self._buffers
        start = self.length
        end = start + k.size(2)
        assert end <= self.capacity, f"{end} tokens in a cache of {self.capacity}"
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        self.length = end
        return keys[:, :, :end], values[:, :, :end]
