"""Triton kernels for cross-entropy from logits, and the functions that launch them.

A row of logits that fits in the registers of one program is loaded once: maximum, sum and gradient are formed from
what was loaded, so loss and gradient together cost one read and one write of the N x V matrix. A longer row is
reduced in one streaming pass and read a second time for the gradient, last block first, while the cache still holds
it. Launch shapes are a pure function of the row: nothing is tuned on the machine. Class weights are left out.

Legend: N rows, V classes, x a (softcapped) logit, m the maximum of a row or group, total its sum of exp(x - m), lse the
log-sum-exp, y the target, ls the label smoothing. A block of a row is (GROUPS, GROUP): one thread owns a group.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # the most negative finite float32
BYTES_PER_ACCESS = 16
"""A thread moves 128 bits at a time, the widest access of every target."""


class Shape(NamedTuple):
    """How a kernel covers a row: `threads` threads, `block` elements per step."""

    threads: int
    block: int


MAX_HELD_BYTES = 256
"""What a thread of the one-load kernel holds of its row: 64 registers, which leaves it as many to work with where 512
threads fill a multiprocessor: one program for a row of 128 KiB, the longest, two for a row of 64 KiB."""


def one_load_shape(num_classes: int, element_size: int, *, aligned: bool = True, smoothed: bool = False,
                   softcapped: bool = False) -> Shape | None:
    """Launch shape of the kernel that reads a row once, or None where the row does not fit in registers."""
    # Softcapped logits are held in float32, and an element that is loaded alone fills a register whatever its size.
    held_size = element_size if aligned and not softcapped else 4
    # The mean of label smoothing takes a few registers more: measured, a sixteenth of the row is enough.
    max_bytes = MAX_HELD_BYTES - 16 if smoothed else MAX_HELD_BYTES
    threads = max(64, triton.next_power_of_2(triton.cdiv(num_classes * held_size, max_bytes)))
    return Shape(threads, threads * BYTES_PER_ACCESS // element_size) if threads <= 512 else None


def streaming_shape(num_classes: int, element_size: int, *, aligned: bool = True) -> Shape:
    """Launch shape of the kernels that walk a row in blocks."""
    row_bytes = num_classes * element_size
    threads = 128 if row_bytes <= (16 << 10) else 256 if row_bytes <= (128 << 10) else 512
    # Two wide accesses in flight per thread. Elements loaded one by one fill a register each: half, or they spill.
    return Shape(threads, (2 if aligned else 1) * threads * BYTES_PER_ACCESS // element_size)


@triton.jit
def _lanes(BLOCK: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    # Columns of a block, (GROUPS, GROUP). A group is one wide access where rows are aligned; where they are not, and
    # every element is an access of its own, it is spread so that neighbouring threads touch neighbouring elements.
    GROUPS: tl.constexpr = BLOCK // GROUP
    if ALIGNED:
        return tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        return tl.arange(0, GROUPS)[:, None] + tl.arange(0, GROUP)[None, :] * GROUPS


@triton.jit
def _softcapped(x, softcap):
    # softcap * tanh(x / softcap). Written with exp2 because the interpreter has no libdevice; exact at both infinities.
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / softcap))))


@triton.jit
def _store(pointers, values, mask, SOFTWARE_BF16: tl.constexpr):
    # Triton's interpreter truncates to bfloat16 where the hardware rounds to nearest even, hence the integer form.
    if SOFTWARE_BF16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        rounded = tl.where(values != values, tl.full(rounded.shape, 0x7FC0, tl.uint16), rounded)
        tl.store(pointers, rounded.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _widened_again(held, never):
    # held in float32. Written unlike .to(tl.float32), or the compiler would keep that conversion's result from the
    # first pass alive instead of the 16-bit original, and the row would take twice the registers.
    if held.dtype == tl.bfloat16:  # by bits, for the interpreter cannot multiply bfloat16
        bits = held.to(tl.uint16, bitcast=True).to(tl.uint32)
        return (bits << (16 + never.to(tl.uint32))).to(tl.float32, bitcast=True)
    elif held.dtype == tl.float16:
        return (held * (1.0 + never.to(tl.float32)).to(tl.float16)).to(tl.float32)
    else:
        return held


@triton.jit
def _target_logit(logits_row, y, V: tl.constexpr, softcap, SOFTCAPPED: tl.constexpr):
    # NaN for a target out of range: it spreads to the row's loss and gradient, and nothing is read out of bounds.
    in_range = (y >= 0) & (y < V)
    x_y = tl.load(logits_row + tl.where(in_range, y, 0)).to(tl.float32)
    if SOFTCAPPED:
        x_y = _softcapped(x_y, softcap)
    return tl.where(in_range, x_y, float("nan"))


@triton.jit
def _accumulate(x, inside, m, total, sum_x, SMOOTHED: tl.constexpr):
    # One step of every group's running maximum and sum: x is (GROUPS, GROUP), m, total and sum_x are (GROUPS,).
    new_m = tl.maximum(m, tl.max(x, 1))
    # A group that has seen only -inf (masked classes, lanes past V) would otherwise compute -inf - -inf.
    base = tl.maximum(new_m, LOWEST)
    total = total * tl.exp2((m - base) * LOG2E) + tl.sum(tl.exp2((x - base[:, None]) * LOG2E), 1)
    if SMOOTHED:
        sum_x += tl.sum(tl.where(inside, x, 0.0), 1)
    return new_m, total, sum_x


@triton.jit
def _finish(group_m, group_total, group_x, x_y, label_smoothing, z_loss, V: tl.constexpr, SMOOTHED: tl.constexpr,
            Z_LOSS: tl.constexpr):
    # From the groups to the row: m, total, lse and loss.
    m = tl.max(group_m, 0)
    total = tl.sum(group_total * tl.exp2((group_m - tl.maximum(m, LOWEST)) * LOG2E), 0)
    log_total = tl.log(total)
    lse = m + log_total
    # m - x_y before log_total is added: lse - x_y would lose the loss of a row of large logits to lse's rounding.
    loss = log_total + (m - x_y)
    if SMOOTHED:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (log_total + (m - tl.sum(group_x, 0) / V))
    if Z_LOSS:
        loss += z_loss * lse * lse
    return m, total, lse, loss


@triton.jit
def _row_gradient(grad, lse, label_smoothing, z_loss, V: tl.constexpr, Z_LOSS: tl.constexpr):
    # The three scalars of a row's gradient: d = factor * p - spread - at_target * [column == y].
    factor = grad
    if Z_LOSS:
        factor *= 1.0 + 2.0 * z_loss * lse
    return factor, grad * label_smoothing / V, grad * (1.0 - label_smoothing)


@triton.jit
def _gradient(x, m, y_from_start, lanes, factor, spread, at_target, softcap, BLOCK: tl.constexpr,
              SMOOTHED: tl.constexpr, SOFTCAPPED: tl.constexpr):
    d = tl.exp2((x - m) * LOG2E) * factor
    if SMOOTHED:
        d -= spread
    # One block of a row holds the target: the others skip three instructions per element.
    if (y_from_start >= 0) & (y_from_start < BLOCK):
        d = tl.where(lanes == y_from_start, d - at_target, d)  # in float32, before the only rounding
    if SOFTCAPPED:
        tanh = x * (1.0 / softcap)
        d *= 1.0 - tanh * tanh
    return d


@triton.jit
def _one_load_kernel(logits, targets, scale, losses, lses, grads, scale_stride, logits_stride, ignore_index,
                     label_smoothing, z_loss, softcap, V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
                     ALIGNED: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAPPED: tl.constexpr,
                     SOFTWARE_BF16: tl.constexpr):
    """One program per row; the row lives in registers, as STEPS blocks, between its reduction and its gradient."""
    STEPS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    lanes = _lanes(BLOCK, GROUP, ALIGNED)
    grads_at = grads + row * V + lanes
    y = tl.load(targets + row)
    if y == ignore_index:
        for step in tl.static_range(STEPS):
            _store(grads_at + step * BLOCK, tl.zeros(lanes.shape, tl.float32), lanes < V - step * BLOCK, SOFTWARE_BF16)
        tl.store(losses + row, 0.0)
        tl.store(lses + row, 0.0)
        return

    logits_row = logits + row * logits_stride
    x_y = _target_logit(logits_row, y, V, softcap, SOFTCAPPED)
    held = ()
    for step in tl.static_range(STEPS):
        block = tl.load(logits_row + lanes + step * BLOCK, mask=lanes < V - step * BLOCK, other=float("-inf"),
                        eviction_policy="evict_first")
        held = held + (block,)  # noqa: RUF005 (Triton does not unpack)
    group_m = tl.full([BLOCK // GROUP], float("-inf"), tl.float32)
    group_total = tl.zeros([BLOCK // GROUP], tl.float32)
    group_x = tl.zeros([BLOCK // GROUP], tl.float32)
    capped = ()
    for step in tl.static_range(STEPS):
        x = held[step].to(tl.float32)
        inside = lanes < V - step * BLOCK
        if SOFTCAPPED:
            x = tl.where(inside, _softcapped(x, softcap), float("-inf"))
            # Held from here on in place of the logits: computed twice it would cost more than its registers.
            capped = capped + (x,)  # noqa: RUF005
        group_m, group_total, group_x = _accumulate(x, inside, group_m, group_total, group_x, SMOOTHED)
    m, total, lse, loss = _finish(group_m, group_total, group_x, x_y, label_smoothing, z_loss, V, SMOOTHED, Z_LOSS)
    tl.store(losses + row, loss)
    tl.store(lses + row, lse)

    grad = tl.where(x_y == x_y, tl.load(scale + row * scale_stride), float("nan"))
    factor, spread, at_target = _row_gradient(grad, lse, label_smoothing, z_loss, V, Z_LOSS)
    factor /= total
    y32 = y.to(tl.int32)
    never = total < 0.0  # a sum of exponentials: the compiler cannot know
    for step in tl.static_range(STEPS):
        if SOFTCAPPED:
            x = capped[step]
        else:
            x = _widened_again(held[step], never)
        d = _gradient(x, m, y32 - step * BLOCK, lanes, factor, spread, at_target, softcap, BLOCK, SMOOTHED, SOFTCAPPED)
        _store(grads_at + step * BLOCK, d, lanes < V - step * BLOCK, SOFTWARE_BF16)


@triton.jit
def _streaming_kernel(logits, targets, scale, losses, lses, grads, scale_stride, logits_stride, ignore_index,
                      label_smoothing, z_loss, softcap, V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
                      ALIGNED: tl.constexpr, WITH_GRADIENT: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr,
                      SOFTCAPPED: tl.constexpr, SOFTWARE_BF16: tl.constexpr):
    """One program per row, any V: running maxima and sums, then (WITH_GRADIENT) a second read for the gradient.

    The running maximum is per thread, so the loop has no barrier, and one rescaling exponential serves a group.
    """
    STEPS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    lanes = _lanes(BLOCK, GROUP, ALIGNED)
    y = tl.load(targets + row)
    if y == ignore_index:
        if WITH_GRADIENT:
            for step in tl.range(0, STEPS):
                _store(grads + row * V + lanes + step * BLOCK, tl.zeros(lanes.shape, tl.float32),
                       lanes < V - step * BLOCK, SOFTWARE_BF16)
        tl.store(losses + row, 0.0)
        tl.store(lses + row, 0.0)
        return

    logits_row = logits + row * logits_stride
    x_y = _target_logit(logits_row, y, V, softcap, SOFTCAPPED)
    group_m = tl.full([BLOCK // GROUP], float("-inf"), tl.float32)
    group_total = tl.zeros([BLOCK // GROUP], tl.float32)
    group_x = tl.zeros([BLOCK // GROUP], tl.float32)
    for step in tl.range(0, STEPS):
        inside = lanes < V - step * BLOCK
        at = logits_row + lanes + step * BLOCK
        if WITH_GRADIENT:
            x = tl.load(at, mask=inside, other=float("-inf"), eviction_policy="evict_last")
        else:
            x = tl.load(at, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        x = x.to(tl.float32)
        if SOFTCAPPED:
            x = tl.where(inside, _softcapped(x, softcap), float("-inf"))
        group_m, group_total, group_x = _accumulate(x, inside, group_m, group_total, group_x, SMOOTHED)
    m, total, lse, loss = _finish(group_m, group_total, group_x, x_y, label_smoothing, z_loss, V, SMOOTHED, Z_LOSS)
    tl.store(losses + row, loss)
    tl.store(lses + row, lse)

    if WITH_GRADIENT:
        grad = tl.where(x_y == x_y, tl.load(scale + row * scale_stride), float("nan"))
        factor, spread, at_target = _row_gradient(grad, lse, label_smoothing, z_loss, V, Z_LOSS)
        factor /= total
        y32 = y.to(tl.int32)
        for step in tl.range(0, STEPS):
            start = (STEPS - 1 - step) * BLOCK  # last block first: it is still in cache
            x = tl.load(logits_row + lanes + start, mask=lanes < V - start, other=float("-inf"),
                        eviction_policy="evict_first").to(tl.float32)
            if SOFTCAPPED:
                x = _softcapped(x, softcap)
            d = _gradient(x, m, y32 - start, lanes, factor, spread, at_target, softcap, BLOCK, SMOOTHED, SOFTCAPPED)
            _store(grads + row * V + lanes + start, d, lanes < V - start, SOFTWARE_BF16)


@triton.jit
def _backward_kernel(grad_losses, logits, targets, lses, grads, grad_losses_stride, logits_stride, ignore_index,
                     label_smoothing, z_loss, softcap, V: tl.constexpr, BLOCK: tl.constexpr, SMOOTHED: tl.constexpr,
                     Z_LOSS: tl.constexpr, SOFTCAPPED: tl.constexpr, SOFTWARE_BF16: tl.constexpr):
    """One program per row and block of BLOCK classes; the row's normaliser is its saved log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    lanes = tl.arange(0, BLOCK)
    grads_at = grads + row * V + start + lanes
    y = tl.load(targets + row)
    if y == ignore_index:
        _store(grads_at, tl.zeros([BLOCK], tl.float32), lanes < V - start, SOFTWARE_BF16)
        return
    lse = tl.load(lses + row)
    grad = tl.where((y >= 0) & (y < V), tl.load(grad_losses + row * grad_losses_stride), float("nan"))
    factor, spread, at_target = _row_gradient(grad, lse, label_smoothing, z_loss, V, Z_LOSS)
    x = tl.load(logits + row * logits_stride + start + lanes, mask=lanes < V - start, other=float("-inf"),
                eviction_policy="evict_first").to(tl.float32)
    if SOFTCAPPED:
        x = _softcapped(x, softcap)
    d = _gradient(x, lse, y.to(tl.int32) - start, lanes, factor, spread, at_target, softcap, BLOCK, SMOOTHED,
                  SOFTCAPPED)
    _store(grads_at, d, lanes < V - start, SOFTWARE_BF16)


