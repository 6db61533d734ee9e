"""What can be done with a batch of any form (a tensor, or dicts and lists of tensors): move it, count it, divide it.

Rows are sequences: the first dimension of every tensor that has as many entries there as the batch's first tensor.
Deliberately left out: what a batch means (losses.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`, without waiting for the copy; containers keep their kind."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, dict) or hasattr(batch, "items"):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Every tensor in the batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping) or hasattr(batch, "values"):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors_of(value)


def most_elements(batch: Any) -> int:
    """Elements of the batch's largest tensor: no loss has more targets than that."""
    if isinstance(batch, Tensor):
        return batch.numel()
    return max((tensor.numel() for tensor in tensors_of(batch)), default=0)


def num_rows(batch: Any) -> int:
    """Sequences in the batch; 0 where no tensor has a dimension."""
    return next((tensor.size(0) for tensor in tensors_of(batch) if tensor.dim()), 0)


def split_rows(batch: Any, parts: int) -> list[Any]:
    """The batch in `parts` batches of nearly equal numbers of rows (in as many as it has rows, if that is fewer)."""
    rows = num_rows(batch)
    parts = max(1, min(parts, rows))
    if parts == 1:
        return [batch]
    bounds = [rows * index // parts for index in range(parts + 1)]
    return [_take(batch, start, end, rows) for start, end in itertools.pairwise(bounds)]


def _take(batch: Any, start: int, end: int, rows: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:end] if batch.dim() and batch.size(0) == rows else batch
    if isinstance(batch, Mapping) or hasattr(batch, "items"):
        return {key: _take(value, start, end, rows) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_take(value, start, end, rows) for value in batch]
    return batch
