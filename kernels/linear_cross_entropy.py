"""Triton kernels for the loss of a linear head whose logits are never written, and the function that launches them.

A program multiplies one tile of rows by one tile of classes and reduces it where it stands, in registers: per row a
maximum, a sum of exponentials and, with label smoothing, a sum. A second kernel combines a row's tiles. Each number has
one writer, so the result is the same on every run: no locks, no float atomics. Left out: gradients, which need the
logits twice more; there the chunks of `fasttrain.ops.linear_cross_entropy` are cheaper than multiplying again.

Legend: N rows, D hidden size, V classes, T tiles of classes; the rest as in `cross_entropy`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cross_entropy import INTERPRETED, LOG2E, LOWEST, _check_device, _finish, _softcapped

MAX_HIDDEN = 1024
"""Up to here the launcher is worth its while: a model, not a measurement. On an H100, a 16-bit logit written and
read again costs 1.2 ps; a product of Triton's at 500 instead of a vendor's at 700 TFLOP/s costs D * 0.00114 ps more."""


class Tile(NamedTuple):
    """What a program multiplies: `rows` x `classes`, in steps of `depth`."""

    rows: int
    classes: int
    depth: int
    num_warps: int
    num_stages: int


def tile_shape(element_size: int) -> Tile:
    """The largest tile whose sums (rows x classes float32) leave a thread half of its registers."""
    num_stages = 2 if torch.version.hip else 3
    return Tile(128, 128, 64, 8, num_stages) if element_size == 2 else Tile(64, 64, 32, 4, num_stages)


@triton.jit
def _tile_kernel(hidden, weight, bias, targets, maxima, totals, sums, target_logits, hidden_stride, weight_stride,
                 num_rows, softcap, D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
                 DEPTH: tl.constexpr, SMOOTHED: tl.constexpr, SOFTCAPPED: tl.constexpr, PRECISION: tl.constexpr,
                 WIDENED: tl.constexpr):
    """One program per tile. Neighbours share the tile of the weight, so it is read from memory once."""
    NUM_TILES: tl.constexpr = (V + CLASSES - 1) // CLASSES
    row_tiles = tl.cdiv(num_rows, ROWS)
    tile = tl.program_id(0) // row_tiles
    rows = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    classes = tile * CLASSES + tl.arange(0, CLASSES)
    depth = tl.arange(0, DEPTH)
    row_inside, class_inside = rows < num_rows, classes < V
    hidden_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
    weight_at = weight + classes.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    x = tl.zeros([ROWS, CLASSES], tl.float32)
    for start in tl.range(0, D, DEPTH):
        h = tl.load(hidden_at + start, mask=row_inside[:, None] & (depth[None, :] < D - start), other=0.0)
        w = tl.load(weight_at + start, mask=class_inside[None, :] & (depth[:, None] < D - start), other=0.0)
        if WIDENED:  # the interpreter multiplies the bit patterns of bfloat16
            h, w = h.to(tl.float32), w.to(tl.float32)
        x = tl.dot(h, w, x, input_precision=PRECISION)
    if bias is not None:
        x += tl.load(bias + classes, mask=class_inside, other=0.0).to(tl.float32)[None, :]
    if SOFTCAPPED:
        x = _softcapped(x, softcap)
    y = tl.load(targets + rows, mask=row_inside, other=-1)
    partial_at = rows.to(tl.int64) * NUM_TILES + tile
    if SMOOTHED:
        tl.store(sums + partial_at, tl.sum(tl.where(class_inside[None, :], x, 0.0), 1), mask=row_inside)
    is_target = classes.to(tl.int64)[None, :] == y[:, None]
    x_y = tl.sum(tl.where(is_target, x, 0.0), 1)
    is_here = (y >= tile * CLASSES) & (y < tl.minimum(tile * CLASSES + CLASSES, V))
    tl.store(target_logits + rows, x_y, mask=row_inside & is_here)
    x = tl.where(class_inside[None, :], x, float("-inf"))
    m = tl.max(x, 1)
    # Masked logits may fill a tile: -inf - -inf would be NaN.
    total = tl.sum(tl.exp2((x - tl.maximum(m, LOWEST)[:, None]) * LOG2E), 1)
    tl.store(maxima + partial_at, m, mask=row_inside)
    tl.store(totals + partial_at, total, mask=row_inside)


@triton.jit
def _combine_kernel(targets, maxima, totals, sums, target_logits, losses, lses, ignore_index, label_smoothing, z_loss,
                    V: tl.constexpr, NUM_TILES: tl.constexpr, BLOCK: tl.constexpr, SMOOTHED: tl.constexpr,
                    Z_LOSS: tl.constexpr):
    """One program per row: its tiles' maxima and sums into its loss."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row)
    if y == ignore_index:
        tl.store(losses + row, 0.0)
        tl.store(lses + row, 0.0)
        return
    tiles = tl.arange(0, BLOCK)
    inside = tiles < NUM_TILES
    m = tl.load(maxima + row * NUM_TILES + tiles, mask=inside, other=float("-inf"))
    total = tl.load(totals + row * NUM_TILES + tiles, mask=inside, other=0.0)
    sum_x = tl.zeros([BLOCK], tl.float32)
    if SMOOTHED:
        sum_x = tl.load(sums + row * NUM_TILES + tiles, mask=inside, other=0.0)
    in_range = (y >= 0) & (y < V)
    x_y = tl.where(in_range, tl.load(target_logits + row, mask=in_range, other=0.0), float("nan"))
    m, total, lse, loss = _finish(m, total, sum_x, x_y, label_smoothing, z_loss, V, SMOOTHED, Z_LOSS)
    tl.store(losses + row, loss)
    tl.store(lses + row, lse)


