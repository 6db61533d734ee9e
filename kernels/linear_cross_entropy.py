"""Triton kernels for the loss of a linear head without its logits, and for filtered gradients, and their launchers.

The loss: a program multiplies one tile of rows by one tile of classes and reduces it where it stands, in registers: per
row a maximum, a sum of exponentials and, with label smoothing, a sum. A second kernel combines a row's tiles. Each
number has one writer, so the result is the same on every run: no locks, no float atomics. Left out: whole gradients,
which need the logits twice more; there the chunks of `fasttrain.ops.linear_cross_entropy` are cheaper than multiplying
again.

Filtered gradients: one kernel finds which columns of each block of rows are alive, PyTorch packs their numbers, and the
two products gather what is alive and end where a count in device memory says so: the host never waits for it.

Legend: N rows, D hidden size, V classes, T tiles of classes, G blocks of rows; the rest as in `cross_entropy`.
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
                 num_rows, ignore_index, softcap, D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
                 CLASSES: tl.constexpr, DEPTH: tl.constexpr, SMOOTHED: tl.constexpr, SOFTCAPPED: tl.constexpr,
                 PRECISION: tl.constexpr, WIDENED: tl.constexpr):
    """One program per tile. Neighbours share the tile of the weight, so it is read from memory once.

    A tile of rows without a target ends at once.
    """
    NUM_TILES: tl.constexpr = (V + CLASSES - 1) // CLASSES
    row_tiles = tl.cdiv(num_rows, ROWS)
    tile = tl.program_id(0) // row_tiles
    rows = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    classes = tile * CLASSES + tl.arange(0, CLASSES)
    depth = tl.arange(0, DEPTH)
    row_inside, class_inside = rows < num_rows, classes < V
    y = tl.load(targets + rows, mask=row_inside, other=ignore_index)
    if tl.max((y != ignore_index).to(tl.int32), 0) == 0:
        return
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
            num_rows, ignore_index, softcap, D=size, V=num_classes, ROWS=tile.rows, CLASSES=tile.classes,
            DEPTH=tile.depth, SMOOTHED=smoothed, SOFTCAPPED=softcap != 0.0, PRECISION=_precision(), WIDENED=INTERPRETED,
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


# ---- filtered gradients: the rule stands in fasttrain/ops/_gradient_filter.py ----------------------------------------

LIVE_CLASSES, LIVE_WARPS = 64, 8
"""Classes that one program of `_live_kernel` looks at, in all rows of a block, and its warps."""

FILTERED = Tile(128, 64, 64, 8, tile_shape(2).num_stages)
"""Of the two products: rows of a block, live classes, hidden sizes at a time."""


@triton.jit
def _live_kernel(z, scales, live, row_live, dead_sums, all_sums, scale_stride, num_rows, eps, V: tl.constexpr,
                 ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """Grid (G, T). Which classes of a block of rows are alive, which rows, and what each row holds in dead classes."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    classes = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    row_inside, class_inside = rows < num_rows, classes < V
    inside = row_inside[:, None] & class_inside[None, :]
    x = tl.abs(tl.load(z + rows.to(tl.int64)[:, None] * V + classes[None, :], mask=inside, other=0.0).to(tl.float32))
    limit = eps * tl.abs(tl.load(scales + rows * scale_stride, mask=row_inside, other=0.0))
    alive = tl.where((x < limit[:, None]) | (x == 0.0), 0, 1)  # NaN is alive
    column = tl.max(alive, 0)
    tl.store(live + tl.program_id(0).to(tl.int64) * V + classes, column.to(tl.int8), mask=class_inside)
    any_alive = tl.max(alive, 1)
    tl.atomic_max(row_live + rows, any_alive, mask=row_inside & (any_alive > 0))
    at = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(dead_sums + at, tl.sum(tl.where(column[None, :] > 0, 0.0, x), 1), mask=row_inside)
    tl.store(all_sums + at, tl.sum(x, 1), mask=row_inside)


@triton.jit
def _filtered_hidden_kernel(z, weight, columns, counts, row_live, result, weight_stride, weight_depth_stride, num_rows,
                            D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
                            DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDENED: tl.constexpr):
    """Grid (G, tiles of D). z @ weight over the live classes of a block; dead rows are 0."""
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    depth = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    row_inside, depth_inside = rows < num_rows, depth < D
    count = tl.load(counts + block)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in range(0, count, CLASSES):
        at = start + tl.arange(0, CLASSES)
        ids = tl.load(columns + block.to(tl.int64) * V + at, mask=at < count, other=0)
        a = tl.load(z + rows.to(tl.int64)[:, None] * V + ids[None, :], mask=row_inside[:, None] & (at < count)[None, :],
                    other=0.0)
        b = tl.load(weight + ids.to(tl.int64)[:, None] * weight_stride + depth[None, :] * weight_depth_stride,
                    mask=(at < count)[:, None] & depth_inside[None, :], other=0.0)
        if WIDENED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    alive = tl.load(row_live + rows, mask=row_inside, other=0) > 0
    tl.store(result + rows.to(tl.int64)[:, None] * D + depth[None, :], tl.where(alive[:, None], total, 0.0),
             mask=row_inside[:, None] & depth_inside[None, :])