@triton.jit
def _scale_kernel(grads, scale, numel, BLOCK: tl.constexpr, SOFTWARE_BF16: tl.constexpr):
    factor = tl.load(scale)
    if factor == 1.0:  # the usual case: a training loop's loss.backward() passes exactly 1
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(grads + offsets, mask=offsets < numel).to(tl.float32)
    _store(grads + offsets, values * factor, offsets < numel, SOFTWARE_BF16)


def cross_entropy_forward(logits: Tensor, targets: Tensor, *, ignore_index: int, label_smoothing: float, z_loss: float,
                          softcap: float) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps of the rows of logits (N, V) with targets (N,) int64; both (N,) float32.

    A row whose target is `ignore_index` gets 0 and 0, and its logits are not read; a target out of range gives NaN.
    `softcap` 0 is none. Reads the logits once.
    """
    return _stream(logits, targets, None, None, ignore_index, label_smoothing, z_loss, softcap)


def cross_entropy_backward(grad_losses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, *, ignore_index: int,
                           label_smoothing: float, z_loss: float, softcap: float, out: Tensor | None = None) -> Tensor:
    """Gradient (N, V) of sum(grad_losses * losses) in the logits' dtype; `grad_losses` (N,) float32, any stride.
    `out`: contiguous, and the logits themselves if wanted.

    With p = exp(x - lse): (p * (1 + 2 * z_loss * lse) - ls / V - (1 - ls) * [i == y]) * grad_losses, times the
    softcap's derivative 1 - (x / softcap)^2. Formed in float32 and rounded once. Reads the logits once.
    """
    logits = _checked(logits, targets)
    num_rows, num_classes = logits.shape
    grads = torch.empty((num_rows, num_classes), dtype=logits.dtype, device=logits.device) if out is None else out
    if num_rows:
        shape = streaming_shape(num_classes, logits.element_size(), aligned=_aligned(logits))
        with torch.cuda.device_of(logits):
            _backward_kernel[(num_rows, triton.cdiv(num_classes, shape.block))](
                grad_losses, logits, targets.contiguous(), lse.contiguous(), grads, grad_losses.stride(0),
                logits.stride(0), ignore_index, label_smoothing, z_loss, softcap, V=num_classes, BLOCK=shape.block,
                **_flags(logits, label_smoothing, z_loss, softcap), **_options(shape))
    return grads


def cross_entropy_fused(logits: Tensor, targets: Tensor, scale: Tensor, *, ignore_index: int, label_smoothing: float,
                        z_loss: float, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), log-sum-exps (N,) and the gradient (N, V) of sum(scale * losses).

    `scale` is float32 on the logits' device, 0-d or (N,), so that a mean's 1 / count needs no host. The logits are
    read once where `one_load_shape` says that a row fits in registers, twice above.
    """
    grads = logits.new_empty(logits.shape)
    return *_fuse(logits, targets, scale, grads, ignore_index, label_smoothing, z_loss, softcap), grads


