"""Triton kernels for drawing one token per row of logits, by the specification in fasttrain/ops/sample.py.

Rows are split over programs, so one row fills a GPU. The logits are read twice, the second time from the cache: once
for the maximum of every group of 256 ids, once for the masses. A filtered row gathers the tokens that can matter in
the second pass and one program per row finds the cut among them. All sums are of integers and the only atomics add
integers, so no launch shape can change a token. Compiled without fused multiply-adds, which would.

Legend: B rows, V tokens, G groups. A key orders float32 as an unsigned 32-bit number (equal for both zeros);
a rank puts the id below it, key * 2^31 + (2^31 - 1 - id), so that ranks are unique and order tokens.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GROUP: tl.constexpr = tl.constexpr(256)
LAST_ID: tl.constexpr = tl.constexpr(2**31 - 1)
LOWEST_KEY: tl.constexpr = tl.constexpr(0x00800000)  # of the most negative finite float32
DIGITS: tl.constexpr = tl.constexpr(16)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
CUT_WARPS = 16


@triton.jit
def _key(x):
    # int64, so that comparisons mean the same everywhere. Adding 0 makes -0 into +0.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _rank(key, ids):
    return (key << 31) | (ids ^ LAST_ID).to(tl.int64)


@triton.jit
def _mass(x, largest, scale):
    # Step 1, which has -100 where this has -63: the mass is 0 from -42 down, and so the shift below needs no bound.
    t = tl.maximum((x - largest) * scale, -63.0)
    n = tl.floor(t + 0.5)
    f = t - n
    p = f * 0.00015353362 + 0.0013398875
    p = p * f + 0.009618437
    p = p * f + 0.055503324
    p = p * f + 0.24022648
    p = p * f + 0.6931472
    p = p * f + 1.0
    whole = (p * 16777216.0).to(tl.int32).to(tl.int64) << 16
    return whole >> (-n).to(tl.int32).to(tl.int64)


@triton.jit
def _log2(v):
    # Step 4, of positive float64.
    bits = v.to(tl.int64, bitcast=True)
    e = ((bits >> 52) - 1022).to(tl.float64)
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    small = m < 0.7071067811865476
    m = tl.where(small, m * 2.0, m)
    e = tl.where(small, e - 1.0, e)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    total = z * 0.15186263588304878 + 0.16972882833987804
    total = total * z + 0.19235933878519512
    total = total * z + 0.22195308321368668
    total = total * z + 0.26230818925253880
    total = total * z + 0.32059889797532520
    total = total * z + 0.41219858311113240
    total = total * z + 0.57707801635558540
    total = total * z + 0.96179669392597560
    total = total * z + 2.88539008177792680
    return e + s * total


@triton.jit
def _winner(ids, weights, DOMAIN: tl.constexpr, seed, position):
    # Steps 3 and 5: the place of the least quotient, the first of equals. Weight 0 never wins.
    zero = ids.to(tl.uint32) * 0
    c2 = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + (position >> 32).to(tl.uint32)
    r0, r1, _, _ = tl.philox(seed, ids.to(tl.uint32), zero + DOMAIN, c2, c3)
    u = (2 * ((r0.to(tl.int64) << 20) | (r1.to(tl.int64) >> 12)) + 1).to(tl.float64) * 1.1102230246251565e-16
    quotient = tl.where(weights > 0, -_log2(u) / tl.maximum(weights, 1).to(tl.float64), float("inf"))
    # Not negative: their bits compare as they do.
    bits = quotient.to(tl.int64, bitcast=True)
    return tl.min(tl.where(bits == tl.min(bits, 0), ids, LAST_ID), 0)


@triton.jit
def _tile(x_row, start, V, GROUPS: tl.constexpr):
    # Ids (GROUPS, 256) from `start`, and their logits in float32, -inf past the end.
    ids = start + tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return ids, tl.load(x_row + ids, mask=ids < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _maxima_kernel(logits, maxima, row_stride, V, G, GROUPS: tl.constexpr):
    """Grid (B, splits). The largest logit of every group, (B, G) float32; +inf for a group that holds NaN."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, x = _tile(logits + row * row_stride, split * (GROUPS * GROUP), V, GROUPS)
    groups = split * GROUPS + tl.arange(0, GROUPS)
    tl.store(maxima + row * G + groups, tl.max(tl.where(x == x, x, float("inf")), 1), mask=groups < G)


