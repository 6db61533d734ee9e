"""Gradient filtering: the two backward products of a linear head without the blocks that are too small to matter.

A trained model gives almost all of its probability to a few classes, so in almost every block of (rows x one class)
each |softmax - onehot| is tiny. Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009, section 4.3) leaves such
blocks out; here what was left out is also added up, which bounds the error.

The gradient of the losses by the logits, d (N, V), is cut into blocks of BLOCK_ROWS consecutive rows with a target. An
element is left out if its column is dead in its block (every |d| in it is below `eps`, or zero), or its row is (every
|d| of the row). Dense products of what is alive remain: no element's fate depends on the size of a chunk or on the
implementation.

Legend: N rows (tokens), D hidden size, V classes (vocabulary), n rows of a chunk, r and c live rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..products import By, multiply
from .cross_entropy import Terms, cross_entropy_reference

BLOCK_ROWS = 128
"""Of a block. Fewer leave less alive, but each block reads its live rows of the weight: a product of 128 rows is dense
enough for the reading not to matter."""

_SLICE_COLUMNS = 8192
"""Live columns multiplied at a time: what their copies take stays small whatever is alive."""


def filtered_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, terms: Terms,
                       eps: float) -> tuple[Tensor, Tensor]:
    """(losses (N,), skipped (N,)): no gradient flows to hidden and weight through the elements left out.

    The gradient of the bias is a sum and not a product: it is complete.
    """
    products = F.linear(hidden, weight)  # (N, V)
    with torch.no_grad():
        d = _gradient_by_logits(products if bias is None else products + bias, targets, terms)  # (N, V)
        alive = ~((d.abs() < eps) | (d == 0))  # NaN is alive
        counted = targets != terms.ignore_index
        block = ((counted.cumsum(0) - 1).clamp(min=0) // BLOCK_ROWS)  # (N,)
        columns = d.new_zeros(targets.size(0) // BLOCK_ROWS + 1, d.size(1)).index_add_(0, block, alive.to(d.dtype)) > 0
        kept = columns[block] & alive.any(1, keepdim=True)
        skipped = torch.where(kept, 0.0, d.abs()).sum(1)
    logits = torch.where(kept, products, products.detach())
    return cross_entropy_reference(logits if bias is None else logits + bias, targets, terms, "none"), skipped


def _gradient_by_logits(logits: Tensor, targets: Tensor, terms: Terms) -> Tensor:
    """d loss_i / d logit_ij (N, V); softmax - onehot with all terms off."""
    x = terms.softcap * torch.tanh(logits / terms.softcap) if terms.softcap else logits
    lse = torch.logsumexp(x, 1, keepdim=True)
    counted = targets != terms.ignore_index
    d = torch.exp(x - lse) * (1 + 2 * terms.z_loss * lse) - terms.label_smoothing / x.size(1)
    d.scatter_add_(1, torch.where(counted, targets, 0)[:, None], d.new_full(lse.shape, terms.label_smoothing - 1.0))
    if terms.softcap:
        d = d * (1 - (x / terms.softcap).square())
    return torch.where(counted[:, None], d, 0.0)


def add_filtered_products(namespace: str, z: Tensor, h: Tensor, weight: Tensor, scale: Tensor, eps: float, needs: Any,
                          grad_weight: Tensor, by: By) -> tuple[Tensor | None, Tensor]:
    """(gradient of h (n, D) or None, skipped (n,)); adds to `grad_weight` (V, D).

    z (n, V) is the gradient by the logits of a chunk, multiplied by `scale`: one value, or (n,).
    """
    if z.device.type != "cpu" or namespace != "fasttrain":
        from ..kernels import linear_cross_entropy as kernels  # triton is imported by the first call that needs it

        result: tuple[Tensor | None, Tensor] = kernels.filtered_gradients(
            z, h, weight, scale, eps, BLOCK_ROWS, needs[0], grad_weight if needs[1] else None)
        return result
    grad_h = torch.zeros_like(h) if needs[0] else None
    skipped = torch.empty(z.size(0), dtype=torch.float64)
    for begin in range(0, z.size(0), BLOCK_ROWS):
        at = slice(begin, begin + BLOCK_ROWS)
        factor = scale if scale.dim() == 0 else scale[at]
        rows, columns, skipped[at] = torch.ops.fasttrain.live_block(z[at], factor, eps)
        if rows.numel() == 0 or not (needs[0] or needs[1]):
            continue
        h_live = h[at].index_select(0, rows)  # (r, D)
        total = torch.zeros_like(h_live)
        for ids in columns.split(_SLICE_COLUMNS):
            part = torch.ops.fasttrain.take(z[at], rows, ids)  # (r, c)
            if needs[0]:
                total += multiply(by, part, weight.index_select(0, ids))
            if needs[1]:
                _add_rows(grad_weight, ids, multiply(by, part.t(), h_live))
        if grad_h is not None:
            grad_h[at].index_copy_(0, rows, total)
    return grad_h, skipped


def _add_rows(total: Tensor, ids: Tensor, part: Tensor) -> None:
    """total[ids] += part (c, D), in the total's type."""
    if total.is_contiguous() and total.dtype == part.dtype:
        torch.ops.fasttrain.add_rows_(total, ids, part)
    else:  # of a transposed weight, or a 16-bit product
        total.index_add_(0, ids, part.to(total.dtype))