def cross_entropy_fused_(logits: Tensor, targets: Tensor, scale: Tensor, *, ignore_index: int, label_smoothing: float,
                         z_loss: float, softcap: float) -> tuple[Tensor, Tensor]:
    """The same with the gradient written over the contiguous logits: each thread has read what it writes over."""
    if not logits.is_contiguous():
        raise ValueError(f"logits have strides {logits.stride()}; cross_entropy_fused_ takes a contiguous tensor")
    return _fuse(logits, targets, scale, logits, ignore_index, label_smoothing, z_loss, softcap)


def _fuse(logits: Tensor, targets: Tensor, scale: Tensor, grads: Tensor, *terms: float) -> tuple[Tensor, Tensor]:
    logits = _checked(logits, targets)
    num_rows, num_classes = logits.shape
    shape = one_load_shape(num_classes, logits.element_size(), aligned=_aligned(logits), smoothed=terms[1] != 0.0,
                           softcapped=terms[3] != 0.0)
    if shape is None or num_rows == 0:
        return _stream(logits, targets, scale, grads, *terms)
    losses, lse = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(logits):
        _one_load_kernel[(num_rows,)](
            logits, targets.contiguous(), scale, losses, lse, grads, scale.stride(0) if scale.dim() else 0,
            logits.stride(0), *terms, V=num_classes, BLOCK=shape.block, GROUP=BYTES_PER_ACCESS // logits.element_size(),
            ALIGNED=_aligned(logits), **_flags(logits, *terms[1:]), **_options(shape, True))
    return losses, lse


