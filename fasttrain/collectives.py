"""Gathers, and sums of which each rank keeps its rows: with the fewest bytes that a backend can do them with.

gloo's reduce-scatter is an all-reduce of everything, twice the bytes: on CPUs each rank is sent its part of the others'
instead, and adds them up, in the order of the ranks. Left out: whole sums, which are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has new names for these two and warns of the old ones.
GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def scatter_sum(output: Tensor, whole: Tensor, group: Any) -> None:
    """`output` becomes this rank's n-th of the sum over n ranks of `whole`, both in host memory."""
    parts = torch.empty_like(whole)
    dist.all_to_all_single(parts, whole, group=group)
    torch.sum(parts.view(dist.get_world_size(group), -1), 0, out=output.view(-1))


def own_rows_of_sum(whole: Tensor, counts: Sequence[int], group: Any) -> Tensor:
    """This rank's rows of the sum over the ranks of `whole`.

    Args:
        whole: (sum of counts, D): the first rank's rows, then the second's, and so on.
        counts: how many rows are whose, the same on every rank; all equal on an accelerator.

    Returns:
        (counts[rank], D), in the type of `whole`.

    On the wire: what the other ranks own of `whole`, from each rank.
    """
    own = counts[dist.get_rank(group)]
    if not whole.is_cpu:
        rows = whole.new_empty((own, whole.size(1)))
        SCATTER(rows, whole, group=group)
        return rows
    parts = whole.new_empty((len(counts) * own, whole.size(1)))
    dist.all_to_all_single(parts, whole, [own] * len(counts), list(counts), group=group)
    return parts.view(len(counts), own, whole.size(1)).sum(0)
