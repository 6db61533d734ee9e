"""Triton kernels for drawing one token per row of logits, by the specification in fasttrain/ops/sample.py.

Rows are split over programs, so one row fills a GPU. One pass over the logits finds of every group of 256 ids the
maximum and, in float32, about what mass it has: the estimate's error is bounded, and the draw computes exact masses of
those groups only that could win by that bound, seldom more than one. A filtered row reads the groups that can matter
once more, from the cache, for a list of the tokens that can, and one program per row finds the cut among them with
exact masses. Log-probabilities need the exact total and are the only reason to form the masses of all tokens.
What decides is integers, and the only atomics add integers, so neither a launch shape nor a device's exp2 can change
a token. Compiled without fused multiply-adds, which would.

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
PER_THREAD: tl.constexpr = tl.constexpr(8)
LAST_ID: tl.constexpr = tl.constexpr(2**31 - 1)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # the most negative finite float32
LOWEST_KEY: tl.constexpr = tl.constexpr(0x00800000)  # its key
DIGITS: tl.constexpr = tl.constexpr(16)
ERROR: tl.constexpr = tl.constexpr(2.0**-16)
"""An estimated mass W of n tokens is within W * ERROR + n of the exact one. Relative errors, with u = 2^-24, of tokens
from -42 up (below, both are less than the one unit that rounding down a mass may take): exp2's argument is off by 2
roundings in the estimate and 2 in step 1, 4 * 42 u ln 2 = 6.9e-6; exp2 itself by 4.8e-7 (twice what PTX promises), step
1's polynomial by 5e-7; the sum by 38 roundings in whatever order, 2.3e-6. Together 1.02e-5, and 2^-16 = 1.53e-5."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
LIST_WARPS, CUT_WARPS = 1, 16


@triton.jit
def _key(x):
    # int64, so that comparisons mean the same everywhere. Adding 0 makes -0 into +0.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _logit(key):
    bits = tl.where(key < 2147483648, -1 - key, key - 2147483648)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


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
def _estimate(share, maximum, largest, scale):
    # The mass of a group, float64, whose tokens have `share` times that of its maximum. 2^f as in step 1.
    t = tl.maximum((maximum.to(tl.float64) - largest.to(tl.float64)) * scale.to(tl.float64), -200.0)
    n = tl.floor(t + 0.5)
    f = t - n
    p = f * 0.00015353362 + 0.0013398875
    p = p * f + 0.009618437
    p = p * f + 0.055503324
    p = p * f + 0.24022648
    p = p * f + 0.6931472
    p = p * f + 1.0
    power = ((n.to(tl.int64) + 1063) << 52).to(tl.float64, bitcast=True)  # 2^(40 + n)
    return share.to(tl.float64) * p * power


@triton.jit
def _noise(ids, DOMAIN: tl.constexpr, seed, position):
    # Steps 3 and 4: -log2(u), positive float64.
    zero = ids.to(tl.uint32) * 0
    c2 = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + (position >> 32).to(tl.uint32)
    r0, r1, _, _ = tl.philox(seed, ids.to(tl.uint32), zero + DOMAIN, c2, c3)
    return -_log2((2 * ((r0.to(tl.int64) << 20) | (r1.to(tl.int64) >> 12)) + 1).to(tl.float64) * 1.1102230246251565e-16)


@triton.jit
def _quotient(noise, weight):
    # Step 5. A weight of 0 never wins.
    return tl.where(weight > 0, noise / tl.where(weight > 0, weight, 1).to(tl.float64), float("inf"))


