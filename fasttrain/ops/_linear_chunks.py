"""The chunks in which `linear_cross_entropy` is computed: sizes, memory, products.

Per chunk a matrix product fills the workspace with logits, the row kernel of `cross_entropy` turns them into their own
gradient in place, and two more products consume it.

Legend: N rows (tokens), D hidden size, V classes (vocabulary), n rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..products import By, add_transposed_product, kernels_for, multiply, multiply_into
from ._gradient_filter import BLOCK_ROWS, add_filtered_products
from .cross_entropy import Terms

WORKSPACE_BYTES = {"cpu": 56 << 20, "cuda": 512 << 20}
"""What a chunk of logits may take: 64 MiB with the products' own; a GPU needs thousands of rows to be kept busy."""

MIN_ROWS = 128
"""Of a chunk, whatever they take: each chunk reads the whole weight, and writes its whole gradient."""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(num_rows: int, num_classes: int, element_size: int, device_type: str) -> int:
    """Equal chunks within the budget: a last chunk of few rows would read the weight for little."""
    most = max(MIN_ROWS, WORKSPACE_BYTES["cpu" if device_type == "cpu" else "cuda"] // (num_classes * element_size))
    if num_rows <= most:
        return max(num_rows, 1)
    equal = math.ceil(num_rows / math.ceil(num_rows / most))
    return min(most, math.ceil(equal / 16) * 16)  # whole tiles of a matrix product


def chunked(namespace: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor | None,
            compute: torch.dtype, needs: Any, terms: Terms, filter_eps: float | None = None) -> tuple[Tensor, ...]:
    """Losses (N,) and, given `scale` (0-d or (N,)), the gradients of sum(scale * losses) that `needs` asks for, and
    what the filter left out of them (N,)."""
    kernels, wide = getattr(torch.ops, namespace), at_least_float32(compute)
    num_rows, num_classes = hidden.size(0), weight.size(0)
    rows = _rows_with_target(targets, terms.ignore_index)  # None: all
    count, late_count = num_rows if rows is None else rows.numel(), None
    step = rows_per_chunk(count, num_classes, compute.itemsize, hidden.device.type)
    if filter_eps is not None:  # whole blocks
        step = max(step // BLOCK_ROWS, 1) * BLOCK_ROWS
    if _may_count_late(targets) and (count > step or filter_eps is not None):
        rows, late_count = targets_first(targets, terms.ignore_index), _count_late(targets, terms.ignore_index)
    multiplied = weight.to(compute)
    if 1 not in multiplied.stride() or 0 in multiplied.stride():
        multiplied = multiplied.contiguous()  # once, not in every product
    added = None if bias is None else bias.to(compute)
    workspace = _empty_matrix(namespace, min(step, max(count, 1)), num_classes, compute, hidden.device)
    by: By = kernels_for(workspace.size(0), multiplied) if namespace == "fasttrain" else "torch"
    losses = torch.zeros(num_rows, dtype=wide, device=hidden.device)
    skipped = losses.new_zeros(num_rows)
    grad_hidden, grad_weight, grad_bias = _empty_gradients(namespace, hidden, weight, wide, needs, rows is not None)
    if needs[1] and (count == 0 or filter_eps is not None):
        grad_weight.zero_()
    for begin in range(0, count, step):
        if begin == step and late_count is not None:  # the device is busy with the first chunk while the host waits
            count = late_count()
        if begin >= count:
            break
        at = slice(begin, min(begin + step, count)) if rows is None else rows[begin:min(begin + step, count)]
        h, y = hidden[at].to(compute), targets[at]  # (n, D), (n,)
        z = workspace[:y.size(0)]  # (n, V): logits, then their gradient
        multiply_into(by, z, h, multiplied.t(), added)
        if scale is None:
            losses[at] = kernels.cross_entropy_forward(z, y, *terms)[0]
            continue
        factor = scale if scale.dim() == 0 else scale[at]
        losses[at] = kernels.cross_entropy_fused_(z, y, factor, *terms)[0]
        if filter_eps is None:
            if needs[1]:
                add_transposed_product(by, grad_weight, z, h, first=begin == 0)
            part = multiply(by, z, multiplied) if needs[0] else None
        else:
            part, left_out = add_filtered_products(
                namespace, z, h, multiplied, factor, filter_eps, needs, grad_weight, by)
            skipped[at] = left_out.to(wide)
        if part is not None:
            grad_hidden[at] = part.to(grad_hidden.dtype)
        if needs[2]:
            grad_bias += z.sum(0, dtype=wide)
    grad_bias = grad_bias.to((weight if bias is None else bias).dtype)
    return losses, grad_hidden, grad_weight.to(weight.dtype), grad_bias, skipped


def losses_alone(namespace: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                 compute: torch.dtype, terms: Terms) -> Tensor:
    """Losses (N,) alone: of one kernel that writes no logits, or in chunks."""
    if hidden.device.type != "cpu" or namespace != "fasttrain":
        from ..kernels import linear_cross_entropy as kernels  # triton is imported by the first call that needs it

        if hidden.size(1) <= kernels.MAX_HIDDEN:
            order = targets_first(targets, terms.ignore_index)  # so that whole tiles have none, and are left out
            losses = kernels.linear_cross_entropy_forward(
                hidden.to(compute)[order], weight.to(compute), bias, targets[order], **terms._asdict())[0]
            return torch.empty_like(losses).index_copy_(0, order, losses)
    return chunked(namespace, hidden, weight, bias, targets, None, compute, [False] * 3, terms)[0]


def _rows_with_target(targets: Tensor, ignore_index: int) -> Tensor | None:
    if targets.device.type != "cpu":
        return None
    counted = targets != ignore_index
    return None if counted.all() else counted.nonzero().squeeze(1)


def targets_first(targets: Tensor, ignore_index: int) -> Tensor:
    """The numbers of all rows, those with a target first, both kinds in their order; nobody waits for a device."""
    return torch.sort((targets == ignore_index).to(torch.uint8), stable=True).indices


def _may_count_late(targets: Tensor) -> bool:
    return targets.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _count_late(targets: Tensor, ignore_index: int) -> Callable[[], int]:
    """How many rows have a target, to be asked for once the device has other work queued: the answer takes waiting."""
    with torch.cuda.device_of(targets):  # type: ignore[no-untyped-call]
        count = torch.empty((), dtype=torch.int64, pin_memory=True)
        count.copy_((targets != ignore_index).sum(), non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()  # type: ignore[no-untyped-call]

    def wait() -> int:
        arrived.synchronize()  # type: ignore[no-untyped-call]
        return int(count)

    return wait


def _empty_gradients(namespace: str, hidden: Tensor, weight: Tensor, wide: torch.dtype, needs: Any,
                     partial: bool) -> list[Tensor]:
    """The three gradients before their first chunk; those that nobody wants are empty."""
    (num_classes, size), device = weight.shape, weight.device
    grad_hidden = torch.zeros if partial else torch.empty
    grads = [grad_hidden(hidden.shape if needs[0] else 0, dtype=hidden.dtype, device=device)]
    if not needs[1]:
        grads.append(torch.empty(0, dtype=wide, device=device))
    elif is_transposed(weight):  # a gradient in the parameter's own layout is taken over without a copy
        grads.append(_empty_matrix(namespace, size, num_classes, wide, device).t())
    else:
        grads.append(_empty_matrix(namespace, num_classes, size, wide, device))
    return [*grads, torch.zeros(num_classes if needs[2] else 0, dtype=wide, device=device)]


def is_transposed(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.t().is_contiguous()


def _empty_matrix(namespace: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu" and namespace == "fasttrain":
        return torch.ops.fasttrain.empty_matrix(torch.empty(0, dtype=dtype), rows, columns)  # type: ignore[no-any-return]
    return torch.empty(rows, columns, dtype=dtype, device=device)