def scale_inplace(grad: Tensor, scale: Tensor) -> Tensor:
    """Multiplies the contiguous `grad` by the 0-d float32 tensor `scale`, and moves no byte of it where scale is 1.

    The kernel decides, so the host does not wait for the device.
    """
    _check_device(grad)
    if not grad.is_contiguous():
        raise ValueError(f"grad has strides {grad.stride()}; scale_inplace takes a contiguous tensor")
    if grad.numel():
        shape = streaming_shape(grad.numel(), grad.element_size())
        with torch.cuda.device_of(grad):
            _scale_kernel[(triton.cdiv(grad.numel(), shape.block),)](
                grad, scale, grad.numel(), BLOCK=shape.block, SOFTWARE_BF16=_software_bf16(grad), **_options(shape))
    return grad


def _stream(logits: Tensor, targets: Tensor, scale: Tensor | None, grads: Tensor | None,
            *terms: float) -> tuple[Tensor, Tensor]:
    logits = _checked(logits, targets)
    num_rows, num_classes = logits.shape
    losses, lse = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    if num_rows:
        row_stride = scale.stride(0) if scale is not None and scale.dim() else 0
        shape = streaming_shape(num_classes, logits.element_size(), aligned=_aligned(logits))
        with torch.cuda.device_of(logits):
            _streaming_kernel[(num_rows,)](
                logits, targets.contiguous(), scale, losses, lse, grads, row_stride, logits.stride(0), *terms,
                V=num_classes, BLOCK=shape.block, GROUP=BYTES_PER_ACCESS // logits.element_size(),
                ALIGNED=_aligned(logits), WITH_GRADIENT=scale is not None, **_flags(logits, *terms[1:]),
                **_options(shape))
    return losses, lse