@triton.jit
def _filtered_weight_kernel(z, hidden, columns, counts, row_live, result, result_stride, result_depth_stride, block,
                            num_rows, D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
                            DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDENED: tl.constexpr):
    """Grid (tiles of V, tiles of D); those past the count end at once. result += z.T @ hidden over a block's live rows.

    One launch a block: in two of one launch, two programs could add to the same place.
    """
    count = tl.load(counts + block)
    start = tl.program_id(0) * CLASSES
    if start >= count:
        return
    rows = block * ROWS + tl.arange(0, ROWS)
    at, depth = start + tl.arange(0, CLASSES), tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    class_inside, depth_inside = at < count, depth < D
    row_inside = rows < num_rows
    alive = tl.load(row_live + rows, mask=row_inside, other=0) > 0
    ids = tl.load(columns + tl.cast(block, tl.int64) * V + at, mask=class_inside, other=0)
    a = tl.load(z + rows.to(tl.int64)[None, :] * V + ids[:, None], mask=class_inside[:, None] & alive[None, :],
                other=0.0)
    b = tl.load(hidden + rows.to(tl.int64)[:, None] * D + depth[None, :], mask=alive[:, None] & depth_inside[None, :],
                other=0.0)
    if WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    total = tl.dot(a, b, input_precision=PRECISION)
    to = result + ids.to(tl.int64)[:, None] * result_stride + depth[None, :] * result_depth_stride
    inside = class_inside[:, None] & depth_inside[None, :]
    tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)


def filtered_gradients(z: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, eps: float, block_rows: int,
                       with_hidden: bool, grad_weight: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(gradient of hidden (N, D) float32 or None, left out of each row (N,)); adds to `grad_weight` (V, D) float32.

    z (N, V), contiguous, is the gradient by the logits times `scale`, one float32 or (N,); hidden (N, D) and
    weight (V, D) have z's type. Blocks of `block_rows` rows. Written besides: 13 bytes per block and class, 8 per row
    and tile of classes.
    """
    _check_device(z)
    (num_rows, num_classes), size = z.shape, weight.size(1)
    num_blocks, num_tiles = triton.cdiv(num_rows, block_rows), triton.cdiv(num_classes, LIVE_CLASSES)
    live = torch.empty((num_blocks, num_classes), dtype=torch.int8, device=z.device)
    row_live = torch.zeros(num_rows, dtype=torch.int32, device=z.device)
    dead_sums, all_sums = (torch.empty((num_rows, num_tiles), device=z.device, dtype=torch.float32) for _ in range(2))
    hidden = hidden.contiguous()
    constants = {"V": num_classes, "ROWS": block_rows}
    products = constants | {"D": size, "CLASSES": FILTERED.classes, "DEPTH": FILTERED.depth, "PRECISION": _precision(),
                            "WIDENED": INTERPRETED, "num_warps": FILTERED.num_warps, "num_stages": FILTERED.num_stages}
    depth_tiles = triton.cdiv(size, FILTERED.depth)
    grad_hidden = torch.empty((num_rows, size), dtype=torch.float32, device=z.device) if with_hidden else None
    with torch.cuda.device_of(z):
        _live_kernel[(num_blocks, num_tiles)](
            z, scale, live, row_live, dead_sums, all_sums, scale.stride(0) if scale.dim() else 0, num_rows, eps,
            CLASSES=LIVE_CLASSES, **constants, num_warps=LIVE_WARPS)
        skipped = torch.where(row_live > 0, dead_sums.sum(1), all_sums.sum(1))
        columns, counts = _packed(live)
        if grad_hidden is not None:
            _filtered_hidden_kernel[(num_blocks, depth_tiles)](
                z, weight, columns, counts, row_live, grad_hidden, *weight.stride(), num_rows, **products)
        for block in range(num_blocks if grad_weight is not None else 0):
            _filtered_weight_kernel[(triton.cdiv(num_classes, FILTERED.classes), depth_tiles)](
                z, hidden, columns, counts, row_live, grad_weight, *grad_weight.stride(), block, num_rows, **products)
    return grad_hidden, skipped


def _packed(live: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the live columns of each block, first in its row of (G, V) int32, and how many they are (G,)."""
    num_blocks, num_classes = live.shape
    before = live.cumsum(1, dtype=torch.int32)
    counts = before[:, -1].contiguous()
    dead_after = torch.arange(num_classes, device=live.device, dtype=torch.int32) - before + counts[:, None]
    place = torch.where(live > 0, before - 1, dead_after)  # a permutation: every place has one writer
    columns = torch.empty((num_blocks, num_classes), dtype=torch.int32, device=live.device)
    ids = torch.arange(num_classes, device=live.device, dtype=torch.int32).expand_as(columns)
    return columns.scatter_(1, place.long(), ids), counts
