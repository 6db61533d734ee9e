"""Triton kernels for AdamW over all tensors in one launch, and the functions that launch them.

A launch walks a list of blocks; a block looks up its tensor in a table on the device: addresses as int64, sizes, and
the step's factors. One pass reads the gradients for the norm; one reads p, g, m and v once and writes p, m and v once.
The verdict (skip) and the clip coefficient are read by pointer, so the host never waits. Arithmetic is single IEEE
operations in the reference's order (no fused multiply-add, exact root and division): the same bits as on the CPU, the
norm apart, whose squares are float32. Left out: float16 and float64.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from .cross_entropy import _store

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 1024
NARROW_BLOCK = 2048
"""Elements of a program; with narrow moments sixteen for each thread: of 8-bit ones 128 bits."""
NUM_WARPS = 4
ALIGNMENT = 16
"""Tensors whose addresses and sizes are multiples of this are read 128 bits at a time; others go in a second launch."""

COLUMNS: tl.constexpr = tl.constexpr(13)
"""Of the table: param, grad, exp_avg, exp_avg_sq, ema, step, numel, offset in the whole parameter, number of the
parameter, seed's low and high word, scales of the 8-bit moments, remainder of the float32 master. The factors: decay,
weight1, beta2, weight2, eps, step size, 1 / root2, EMA weight, sign, new step."""
FACTORS: tl.constexpr = tl.constexpr(10)


@triton.jit
def _address(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        return tl.multiple_of(address, 16)  # or the compiler could not use wide accesses
    else:
        return address


@triton.jit
def _norm_kernel(table, blocks, sums, BLOCK: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The sum of squares of one block of one gradient; no atomics, so the norm is the same every time."""
    index = tl.program_id(0)
    row = table + tl.load(blocks + 2 * index) * 2
    numel = tl.load(row + 1)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    offsets = tl.load(blocks + 2 * index + 1) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(_address(row, 0, TYPE, ALIGNED) + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
    tl.store(sums + index, tl.sum(grad * grad, 0))


@triton.jit
def _round_up_or_down(wide, noise):
    # Sixteen random bits below the kept ones: the carry is the rounding. Infinities and NaN pass.
    bits = wide.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude < 0x7F800000, bits + noise, bits)
    bits = tl.where(magnitude > 0x7F800000, bits | 0x400000, bits)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _random(row, first_unit, step, BITS: tl.constexpr, BLOCK: tl.constexpr):
    # For m and for v of each element: elements i and i + 32 of a unit of 64 share word i // 8 of counter i % 8.
    counter = first_unit * 8 + tl.arange(0, BLOCK // 8)
    zero = tl.zeros(counter.shape, tl.uint32)
    w0, w1, w2, w3 = philox_impl((counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32),
                                 zero + step.to(tl.uint32), zero + tl.load(row + 8).to(tl.uint32),
                                 tl.load(row + 9).to(tl.uint32), tl.load(row + 10).to(tl.uint32), 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (units * 8, 2, 2), the words in order
    words = words.reshape(BLOCK // 64, 8, 4).permute(0, 2, 1).reshape(BLOCK // 64, 1, 32)
    words = tl.broadcast_to(words, [BLOCK // 64, 2, 32]).reshape(BLOCK)
    low, high = words & ((1 << BITS) - 1), words >> (32 - BITS)
    second = (tl.arange(0, BLOCK) & 32) != 0
    return tl.where(second, high, low), tl.where(second, low, high)


@triton.jit
def _code_base(exponent, TOP: tl.constexpr):
    return tl.maximum((exponent << 3) + (7 - TOP), 0)


@triton.jit
def _widened(codes, scale, TOP: tl.constexpr):
    base = _code_base(scale.to(tl.int32, bitcast=True) >> 23, TOP)
    code = codes.to(tl.int32)
    magnitude = tl.where((code & TOP) != 0, ((code & TOP) + base) << 20, 0)
    return tl.where(code > TOP, magnitude | -2147483648, magnitude).to(tl.float32, bitcast=True)


@triton.jit
def _magnitude(wide):
    return wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_exponent(wide, BLOCK: tl.constexpr):
    # (blocks of 256,) int32: of a block's largest magnitude once rounded up.
    largest = tl.max(_magnitude(wide).reshape(BLOCK // 256, 256), 1).to(tl.uint32, bitcast=True)
    return tl.minimum((largest + 0xFFFFF) >> 23, 255).to(tl.int32)


@triton.jit
def _per_element(per_block, BLOCK: tl.constexpr):
    return tl.broadcast_to(per_block[:, None], [BLOCK // 256, 256]).reshape(BLOCK)


@triton.jit
def _coded(wide, exponent, noise, TOP: tl.constexpr):
    # See fasttrain/ops/_adamw_moments.py. The products compared are exact; the noise, 20 bits, becomes a float as the
    # low bits of 2^23, which costs less than a conversion.
    base = _code_base(exponent, TOP)
    magnitude = _magnitude(wide)
    code = ((magnitude.to(tl.uint32, bitcast=True) + noise) >> 20).to(tl.int32) - base
    code = tl.minimum(code, TOP)
    if TOP == 127:
        lowest = (base + 1) << 20
        size = magnitude.to(tl.float32, bitcast=True) * 1048576.0
        noise = (noise | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        drawn = size > noise * lowest.to(tl.float32, bitcast=True)
        code = tl.where(magnitude < lowest, drawn.to(tl.int32), code)
        code = code | ((wide.to(tl.int32, bitcast=True) >> 24) & 0x80)
    else:
        code = tl.where(magnitude == 0, 0, tl.maximum(code, 1))
    return code.to(tl.uint8)


@triton.jit
def _moments(grad, m, v, f):
    m = m + (grad - m) * tl.load(f + 1)
    return m, v * tl.load(f + 2) + (grad * grad) * tl.load(f + 3)


@triton.jit
def _step_parameter(row, at, inside, m, v, f, TYPE: tl.constexpr, ALIGNED: tl.constexpr, WITH_EMA: tl.constexpr,
                    MASTER: tl.constexpr, SOFTWARE_BF16: tl.constexpr):
    # Reads and writes a parameter, its remainder and its average.
    param_at = _address(row, 0, TYPE, ALIGNED) + at
    param = tl.load(param_at, mask=inside, other=0.0)
    if MASTER:
        remainder_at = _address(row, 12, tl.int16, ALIGNED) + at
        low = tl.load(remainder_at, mask=inside, other=0).to(tl.int32)
        param = ((param.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    else:
        param = param.to(tl.float32)
    denominator = tl.sqrt_rn(v) * tl.load(f + 6) + tl.load(f + 4)
    param = param * tl.load(f) - tl.div_rn(m, denominator) * tl.load(f + 5)
    if MASTER:
        bits = param.to(tl.uint32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits & 0x80000000) | 0x7FC00000, bits)
        tl.store(remainder_at, (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
        upper = (bits + 0x8000) >> 16
        tl.store(param_at, upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
        param = (upper << 16).to(tl.float32, bitcast=True)
    else:
        _store(param_at, param, inside, SOFTWARE_BF16)
    if WITH_EMA:
        ema_at = _address(row, 4, TYPE, ALIGNED) + at
        ema = tl.load(ema_at, mask=inside, other=0.0).to(tl.float32)
        if tl.bfloat16 == TYPE:  # the average is that of the parameter as it is stored
            bits = param.to(tl.uint32, bitcast=True)
            param = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        _store(ema_at, ema + (param - ema) * tl.load(f + 7), inside, SOFTWARE_BF16)


@triton.jit
def _update_kernel(table, factors, blocks, multiplier, skip, BLOCK: tl.constexpr, TYPE: tl.constexpr,
                   MOMENT: tl.constexpr, ALIGNED: tl.constexpr, WITH_EMA: tl.constexpr, MASTER: tl.constexpr,
                   ZERO: tl.constexpr, SOFTWARE_BF16: tl.constexpr):
    """One block of one parameter: the formula of fasttrain/ops/adamw.py.

    8-bit moments: the block is some of the blocks of 256 that share a scale.
    """
    CODED: tl.constexpr = tl.uint8 == MOMENT
    NARROW: tl.constexpr = CODED or tl.bfloat16 == MOMENT
    index = tl.program_id(0)
    tensor = tl.load(blocks + 2 * index)
    chunk = tl.load(blocks + 2 * index + 1)
    row = table + tensor * COLUMNS
    numel = tl.load(row + 6)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    grad_at = _address(row, 1, TYPE, ALIGNED)
    if tl.load(skip) != 0.0:
        if ZERO:
            at = chunk * BLOCK + tl.arange(0, BLOCK)
            tl.store(grad_at + at, tl.zeros(at.shape, TYPE), mask=at < numel)
        return
    m_at = _address(row, 2, MOMENT, ALIGNED)
    v_at = _address(row, 3, MOMENT, ALIGNED)
    f = factors + tensor * FACTORS
    step = tl.load(f + 9)
    scale = tl.load(multiplier) * tl.load(f + 8)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    grad = tl.load(grad_at + at, mask=inside, other=0.0).to(tl.float32) * scale
    m, v = tl.load(m_at + at, mask=inside, other=0), tl.load(v_at + at, mask=inside, other=0)
    if CODED:
        scaled = chunk * (BLOCK // 256) + tl.arange(0, BLOCK // 256)
        num_scales = (numel + 255) // 256
        m_scale_at = _address(row, 11, tl.float32, False) + scaled
        m_scale = tl.load(m_scale_at, mask=scaled < num_scales, other=0.0)
        v_scale = tl.load(m_scale_at + num_scales, mask=scaled < num_scales, other=0.0)
        m, v = _widened(m, _per_element(m_scale, BLOCK), 127), _widened(v, _per_element(v_scale, BLOCK), 255)
    m, v = _moments(grad, m.to(tl.float32), v.to(tl.float32), f)
    _step_parameter(row, at, inside, m, v, f, TYPE, ALIGNED, WITH_EMA, MASTER, SOFTWARE_BF16)
    if ZERO:
        tl.store(grad_at + at, tl.zeros(at.shape, TYPE), mask=inside)
    if NARROW:
        first_unit = tl.load(row + 7) // 64 + chunk * (BLOCK // 64)
        m_noise, v_noise = _random(row, first_unit, step, 20 if CODED else 16, BLOCK)
    if CODED:
        m_exponent, v_exponent = _scale_exponent(m, BLOCK), _scale_exponent(v, BLOCK)
        tl.store(m_scale_at, (m_exponent << 23).to(tl.float32, bitcast=True), mask=scaled < num_scales)
        tl.store(m_scale_at + num_scales, (v_exponent << 23).to(tl.float32, bitcast=True), mask=scaled < num_scales)
        m = _coded(m, _per_element(m_exponent, BLOCK), m_noise, 127)
        v = _coded(v, _per_element(v_exponent, BLOCK), v_noise, 255)
    elif NARROW:
        m, v = _round_up_or_down(m, m_noise), _round_up_or_down(v, v_noise)
    tl.store(m_at + at, m, mask=inside)
    tl.store(v_at + at, v, mask=inside)
    if chunk == 0:
        tl.store(_address(row, 5, tl.float32, False), step)


def adamw_norm(grads: Sequence[Tensor]) -> Tensor:
    """() float32: the 2-norm of contiguous float32 or bfloat16 tensors together. Squares are float32, sums of blocks
    float64: deterministic, and a gradient beyond 1.8e19 counts as infinite."""
    device = _checked(grads)
    sums = [torch.zeros(1, dtype=torch.float32, device=device)]
    for (dtype, aligned), members in _kinds([(grad.dtype, _aligned(grad)) for grad in grads]).items():
        mine = [grads[i] for i in members]
        table = _on_device(tuple(x for grad in mine for x in (grad.data_ptr(), grad.numel())), device)
        blocks = _blocks(tuple(grad.numel() for grad in mine), BLOCK, device)
        partial = torch.empty(blocks.numel() // 2, dtype=torch.float32, device=device)
        if partial.numel():
            with torch.cuda.device_of(partial):  # Triton launches on the current device, wherever the tensors are
                _norm_kernel[(partial.numel(),)](table, blocks, partial, BLOCK=BLOCK, TYPE=_TYPES[dtype],
                                                 ALIGNED=aligned, num_warps=NUM_WARPS)
        sums.append(partial)
    return torch.cat(sums).sum(dtype=torch.float64).sqrt().float()


def adamw_update(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
                 exp_avg_sqs: Sequence[Tensor], scales: Sequence[Tensor], steps: Sequence[Tensor],
                 emas: Sequence[Tensor], remainders: Sequence[Tensor], terms: Tensor, places: Tensor,
                 multiplier: Tensor | None, skip: Tensor | None, seed: int, zero_grads: bool) -> None:
    """One update of everything, in place. See fasttrain/ops/_adamw_kernels.py for the lists.

    Tensors of one kind (types, alignment) share a launch: one launch for a usual model.
    """
    device = _checked(params)
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    factors = _factors(steps, terms.to(device), places.to(device))
    seed_words = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    _, numbers, offsets = places.t().tolist()
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([emas] if emas else [])]
    mastered = [bool(remainders) and (p.dtype == torch.bfloat16 and remainders[i].dtype == torch.int16)
                for i, p in enumerate(params)]
    kinds = [(p.dtype, m.dtype, with_master, all(_aligned(tensors[i]) for tensors in lists)
              and (not with_master or _aligned(remainders[i])))
             for i, (p, m, with_master) in enumerate(zip(params, exp_avgs, mastered))]
    for (dtype, moment, with_master, aligned), members in _kinds(kinds).items():
        rows = [(params[i].data_ptr(), grads[i].data_ptr(), exp_avgs[i].data_ptr(), exp_avg_sqs[i].data_ptr(),
                 emas[i].data_ptr() if emas else 0, steps[i].data_ptr(), params[i].numel(), offsets[i], numbers[i],
                 *seed_words, scales[i].data_ptr(), remainders[i].data_ptr() if with_master else 0) for i in members]
        block = block_of(moment)
        blocks = _blocks(tuple(row[6] for row in rows), block, device)
        mine = factors if len(members) == len(params) else factors[_on_device(tuple(members), device)]
        with torch.cuda.device_of(blocks):
            _update_kernel[(blocks.numel() // 2,)](
                _on_device(tuple(x for row in rows for x in row), device), mine, blocks,
                one if multiplier is None else multiplier, zero if skip is None else skip, BLOCK=block,
                TYPE=_TYPES[dtype], MOMENT=_TYPES[moment], ALIGNED=aligned, WITH_EMA=bool(emas), MASTER=with_master,
                ZERO=zero_grads, SOFTWARE_BF16=INTERPRETED and dtype == torch.bfloat16, num_warps=NUM_WARPS,
                **_exact())


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.uint8: tl.uint8}


def block_of(moment: torch.dtype) -> int:
    return BLOCK if moment == torch.float32 else NARROW_BLOCK


def _exact() -> dict[str, bool]:
    """No multiplication fused with an addition: that rounds once where the other implementations round twice."""
    return {} if INTERPRETED else {"enable_fp_fusion": False}


def _factors(steps: Sequence[Tensor], terms: Tensor, places: Tensor) -> Tensor:
    """(tensors, factors) float32, computed in float64 on the device, where the steps are."""
    step = torch.stack(list(steps)).double() + 1
    lr, beta1, beta2, eps, weight_decay, sign, ema_weight = terms[places[:, 0]].unbind(1)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    columns = [1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, lr / correction1, 1 / correction2.sqrt(),
               ema_weight, sign, step]
    return torch.stack(columns, dim=1).float()


def _kinds(kinds: Sequence[tuple]) -> dict[tuple, list[int]]:
    members: dict[tuple, list[int]] = {}
    for index, kind in enumerate(kinds):
        members.setdefault(kind, []).append(index)
    return members


@functools.lru_cache(maxsize=32)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 values on the device. Kept: where gradients stay in place, so does their table."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


@functools.lru_cache(maxsize=32)
def _blocks(numels: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """(blocks, 2) int64: tensor and number of the block in it."""
    counts = torch.tensor([-(-numel // block) or 1 for numel in numels])  # an empty tensor still counts its steps
    tensor = torch.arange(len(numels)).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([tensor, torch.arange(int(counts.sum())) - first], dim=1).to(device)


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0 and tensor.numel() % ALIGNMENT == 0


def _checked(tensors: Sequence[Tensor]) -> torch.device:
    if not tensors:
        raise ValueError("AdamW's kernels got no tensors")
    device = tensors[0].device
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError("got CPU tensors; Triton kernels run on a GPU (or on the CPU in a process started with "
                         "TRITON_INTERPRET=1, which is for tests)")
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16) or not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(f"got a {tensor.dtype} tensor with strides {tensor.stride()} on {tensor.device}; the "
                             f"Triton kernels take contiguous float32 and bfloat16 tensors of one device ({device})")
    return device