@triton.jit
def _bounds_kernel(maxima, scales, top_ks, top_ps, largest_logits, bound_keys, bound_masses, V, G,
                   PADDED_G: tl.constexpr, FILTERED: tl.constexpr):
    """Grid (B,). The row's largest logit, and the key and the mass that a token must have to matter for the cut."""
    row = tl.program_id(0)
    groups = tl.arange(0, PADDED_G)
    x = tl.load(maxima + row * G + groups, mask=groups < G, other=float("-inf"))
    largest = tl.max(x, 0)
    tl.store(largest_logits + row, largest)
    if FILTERED:
        keys = _key(x)
        k, p = tl.load(top_ks + row), tl.load(top_ps + row)
        bound = LOWEST_KEY + k * 0
        mass = k * 0 + 1
        if (k > 0) & (k < V):
            if k <= G:  # the k-th largest of the groups' maxima: at least k tokens reach it
                low, high = bound, tl.max(keys, 0) + 1
                while high - low > 1:
                    middle = (low + high) // 2
                    enough = tl.sum((keys >= middle).to(tl.int32), 0) >= k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
                bound = low
        elif p < 1.0:
            # A token with less than half an even share of what is dropped, of a total that is too small, is dropped.
            least = tl.sum(_mass(x, largest, tl.load(scales + row)), 0).to(tl.float64)
            mass = tl.maximum(((1.0 - p) * least / (2.0 * V)).to(tl.int64), 1)
        tl.store(bound_keys + row, bound)
        tl.store(bound_masses + row, mass)


