"""Triton kernels for drawing one token per row of logits, by the specification in fasttrain/ops/sample.py.

Rows are split over programs, so one row fills a GPU. One pass over the logits finds of every group of 256 ids the
maximum and, in float32, about what mass it has: the estimate's error is bounded, and the draw computes exact masses of
those groups only that could win by that bound, seldom more than one. A filtered row reads the groups that can matter
once more, from the cache, for a list of the tokens that can (kernels/sample_filters.py). Where the estimates leave a
token of top-p's edge in doubt, and only if it would change what is drawn, the draw forms the exact mass of the row.
What decides is integers, and the only atomics add integers, so neither a launch shape nor a device's exp2 can change
a token. Log-probabilities of rows without filters come from the estimates. Compiled without fused multiply-adds where
none is written, which would change what is exact.

Legend: B rows, V tokens, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sample_filters import bounds_kernel, cuts_kernel, find_cut, list_kernel, listed_tokens, needed_mass
from .sample_masses import (
    ERROR,
    GROUP,
    INTERPRETED,
    LAST_ID,
    LOWEST,
    estimated_mass,
    exponents_of,
    load_groups,
    log2,
    mass_of,
    multiply_add,
    noise_of,
    quotient,
    rank_of,
)  # fmt: skip

BLOCK: tl.constexpr = tl.constexpr(128)  # of tokens, where a draw has to look at all of a row
LIST_GROUPS = {2: 8, 4: 4}  # that a warp of 32 lists, by bytes of a logit
CUT_BLOCK, CUT_WARPS = 512, 8
MAX_REGISTERS = 168  # of a cut or a draw: left alone, the compiler spills some to fit more programs


@triton.jit
def groups_kernel(logits, scales, maxima, shares, row_stride, V, G, GROUPS: tl.constexpr):
    """Grid (B, splits). Of every group the largest logit and about the sum of its masses as a multiple of that one's,
    both (B, G) float32. The maximum is +inf in a group that holds NaN or +inf."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = split * GROUPS + tl.arange(0, GROUPS)
    _, x = load_groups(logits + row * row_stride, groups, V)
    low, high = tl.split(tl.reshape(x, [x.shape[0], GROUPS, x.shape[2] // 2, 2]))
    if x.dtype == tl.bfloat16:  # the pair is the 32-bit word that was loaded, and each a single operation away from it
        pair = low.to(tl.uint16, bitcast=True).to(tl.uint32) | (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
        low, high = (pair << 16).to(tl.float32, bitcast=True), (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    maximum = tl.max(tl.max(tl.maximum(low, high), 0), 1).to(tl.float32)
    base = tl.maximum(maximum, LOWEST)
    # (x - base) * scale is x * scale - base * scale in one rounding, but for what rounding the latter takes, the same
    # for all of a group. Where the product is so large that this could leave float32's range, any x but the base lies
    # at least 32 below it, and a smaller scale does.
    scale = tl.minimum(tl.load(scales + row), 536870912.0 / tl.maximum(tl.abs(base), 1e-20))
    origin = -(base * scale)
    low = multiply_add(low.to(tl.float32), scale[None, :, None], origin[None, :, None])
    high = multiply_add(high.to(tl.float32), scale[None, :, None], origin[None, :, None])
    # At most 31 additions, in any order, to a sum.
    share = tl.sum(tl.sum(tl.exp2(low) + tl.exp2(high), 0), 1) * tl.exp2(-multiply_add(base, scale, origin))
    tl.store(maxima + row * G + groups, tl.where(share == share, maximum, float("inf")), mask=groups < G)
    tl.store(shares + row * G + groups, share, mask=groups < G)


@triton.jit
def _survivors(x_row, group, largest, scale, least, cut, V, FILTERED: tl.constexpr):
    # Ids of a group, their masses, 0 where a filter removed the token, and their ranks, 0 where no filter is on.
    ids = group * GROUP + tl.arange(0, GROUP)
    x = tl.load(x_row + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    w = tl.where(ids < V, mass_of(x, largest, scale), 0)
    rank = w * 0
    if FILTERED:
        rank = rank_of(x, ids)
        w = tl.where((w >= least) & (rank >= cut), w, 0)
    return ids, w, rank


@triton.jit
def _exact_cut(x_row, entries, n, bound, cut, doubtful, reached, p, largest, scale, least, V):
    # Top-p's, of a row that needs the exact mass of all its tokens, and the mass that stays of those in doubt.
    total = reached * 0
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        total += tl.sum(mass_of(x, largest, scale), 0)
    need = needed_mass(total, p) - reached
    exact = cut
    element: tl.constexpr = x_row.dtype.element_ty
    if need > 0:
        exact, _ = find_cut(entries, n, bound, doubtful, cut - 1, need, largest, scale, True, BLOCK, element)
    stays = reached * 0
    for start in range(0, n, BLOCK):
        x, rank = listed_tokens(entries, start, n, bound, BLOCK, element)
        w = mass_of(x, largest, scale)
        stays += tl.sum(tl.where((rank >= exact) & (rank < cut) & (w >= least), w, 0), 0)
    return exact, stays


@triton.jit
def draw_kernel(logits, scales, top_ps, min_masses, maxima, shares, bounds, num_entries, entries, cuts, doubtful_cuts,
                reached_masses, survivor_masses, doubtful_masses, seeds, positions, tokens, logprobs, row_stride, V, G,
                capacity, PADDED_G: tl.constexpr, FILTERED: tl.constexpr, LOGPROBS: tl.constexpr):
    """Grid (B,). Steps 3 to 6; token -1 for a row that holds NaN, +inf, or nothing but -inf."""
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + row * row_stride
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    scale, least = tl.load(scales + row), tl.load(min_masses + row)
    groups = tl.arange(0, PADDED_G)
    at = row * G + groups
    maximum = tl.load(maxima + at, mask=groups < G, other=float("-inf"))
    largest = tl.max(maximum, 0)
    is_row = tl.abs(largest) < float("inf")
    share = tl.load(shares + at, mask=groups < G, other=0.0)
    about = estimated_mass(share, exponents_of(maximum, largest, scale))
    total = tl.sum(about, 0)
    noise = noise_of(groups, 1, seed, position)
    # The group of the least quotient wins. Each is at least `soonest`, and the least at most `latest`. Of an estimate
    # the error is ERROR, and less than a quarter of that for the 256 units where there are 2^26 and more.
    soonest = quotient(noise, tl.where(about > 0.0, about * (1.0 + ERROR) + GROUP, 0.0))
    latest = tl.min(tl.where(about >= 67108864.0, soonest, float("inf")), 0) * (1.0 + 3.0 * ERROR)
    cut = row * 0
    doubtful = cut
    in_doubt = row < 0
    if FILTERED:
        cut, doubtful = tl.load(cuts + row), tl.load(doubtful_cuts + row)
        if cut > 0:
            surely = tl.load(survivor_masses + at, mask=groups < G, other=0)
            total = tl.sum(surely, 0).to(tl.float64)
            soonest = quotient(noise, surely)
            latest = tl.min(soonest, 0)
            if doubtful < cut:
                maybe = tl.load(doubtful_masses + at, mask=groups < G, other=0)
                soonest = quotient(noise, surely + maybe)
                if LOGPROBS:  # without more ado half of it counts: 2^-14 of the total
                    half = tl.sum(maybe, 0).to(tl.float64) * 0.5
                    in_doubt = half > 6.103515625e-05 * total
                    total += half
    can_win = soonest <= latest
    num_contenders = tl.sum(can_win.to(tl.int32), 0)
    group = tl.minimum(tl.min(tl.where(can_win, groups, LAST_ID), 0), G - 1)
    token = group * 0
    mass = cut * 0
    in_doubt |= (num_contenders > 1) & (doubtful < cut)
    is_open = row >= 0
    while is_open:
        if FILTERED:  # noqa: SIM102
            if in_doubt:
                n = tl.load(num_entries + row)
                if x_row.dtype.element_ty != tl.float32:
                    n *= 2
                list_row = entries + row * capacity
                reached, p, bound = tl.load(reached_masses + row), tl.load(top_ps + row), tl.load(bounds + row)
                exact, stays = _exact_cut(x_row, list_row, n, bound, cut, doubtful, reached, p, largest, scale, least,
                                          V)
                cut = exact
                doubtful = exact
                surely = tl.load(survivor_masses + at, mask=groups < G, other=0)
                total = (tl.sum(surely, 0) + stays).to(tl.float64)
        if (num_contenders > 1) & is_row:
            contender = tl.min(tl.where(can_win, groups, LAST_ID), 0)
            best = total * 0.0 + float("inf")
            while contender < G:
                _, w, _ = _survivors(x_row, contender, largest, scale, least, doubtful, V, FILTERED)
                found = quotient(tl.sum(tl.where(groups == contender, noise, 0.0), 0), tl.sum(w, 0))
                group = tl.where(found < best, contender, group)
                best = tl.minimum(found, best)
                contender = tl.min(tl.where(can_win & (groups > contender), groups, LAST_ID), 0)
        ids, w, rank = _survivors(x_row, group, largest, scale, least, doubtful, V, FILTERED)
        quotients = quotient(noise_of(ids, 0, seed, position), w)
        token = tl.min(tl.where(quotients == tl.min(quotients, 0), ids, LAST_ID), 0)
        mass = tl.sum(tl.where(ids == token, w, 0), 0)
        in_doubt = tl.max(tl.where(ids == token, rank, 0), 0) < cut
        is_open = in_doubt
    tl.store(tokens + row, tl.where(is_row, token, -1).to(tl.int64))
    if LOGPROBS:
        ratio = log2(tl.maximum(mass, 1).to(tl.float64)) - log2(tl.maximum(total, 1.0))
        tl.store(logprobs + row, (tl.minimum(ratio, 0.0) * 0.6931471805599453).to(tl.float32))


def options(warps: int, max_registers: int = 0) -> dict[str, int | bool]:
    """Of a launch with so many warps of 32 threads."""
    hip = bool(torch.version.hip)
    return ({"num_warps": max(1, warps // 2) if hip else warps, "enable_fp_fusion": False}
            | ({"maxnreg": max_registers} if max_registers and not hip else {}))


def groups_form(num_rows: int, num_tokens: int, filtered: bool) -> tuple[int, int]:
    """How many groups of 256 a program of `groups_kernel` takes, and its warps: few for few rows, so that one row
    fills a GPU."""
    if num_rows * num_tokens >= 1 << 20:
        return 32, 4
    return (8, 1) if filtered else (4, 1)


def sample(logits: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_mass: Tensor, seed: Tensor,
           position: Tensor, *, filtered: bool = True, return_logprobs: bool = True,
           form: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Tokens (B,) int64, -1 for a row without a distribution, and their log-probabilities (B,) float32.

    Args:
        logits: (B, V) float32, bfloat16 or float16; rows contiguous.
        scale, top_k, top_p, min_mass, seed, position: (B,), as `RowParameters` in fasttrain/ops/sample.py has them.
        filtered: False promises that top-k, top-p and min-p do nothing in any row, and saves their kernels.
        return_logprobs: False leaves them empty.
        form: groups a program, a power of two, and its warps, as `groups_form` has them; changes no result.
    """
    _check(logits)
    B, V = logits.shape
    G = triton.cdiv(V, GROUP.value)
    device = logits.device
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    logprobs = torch.empty(B * return_logprobs, dtype=torch.float32, device=device)
    if B == 0:
        return tokens, logprobs
    scale, top_k, top_p, min_mass, seed, position = (
        t.contiguous() for t in (scale, top_k, top_p, min_mass, seed, position))
    per_program, warps = form or groups_form(B, V, filtered)
    padded = triton.next_power_of_2(G)
    maxima, shares = torch.empty(2, B, G, dtype=torch.float32, device=device).unbind()
    stride = logits.stride(0)
    found: tuple[Tensor | None, ...] = (None,) * 8
    capacity = 0
    with torch.cuda.device_of(logits):  # Triton launches on the current device, wherever the tensors are
        grid = (B, triton.cdiv(G, per_program))
        groups_kernel[grid](logits, scale, maxima, shares, stride, V, G, GROUPS=per_program, **options(warps))
        if filtered:
            found, capacity = _filter(logits, scale, top_k, top_p, min_mass, maxima, shares, padded)
        draw_kernel[(B,)](logits, scale, top_p, min_mass, maxima, shares, *found, seed, position, tokens, logprobs,
                          stride, V, G, capacity, PADDED_G=padded, FILTERED=filtered, LOGPROBS=return_logprobs,
                          **options(4, MAX_REGISTERS))
    return tokens, logprobs


def _filter(logits: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_mass: Tensor, maxima: Tensor,
            shares: Tensor, padded: int) -> tuple[tuple[Tensor, ...], int]:
    """What the draw needs of the filters, from `bounds` to `doubtful_masses`, and the capacity of a list."""
    (B, V), G, device = logits.shape, maxima.size(1), logits.device
    capacity = V if logits.dtype == torch.float32 else (V + 1) // 2
    bounds = torch.empty(B, dtype=torch.float32, device=device)
    estimates = torch.empty(B, dtype=torch.float64, device=device)
    live_groups = torch.empty(B, G, dtype=torch.int32, device=device)
    num_live = torch.empty(B, dtype=torch.int32, device=device)
    num_entries = torch.zeros(B, dtype=torch.int32, device=device)
    entries = torch.empty(B, capacity, dtype=torch.uint64, device=device)
    cuts, doubtful_cuts, reached = torch.empty(3, B, dtype=torch.int64, device=device).unbind()
    survivors, doubtful = torch.zeros(2, B, G, dtype=torch.int64, device=device).unbind()
    bounds_kernel[(B,)](maxima, shares, scale, top_k, top_p, min_mass, bounds, estimates, live_groups, num_live, V, G,
                        PADDED_G=padded, **options(4))
    threads = 64 if torch.version.hip else 32
    per_list = LIST_GROUPS[logits.element_size()] * threads // 32
    list_kernel[(B, triton.cdiv(G, per_list))](
        logits, live_groups, num_live, bounds, num_entries, entries, logits.stride(0), V, G, capacity,
        GROUPS=per_list, THREADS=threads, **options(1))
    cuts_kernel[(B,)](maxima, scale, bounds, estimates, num_entries, entries, top_k, top_p, min_mass, cuts,
                      doubtful_cuts, reached, survivors, doubtful, V, G, capacity, BLOCK=CUT_BLOCK, PADDED_G=padded,
                      element=getattr(tl, str(logits.dtype).removeprefix("torch.")),
                      **options(CUT_WARPS, MAX_REGISTERS))
    return (bounds, num_entries, entries, cuts, doubtful_cuts, reached, survivors, doubtful), capacity


def _check(logits: Tensor) -> None:
    if logits.device.type == "cpu" and not INTERPRETED.value:
        raise ValueError("got a CPU tensor; Triton kernels run on a GPU (or on the CPU in a process started with "
                         "TRITON_INTERPRET=1, which is for tests)")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype}; the Triton kernels take float32, bfloat16 and float16")
    if logits.stride(1) != 1 and logits.size(1) > 1:
        raise ValueError(f"logits have strides {logits.stride()}; the Triton kernels take contiguous rows")
    if logits.size(1) > 2**30:
        raise ValueError(f"logits have {logits.size(1)} tokens; the Triton kernels take up to 2^30")