@triton.jit
def _tile(x_row, start, V, GROUPS: tl.constexpr):
    # Ids (GROUPS, 256) from `start`, and their logits in float32, -inf past the end.
    ids = start + tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return ids, tl.load(x_row + ids, mask=ids < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _groups_kernel(logits, scales, maxima, shares, row_stride, V, G, GROUPS: tl.constexpr):
    """Grid (B, splits). Of every group the largest logit and about the sum of its masses as a multiple of that one's,
    both (B, G) float32. The maximum is +inf in a group that holds NaN or +inf."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, x = _tile(logits + row * row_stride, split * (GROUPS * GROUP), V, GROUPS)
    maximum = tl.max(x, 1)
    e = tl.exp2((x - tl.maximum(maximum, LOWEST)[:, None]) * tl.load(scales + row))
    # At most 7 and 31 additions, in any order, to a sum.
    share = tl.sum(tl.sum(tl.reshape(e, [GROUPS, GROUP // PER_THREAD, PER_THREAD]), 2), 1)
    groups = split * GROUPS + tl.arange(0, GROUPS)
    tl.store(maxima + row * G + groups, tl.where(share == share, maximum, float("inf")), mask=groups < G)
    tl.store(shares + row * G + groups, share, mask=groups < G)


@triton.jit
def _bounds_kernel(maxima, shares, scales, top_ks, top_ps, min_masses, largest_logits, bounds, estimates, V, G,
                   PADDED_G: tl.constexpr, FILTERED: tl.constexpr):
    """Grid (B,). The row's largest logit; of filtered rows the logit that a token must reach to matter, +inf where no
    filter is on, and the estimated mass of all tokens (B,) float64."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, PADDED_G)
    x = tl.load(maxima + row * G + groups, mask=groups < G, other=float("-inf"))
    largest = tl.max(x, 0)
    tl.store(largest_logits + row, largest)
    if FILTERED:
        k, p, least = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_masses + row)
        scale = tl.load(scales + row)
        share = tl.load(shares + row * G + groups, mask=groups < G, other=0.0)
        total = tl.sum(_estimate(share, x, largest, scale), 0)
        tl.store(estimates + row, total)
        by_count = (k > 0) & (k < V)
        mass = total * 0.0 + 1.0
        if p >= 1.0:
            mass = tl.maximum(least, 1).to(tl.float64)
        elif not by_count:  # a token with less than half an even share of what is dropped is dropped
            mass = tl.maximum((1.0 - p) * total / (2.0 * V), 1.0)
        # Both margins are far above what rounding does to a mass and to this sum.
        bound = largest.to(tl.float64) + (_log2(mass) - 40.0009765625) / scale.to(tl.float64)
        bound = tl.maximum(bound - tl.abs(bound) * 2.384185791015625e-07, LOWEST).to(tl.float32)
        if by_count & (k <= G):  # the k-th largest of the groups' maxima: at least k tokens reach it
            keys = _key(x)
            low, high = k * 0 + LOWEST_KEY, tl.max(keys, 0) + 1
            while high - low > 1:
                middle = (low + high) // 2
                enough = tl.sum((keys >= middle).to(tl.int32), 0) >= k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            bound = tl.maximum(bound, _logit(low))
        is_on = ((p < 1.0) | (least > 1) | by_count) & (tl.abs(largest) < float("inf"))
        tl.store(bounds + row, tl.where(is_on, bound, float("inf")))