def linear_cross_entropy_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *,
                                 ignore_index: int, label_smoothing: float, z_loss: float,
                                 softcap: float) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps, (N,) float32, of the logits hidden (N, D) @ weight (V, D).T + bias (V,), never written.

    hidden and weight have one type, float32, bfloat16 or float16; sums are float32. Float32 products use TF32 only
    where torch.set_float32_matmul_precision allows it. Written besides the results: 8 bytes (12 with label smoothing)
    per row and tile of classes, 3 % (5 %) of 16-bit logits.
    """
    _check_device(hidden)
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; the Triton kernel takes one type for "
                         "both: float32, bfloat16 or float16")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}; the Triton kernels take int64")
    hidden, weight, targets = _with_contiguous_rows(hidden), _with_contiguous_rows(weight), targets.contiguous()
    (num_rows, size), num_classes = hidden.shape, weight.size(0)
    tile = tile_shape(hidden.element_size())
    num_tiles = triton.cdiv(num_classes, tile.classes)
    losses = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(losses)
    if num_rows == 0:
        return losses, lse
    smoothed = label_smoothing != 0.0
    maxima = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=hidden.device)
    totals, target_logits = torch.empty_like(maxima), torch.empty_like(losses)
    sums = torch.empty_like(maxima) if smoothed else None
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(hidden):
        _tile_kernel[(triton.cdiv(num_rows, tile.rows) * num_tiles,)](
            hidden, weight, bias, targets, maxima, totals, sums, target_logits, hidden.stride(0), weight.stride(0),
            num_rows, softcap, D=size, V=num_classes, ROWS=tile.rows, CLASSES=tile.classes, DEPTH=tile.depth,
            SMOOTHED=smoothed, SOFTCAPPED=softcap != 0.0, PRECISION=_precision(), WIDENED=INTERPRETED,
            num_warps=tile.num_warps, num_stages=tile.num_stages)
        _combine_kernel[(num_rows,)](
            targets, maxima, totals, sums, target_logits, losses, lse, ignore_index, label_smoothing, z_loss,
            V=num_classes, NUM_TILES=num_tiles, BLOCK=triton.next_power_of_2(num_tiles), SMOOTHED=smoothed,
            Z_LOSS=z_loss != 0.0, num_warps=4)
    return losses, lse


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.size(1) == 1 else matrix.contiguous()