@triton.jit
def _masses_kernel(logits, largest_logits, scales, min_masses, bound_keys, bound_masses, group_masses, num_listed,
                   list_ranks, list_masses, row_stride, V, G, GROUPS: tl.constexpr, FILTERED: tl.constexpr):
    """Grid (B, splits). The mass of every group (B, G); of a filtered row before the filters, and the list of tokens
    that matter for its cut, in any order: ranks and masses (B, V), the first num_listed of each row."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest = tl.load(largest_logits + row)
    ids, x = _tile(logits + row * row_stride, split * (GROUPS * GROUP), V, GROUPS)
    w = _mass(x, largest, tl.load(scales + row))
    groups = split * GROUPS + tl.arange(0, GROUPS)
    if FILTERED:
        key = _key(x)
        listed = (ids < V) & (key >= tl.load(bound_keys + row)) & (w >= tl.load(bound_masses + row))
        flat = tl.reshape(listed.to(tl.int32), [GROUPS * GROUP])
        count = tl.sum(flat, 0)
        if count > 0:
            place = tl.reshape(tl.cumsum(flat, 0) - flat, [GROUPS, GROUP])
            at = row * V + tl.atomic_add(num_listed + row, count, sem="relaxed") + place
            tl.store(list_ranks + at, _rank(key, ids), mask=listed)
            tl.store(list_masses + at, w, mask=listed)
    else:
        min_mass = tl.load(min_masses + row)
        if min_mass > 0:  # a comparison of 64 bits is four instructions for every logit
            w = tl.where(w >= min_mass, w, 0)
    tl.store(group_masses + row * G + groups, tl.sum(w, 1), mask=groups < G)


@triton.jit
def _cut(ranks, masses, n, lowest, highest, need, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    # The rank of the token that brings those from the top of the order to `need`, of n with lowest <= rank <= highest
    # (smaller ones do not count): digit by digit from the first that differs, until one token is left.
    digits = tl.arange(0, DIGITS)
    shift = n * 0 + 60
    while (shift > 0) & ((highest >> shift) == (lowest >> shift)):
        shift -= 4
    prefix = (highest >> shift) >> 4
    num_left = n
    while (shift >= 0) & (num_left > 1):
        weights = tl.zeros([DIGITS], tl.int64)
        counts = tl.zeros([DIGITS], tl.int32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            rank = tl.load(ranks + at, mask=at < n, other=-1)
            head = rank >> shift
            of_digit = ((rank >= lowest) & ((head >> 4) == prefix))[:, None] & ((head & 15)[:, None] == digits[None, :])
            counts += tl.sum(of_digit.to(tl.int32), 0)
            if BY_MASS:
                weight = tl.load(masses + at, mask=at < n, other=0)
                weights += tl.sum(tl.where(of_digit, weight[:, None], 0), 0)
        if not BY_MASS:
            weights = counts.to(tl.int64)
        above = tl.sum(weights, 0) - tl.cumsum(weights, 0)  # of the larger digits
        here = (above < need) & (need <= above + weights)
        prefix = prefix * 16 + tl.sum(tl.where(here, digits, 0), 0)
        need -= tl.sum(tl.where(here, above, 0), 0)
        num_left = tl.sum(tl.where(here, counts, 0), 0)
        shift -= 4
    cut = prefix
    if shift >= 0:
        cut = lowest * 0
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            rank = tl.load(ranks + at, mask=at < n, other=-1)
            cut = tl.maximum(cut, tl.max(tl.where(((rank >> shift) >> 4) == prefix, rank, 0), 0))
    return cut


@triton.jit
def _cuts_kernel(largest_logits, bound_keys, group_masses, num_listed, list_ranks, list_masses, top_ks, top_ps,
                 min_masses, cuts,
                 survivor_masses, V, G, PADDED_G: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (B,). Step 2 on the list: the lowest rank that stays (B,), and the groups' masses of what stays (B, G)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(num_listed + row)
    ranks, masses = list_ranks + row * V, list_masses + row * V
    k, p = tl.load(top_ks + row), tl.load(top_ps + row)
    by_count = (k > 0) & (k < V)
    highest = (_key(tl.load(largest_logits + row)) << 31) | LAST_ID
    # of a row cut by count what is smaller is not listed and not among the first k
    cut = tl.load(bound_keys + row) << 31
    if by_count & (n > k):
        cut = _cut(ranks, masses, n, cut, highest, k, False, BLOCK)
    if p < 1.0:
        total = k * 0
        if by_count:
            for start in range(0, n, BLOCK):
                at = start + tl.arange(0, BLOCK)
                stays = tl.load(ranks + at, mask=at < n, other=-1) >= cut
                total += tl.sum(tl.where(stays, tl.load(masses + at, mask=at < n, other=0), 0), 0)
        else:
            groups = tl.arange(0, PADDED_G)
            total += tl.sum(tl.load(group_masses + row * G + groups, mask=groups < G, other=0), 0)
        need = tl.minimum(tl.maximum(tl.ceil(total.to(tl.float64) * p).to(tl.int64), 1), total)
        cut = _cut(ranks, masses, n, cut, highest, need, True, BLOCK)
    tl.store(cuts + row, cut)
    least = tl.maximum(tl.load(min_masses + row), 1)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        rank = tl.load(ranks + at, mask=at < n, other=-1)
        w = tl.load(masses + at, mask=at < n, other=0)
        group = ((rank & LAST_ID) ^ LAST_ID) // GROUP
        tl.atomic_add(survivor_masses + row * G + group, w, mask=(at < n) & (rank >= cut) & (w >= least), sem="relaxed")


@triton.jit
def _draw_kernel(logits, largest_logits, scales, min_masses, cuts, group_masses, seeds, positions, tokens, logprobs,
                 row_stride, V, G, PADDED_G: tl.constexpr, FILTERED: tl.constexpr):
    """Grid (B,). Steps 3 to 6; token -1 for a row that holds NaN, +inf, or nothing but -inf."""
    row = tl.program_id(0).to(tl.int64)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    groups = tl.arange(0, PADDED_G)
    weights = tl.load(group_masses + row * G + groups, mask=groups < G, other=0)
    group = _winner(groups, weights, 1, seed, position)
    largest = tl.load(largest_logits + row)
    ids = tl.minimum(group, G - 1) * GROUP + tl.arange(0, GROUP)
    x = tl.load(logits + row * row_stride + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    w = _mass(x, largest, tl.load(scales + row))
    stays = (ids < V) & (w >= tl.load(min_masses + row))
    if FILTERED:
        stays &= _rank(_key(x), ids) >= tl.load(cuts + row)
    w = tl.where(stays, w, 0)
    token = _winner(ids, w, 0, seed, position)
    mass = tl.maximum(tl.sum(tl.where(ids == token, w, 0), 0), 1)
    share = _log2(mass.to(tl.float64)) - _log2(tl.maximum(tl.sum(weights, 0), 1).to(tl.float64))
    tl.store(tokens + row, tl.where(tl.abs(largest) < float("inf"), token, -1).to(tl.int64))
    tl.store(logprobs + row, (share * 0.6931471805599453).to(tl.float32))


def groups_per_program(num_rows: int, num_tokens: int, filtered: bool) -> int:
    """How many groups of 256 a program takes: few for few rows, so that one row fills a GPU, and few where a list is
    gathered, which takes registers."""
    return 4 if filtered or num_rows * num_tokens < 1 << 20 else 16


def sample(logits: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_mass: Tensor, seed: Tensor,
           position: Tensor, *,
           filtered: bool = True, num_groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Tokens (B,) int64, -1 for a row without a distribution, and their log-probabilities (B,) float32.

    Args:
        logits: (B, V) float32, bfloat16 or float16; rows contiguous.
        scale, top_k, top_p, min_mass, seed, position: (B,), as `RowParameters` in fasttrain/ops/sample.py has them.
        filtered: False promises that neither top-k nor top-p does anything in any row, and saves their kernels.
        num_groups: groups per program, a power of two; changes no result.
    """
    _check(logits)
    B, V = logits.shape
    G = triton.cdiv(V, GROUP.value)
    device = logits.device
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    logprobs = torch.empty(B, dtype=torch.float32, device=device)
    if B == 0:
        return tokens, logprobs
    scale, top_k, top_p, min_mass, seed, position = (
        t.contiguous() for t in (scale, top_k, top_p, min_mass, seed, position))
    per_program = num_groups or groups_per_program(B, V, filtered)
    grid = (B, triton.cdiv(G, per_program))
    padded = triton.next_power_of_2(G)
    maxima = torch.empty(B, G, dtype=torch.float32, device=device)
    masses = torch.empty(B, G, dtype=torch.int64, device=device)
    largest = torch.empty(B, dtype=torch.float32, device=device)
    bound_keys, bound_masses, cuts = torch.empty(3, B, dtype=torch.int64, device=device).unbind()
    stride = logits.stride(0)
    num_listed, ranks, listed, survivors = None, None, None, masses
    if filtered:
        num_listed = torch.zeros(B, dtype=torch.int32, device=device)
        ranks, listed = torch.empty(2, B, V, dtype=torch.int64, device=device).unbind()
        survivors = torch.zeros_like(masses)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, wherever the tensors are
        _maxima_kernel[grid](logits, maxima, stride, V, G, GROUPS=per_program, **OPTIONS)
        _bounds_kernel[(B,)](maxima, scale, top_k, top_p, largest, bound_keys, bound_masses, V, G, PADDED_G=padded,
                             FILTERED=filtered, **OPTIONS)
        _masses_kernel[grid](logits, largest, scale, min_mass, bound_keys, bound_masses, masses, num_listed, ranks,
                             listed, stride, V, G, GROUPS=per_program, FILTERED=filtered, **OPTIONS)
        if filtered:
            _cuts_kernel[(B,)](largest, bound_keys, masses, num_listed, ranks, listed, top_k, top_p, min_mass, cuts,
                               survivors, V, G,
                               PADDED_G=padded, BLOCK=1024, **OPTIONS | {"num_warps": CUT_WARPS})
        _draw_kernel[(B,)](logits, largest, scale, min_mass, cuts, survivors, seed, position, tokens, logprobs, stride,
                           V, G,
                           PADDED_G=padded, FILTERED=filtered, **OPTIONS)
    return tokens, logprobs


def _check(logits: Tensor) -> None:
    if logits.device.type == "cpu" and not INTERPRETED:
        raise ValueError("got a CPU tensor; Triton kernels run on a GPU (or on the CPU in a process started with "
                         "TRITON_INTERPRET=1, which is for tests)")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype}; the Triton kernels take float32, bfloat16 and float16")
    if logits.stride(1) != 1 and logits.size(1) > 1:
        raise ValueError(f"logits have strides {logits.stride()}; the Triton kernels take contiguous rows")
    if logits.size(1) >= 2**31:
        raise ValueError(f"logits have {logits.size(1)} tokens; an id must fit in 31 bits")