@triton.jit
def _list_kernel(logits, maxima, bounds, num_listed, entries, row_stride, V, G, per_program):
    """Grid (B, splits). The tokens that reach the bound, in any order, logit << 32 | id (B, V) uint64: the first
    num_listed of each row. Logits are read only of groups whose maximum reaches it."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * per_program
    bound = tl.load(bounds + row)
    for group in range(first, tl.minimum(first + per_program, G)):
        if tl.load(maxima + row * G + group) >= bound:
            ids = group * GROUP + tl.arange(0, GROUP)
            x = tl.load(logits + row * row_stride + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
            listed = x >= bound  # never -inf
            place = tl.cumsum(listed.to(tl.int32), 0)
            target = entries + (row * V + tl.atomic_add(num_listed + row, tl.max(place, 0), sem="relaxed"))
            bits = x.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
            tl.store(target + (place - 1), bits | ids.to(tl.uint32).to(tl.uint64), mask=listed)


@triton.jit
def _listed(entries, start, n, BLOCK: tl.constexpr):
    # A block of the list from `start`: logits and ranks, -1 past the end.
    at = start + tl.arange(0, BLOCK)
    entry = tl.load(entries + at, mask=at < n, other=0)
    x = (entry >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    return x, tl.where(at < n, _rank(_key(x), (entry & LAST_ID).to(tl.int32)), -1)


@triton.jit
def _cut(entries, n, lowest, highest, need, largest, scale, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    # The rank of the token that brings those from the top of the order to `need`, of n with lowest <= rank <= highest
    # (smaller ones do not count), and what it and equals bring of it: digit by digit from the first that differs,
    # until one token is left.
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
            x, rank = _listed(entries, start, n, BLOCK)
            head = rank >> shift
            of_digit = ((rank >= lowest) & ((head >> 4) == prefix))[:, None] & ((head & 15)[:, None] == digits[None, :])
            counts += tl.sum(of_digit.to(tl.int32), 0)
            if BY_MASS:
                weights += tl.sum(tl.where(of_digit, _mass(x, largest, scale)[:, None], 0), 0)
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
            _, rank = _listed(entries, start, n, BLOCK)
            cut = tl.maximum(cut, tl.max(tl.where(((rank >> shift) >> 4) == prefix, rank, 0), 0))
    return cut, need


@triton.jit
def _need(total, p):
    # Of top-p, step 2.
    return tl.minimum(tl.maximum(tl.ceil(total.to(tl.float64) * p).to(tl.int64), 1), total)


@triton.jit
def _cuts_kernel(logits, largest_logits, scales, bounds, estimates, num_listed, entries, top_ks, top_ps, min_masses,
                 cuts, survivor_masses, row_stride, V, G, BLOCK: tl.constexpr):
    """Grid (B,). Step 2 on the list: the lowest rank that stays (B,), 0 where no filter is on, and the groups' masses
    of what stays (B, G)."""
    row = tl.program_id(0).to(tl.int64)
    n, bound = tl.load(num_listed + row), tl.load(bounds + row)
    largest, scale = tl.load(largest_logits + row), tl.load(scales + row)
    entries += row * V
    k, p = tl.load(top_ks + row), tl.load(top_ps + row)
    by_count = (k > 0) & (k < V)
    highest = (_key(largest) << 31) | LAST_ID
    # of a row cut by count what is smaller is not listed and not among the first k
    cut = tl.where(bound < float("inf"), _key(bound) << 31, 0)
    if by_count & (n > k):
        cut, _ = _cut(entries, n, cut, highest, k, largest, scale, False, BLOCK)
    if (p < 1.0) & (n > 0):
        # The estimated total leaves the cut open where tokens near it weigh about as little as the error, surely so
        # where most are listed; then the exact one is formed from the row.
        estimate = tl.where(by_count, 0.0, tl.load(estimates + row))
        low = (estimate * (1.0 - ERROR)).to(tl.int64) - V
        high = (estimate * (1.0 + ERROR)).to(tl.int64) + 1
        exact = by_count | (n > V // 2)
        lowest = cut
        is_open = n > 0
        while is_open:
            if exact:
                low = k * 0
                if by_count:
                    for start in range(0, n, BLOCK):
                        x, rank = _listed(entries, start, n, BLOCK)
                        low += tl.sum(tl.where(rank >= lowest, _mass(x, largest, scale), 0), 0)
                else:
                    for start in range(0, V, BLOCK):
                        _, far = _tile(logits + row * row_stride, start, V, BLOCK // GROUP)
                        low += tl.sum(tl.sum(_mass(far, largest, scale), 1), 0)
                high = low
            cut, left = _cut(entries, n, lowest, highest, _need(low, p), largest, scale, True, BLOCK)
            reached = _need(low, p) - left + _mass(_logit(cut >> 31), largest, scale)
            is_open = (reached < _need(high, p)) & (not exact)
            exact = True
    tl.store(cuts + row, cut)
    least = tl.maximum(tl.load(min_masses + row), 1)
    for start in range(0, n, BLOCK):
        x, rank = _listed(entries, start, n, BLOCK)
        w = _mass(x, largest, scale)
        group = ((rank & LAST_ID) ^ LAST_ID) // GROUP
        tl.atomic_add(survivor_masses + row * G + group, w, mask=(rank >= cut) & (w >= least), sem="relaxed")


@triton.jit
def _totals_kernel(logits, largest_logits, scales, cuts, totals, row_stride, V, GROUPS: tl.constexpr,
                   FILTERED: tl.constexpr):
    """Grid (B, splits). Adds the exact masses of all tokens of a row without filters to totals (B,) int64."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wanted = True
    if FILTERED:
        wanted = tl.load(cuts + row) == 0
    if wanted:
        _, x = _tile(logits + row * row_stride, split * (GROUPS * GROUP), V, GROUPS)
        w = _mass(x, tl.load(largest_logits + row), tl.load(scales + row))
        tl.atomic_add(totals + row, tl.sum(tl.sum(w, 1), 0), sem="relaxed")