def _flags(logits: Tensor, label_smoothing: float, z_loss: float, softcap: float) -> dict[str, bool]:
    return {"SMOOTHED": label_smoothing != 0.0, "Z_LOSS": z_loss != 0.0, "SOFTCAPPED": softcap != 0.0,
            "SOFTWARE_BF16": _software_bf16(logits)}


def _software_bf16(tensor: Tensor) -> bool:
    return INTERPRETED and tensor.dtype == torch.bfloat16


def _aligned(logits: Tensor) -> bool:
    """Whether every row of the logits and of their gradient starts on a 16-byte boundary."""
    size = logits.element_size()
    return (logits.data_ptr() % BYTES_PER_ACCESS == 0 and logits.stride(0) * size % BYTES_PER_ACCESS == 0
            and logits.size(1) * size % BYTES_PER_ACCESS == 0)


def _options(shape: Shape, holds_row: bool = False) -> dict[str, int]:
    # Every launch sits in `torch.cuda.device_of`: Triton launches on the current device, wherever the tensors are.
    if torch.version.hip:
        return {"num_warps": max(1, shape.threads // 64)}
    # Left alone, the compiler takes a few registers over the number with which two programs fit.
    limit = {(256, True): 128, (512, False): 64}.get((shape.threads, holds_row))
    return {"num_warps": shape.threads // 32} | ({"maxnreg": limit} if limit else {})


def _check_device(tensor: Tensor) -> None:
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise ValueError("got a CPU tensor; Triton kernels run on a GPU (or on the CPU in a process started with "
                         "TRITON_INTERPRET=1, which is for tests)")


def _checked(logits: Tensor, targets: Tensor) -> Tensor:
    """The logits with contiguous rows, as the kernels need them."""
    _check_device(logits)
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype}; the Triton kernels take float32, bfloat16 and float16")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}; the Triton kernels take int64")
    return logits if logits.stride(1) == 1 or logits.size(1) == 1 else logits.contiguous()
