"""The key/value cache that decoding writes in place: static, with rows that leave or branch and a way back.

One tensor for keys and one for values, reserved once. A cache that grows by concatenation copies everything it holds
for every new token; one that attends over its whole capacity multiplies by zeros. This one does neither.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the positions seen so far.

    `length` positions are filled. A row of a left-padded batch starts with `num_pads[row]` positions that hold padding:
    they are never attended to and do not count as positions. Shapes: L layers, B rows, K key/value heads, E head size.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], *, device: torch.device, dtype: torch.dtype) -> None:
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (L, B, K, capacity, E)
        self.values = torch.empty(shape, device=device, dtype=dtype)  # (L, B, K, capacity, E)
        self.num_pads: Tensor | None = None  # (B,) int64; None: no row is padded
        self.length = 0

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, K, T, E) after the filled part of one layer; returns views of old and new, (B, K, length + T, E).

        The caller advances `length` once all layers have written.
        """
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def rewind(self, length: int) -> None:
        """Forgets every position from `length` on; the memory stays."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length is {length}; it must lie in [0, {self.length}], the filled part of the cache")
        self.length = length

    def select_rows(self, rows: Tensor) -> None:
        """The rows are now these ((n,) int64), in that order. Rows may leave, and a row may be taken several times."""
        n, filled = rows.shape[0], self.length
        grown = n > self.batch
        for name in ("keys", "values"):
            buffer = getattr(self, name)
            taken = buffer.new_empty(buffer.shape[0], n, *buffer.shape[2:]) if grown else buffer[:, :n]
            for old, new in zip(buffer[..., :filled, :].unbind(0), taken[..., :filled, :].unbind(0)):
                new.copy_(old[rows])  # layer by layer: the copy in between is 1/L of all
            setattr(self, name, taken)
        if self.num_pads is not None:
            self.num_pads = self.num_pads[rows]