@triton.jit
def _survivors(x_row, group, largest, scale, least, cut, V):
    # Ids of a group and their masses, 0 where a filter removed the token.
    ids = group * GROUP + tl.arange(0, GROUP)
    x = tl.load(x_row + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    w = _mass(x, largest, scale)
    return ids, tl.where((ids < V) & (w >= least) & (_rank(_key(x), ids) >= cut), w, 0)


@triton.jit
def _draw_kernel(logits, scales, min_masses, maxima, shares, cuts, survivor_masses, totals, seeds, positions, tokens,
                 logprobs, row_stride, V, G, PADDED_G: tl.constexpr, FILTERED: tl.constexpr, LOGPROBS: tl.constexpr):
    """Grid (B,). Steps 3 to 6; token -1 for a row that holds NaN, +inf, or nothing but -inf."""
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + row * row_stride
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    scale, least = tl.load(scales + row), tl.load(min_masses + row)
    groups = tl.arange(0, PADDED_G)
    maximum = tl.load(maxima + row * G + groups, mask=groups < G, other=float("-inf"))
    largest = tl.max(maximum, 0)
    share = tl.load(shares + row * G + groups, mask=groups < G, other=0.0)
    cut = row * 0
    about = _estimate(share, maximum, largest, scale)
    if FILTERED:
        cut = tl.load(cuts + row)
        survivors = tl.load(survivor_masses + row * G + groups, mask=(groups < G) & (cut > 0), other=0)
        about = tl.where(cut > 0, survivors.to(tl.float64), about)
    noise = _noise(groups, 1, seed, position)
    # A group can win if its least possible quotient is below every other's largest possible one: 1 / (1 - ERROR) and
    # less than half of ERROR for the 256 units, where there are 2^26 and more.
    quotients = _quotient(noise, about)
    most = tl.min(tl.where(about >= 67108864.0, quotients * (1.0 + 2.0 * ERROR), float("inf")), 0)
    can_win = quotients * (1.0 - ERROR) <= most
    group = tl.minimum(tl.min(tl.where(can_win, groups, LAST_ID), 0), G - 1)
    if (tl.sum(can_win.to(tl.int32), 0) > 1) & (tl.abs(largest) < float("inf")):
        contender = group
        best = scale.to(tl.float64) * 0.0 + float("inf")
        while contender < G:
            _, w = _survivors(x_row, contender, largest, scale, least, cut, V)
            quotient = _quotient(tl.sum(tl.where(groups == contender, noise, 0.0), 0), tl.sum(w, 0))
            group = tl.where(quotient < best, contender, group)
            best = tl.minimum(quotient, best)
            contender = tl.min(tl.where(can_win & (groups > contender), groups, LAST_ID), 0)
    ids, w = _survivors(x_row, group, largest, scale, least, cut, V)
    quotients = _quotient(_noise(ids, 0, seed, position), w)
    token = tl.min(tl.where(quotients == tl.min(quotients, 0), ids, LAST_ID), 0)
    tl.store(tokens + row, tl.where(tl.abs(largest) < float("inf"), token, -1).to(tl.int64))
    if LOGPROBS:
        total = tl.load(totals + row)
        if FILTERED:
            total = tl.where(cut > 0, tl.sum(survivors, 0), total)
        mass = tl.maximum(tl.sum(tl.where(ids == token, w, 0), 0), 1)
        difference = _log2(mass.to(tl.float64)) - _log2(tl.maximum(total, 1).to(tl.float64))
        tl.store(logprobs + row, (difference * 0.6931471805599453).to(tl.float32))


def groups_per_program(num_rows: int, num_tokens: int) -> int:
    """How many groups of 256 a program takes: few for few rows, so that one row fills a GPU."""
    return 4 if num_rows * num_tokens < 1 << 20 else 16


def sample(logits: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_mass: Tensor, seed: Tensor,
           position: Tensor, *, filtered: bool = True, return_logprobs: bool = True,
           num_groups: int | None = None) -> tuple[Tensor, Tensor]:
    """Tokens (B,) int64, -1 for a row without a distribution, and their log-probabilities (B,) float32.

    Args:
        logits: (B, V) float32, bfloat16 or float16; rows contiguous.
        scale, top_k, top_p, min_mass, seed, position: (B,), as `RowParameters` in fasttrain/ops/sample.py has them.
        filtered: False promises that top-k, top-p and min-p do nothing in any row, and saves their kernels.
        return_logprobs: False leaves them empty, and saves the pass that adds up the masses of rows without filters.
        num_groups: groups per program, a power of two; changes no result.
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
    per_program = num_groups or groups_per_program(B, V)
    grid = (B, triton.cdiv(G, per_program))
    padded = triton.next_power_of_2(G)
    maxima, shares = torch.empty(2, B, G, dtype=torch.float32, device=device).unbind()
    largest = torch.empty(B, dtype=torch.float32, device=device)
    stride = logits.stride(0)
    bounds, estimates, cuts, survivors, totals = None, None, None, None, None
    with torch.cuda.device_of(logits):  # Triton launches on the current device, wherever the tensors are
        _groups_kernel[grid](logits, scale, maxima, shares, stride, V, G, GROUPS=per_program, **OPTIONS)
        if filtered:
            bounds = torch.empty_like(largest)
            estimates = torch.empty(B, dtype=torch.float64, device=device)
        if filtered or return_logprobs:
            _bounds_kernel[(B,)](maxima, shares, scale, top_k, top_p, min_mass, largest, bounds, estimates, V, G,
                                 PADDED_G=padded, FILTERED=filtered, **OPTIONS)
        if filtered:
            num_listed = torch.zeros(B, dtype=torch.int32, device=device)
            entries = torch.empty(B, V, dtype=torch.uint64, device=device)
            cuts = torch.empty(B, dtype=torch.int64, device=device)
            survivors = torch.zeros(B, G, dtype=torch.int64, device=device)
            per_list = max(1, per_program // 4)
            _list_kernel[(B, triton.cdiv(G, per_list))](logits, maxima, bounds, num_listed, entries, stride, V, G,
                                                        per_list, **OPTIONS | {"num_warps": LIST_WARPS})
            _cuts_kernel[(B,)](logits, largest, scale, bounds, estimates, num_listed, entries, top_k, top_p, min_mass,
                               cuts, survivors, stride, V, G, BLOCK=1024, **OPTIONS | {"num_warps": CUT_WARPS})
        if return_logprobs:
            totals = torch.zeros(B, dtype=torch.int64, device=device)
            _totals_kernel[grid](logits, largest, scale, cuts, totals, stride, V, GROUPS=per_program,
                                 FILTERED=filtered, **OPTIONS)
        _draw_kernel[(B,)](logits, scale, min_mass, maxima, shares, cuts, survivors, totals, seed, position, tokens,
                           logprobs, stride, V, G, PADDED_G=padded, FILTERED=filtered, LOGPROBS=return_logprobs,
                           **OPTIONS)
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
