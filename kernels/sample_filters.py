"""Triton kernels that find what top-k, top-p and min-p leave of a row: step 2 in fasttrain/ops/sample.py.

`bounds_kernel` takes from the groups' maxima and estimated masses a logit that a token must reach to matter and lists
the groups that hold one, `list_kernel` reads those groups once more for a list of such tokens, and `cuts_kernel` finds
the cut among them with exact masses. What top-p keeps depends on the exact mass of all tokens, of which the estimate
leaves a share of 2 * ERROR open: tokens that fall into it, seldom more than a few, are passed on as doubtful.

Legend: B rows, V tokens, G groups. An entry of a list is 8 bytes: a logit of float32 and its id, or two neighbouring
logits of 16 bits and the id of the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sample_masses import (
    ERROR,
    GROUP,
    LAST_ID,
    LOWEST,
    LOWEST_KEY,
    estimated_mass,
    exponents_of,
    larger_number,
    load_groups,
    log2,
    logit_of,
    mass_of,
    order_key,
    rank_of,
)  # fmt: skip

DIGITS: tl.constexpr = tl.constexpr(16)
STEPS_PER_BIT: tl.constexpr = tl.constexpr(64)  # in which top-p's bound is sought
NOTHING_BELOW: tl.constexpr = tl.constexpr(40 * 64)  # so many steps down masses are 0


@triton.jit
def _steps_down(maximum, share, largest, scale, total, p, V, G):
    # For top-p: how many steps below the largest logit the bound can be, NOTHING_BELOW + 1 if no less than all tokens
    # are surely enough. Below the bound lie at most: all of a group whose maximum lies below, of others what is left
    # beside the maximum, but no more than 255 tokens at the bound.
    exponents = exponents_of(maximum, largest, scale)
    mass = estimated_mass(share, exponents)
    whole = mass * (1.0 + ERROR)
    rest = tl.maximum(whole - estimated_mass(exponents * 0.0 + 1.0, exponents) * (1.0 - ERROR) + 1.0, 0.0)
    allowed = total * (1.0 - p - 1.0625 * ERROR * (1.0 + p)) - 2.0 * V
    fails = (total * 0.0).to(tl.int32) - 1
    holds = fails + NOTHING_BELOW + 2
    while holds - fails > 1:
        steps = (fails + holds) // 2
        down = steps.to(tl.float32) / STEPS_PER_BIT
        most = tl.exp2(40.0 - down).to(tl.float64) * (GROUP - 1) * (1.0 + 2.0 * ERROR)
        dropped = tl.sum(tl.where(exponents >= 40.0 - down, tl.minimum(rest, most), whole), 0)
        holds = tl.where(dropped <= allowed, steps, holds)
        fails = tl.where(dropped <= allowed, fails, steps)
    return holds


@triton.jit
def bounds_kernel(maxima, shares, scales, top_ks, top_ps, min_masses, bounds, estimates, live_groups, num_live, V, G,
                  PADDED_G: tl.constexpr):
    """Grid (B,). The logit that a token must reach to matter, +inf where no filter is on; the estimated mass of all
    tokens (B,) float64, 0 where the list will hold all that weigh anything; and the groups whose maximum reaches the
    bound: the first num_live of (B, G)."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, PADDED_G)
    maximum = tl.load(maxima + row * G + groups, mask=groups < G, other=float("-inf"))
    share = tl.load(shares + row * G + groups, mask=groups < G, other=0.0)
    largest = tl.max(maximum, 0)
    k, p, least = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_masses + row)
    scale = tl.load(scales + row)
    by_count = (k > 0) & (k < V)
    is_on = ((p < 1.0) | (least > 1) | by_count) & (tl.abs(largest) < float("inf"))
    total = p * 0.0
    exponent = p * 0.0  # of the least mass that matters
    if p >= 1.0:
        exponent = log2(tl.maximum(least, 1).to(tl.float64))
    elif is_on & ((k <= 0) | (k >= V)):
        total = tl.sum(estimated_mass(share, exponents_of(maximum, largest, scale)), 0)
        steps = _steps_down(maximum, share, largest, scale, total, p, V, G)
        total = tl.where(steps > NOTHING_BELOW, 0.0, total)
        exponent = tl.maximum(40.0 - steps.to(tl.float64) / STEPS_PER_BIT, 0.0)
    tl.store(estimates + row, total)
    # Both margins are far above what rounding does to a mass and to this sum.
    bound = largest.to(tl.float64) + (exponent - 40.0009765625) / scale.to(tl.float64)
    bound = tl.maximum(bound - tl.abs(bound) * 2.384185791015625e-07, LOWEST).to(tl.float32)
    if by_count & (k <= G):  # the k-th largest of the groups' maxima: at least k tokens reach it
        keys = order_key(maximum)
        low, high = k * 0 + LOWEST_KEY, tl.max(keys, 0) + 1
        while high - low > 1:
            middle = (low + high) // 2
            enough = tl.sum((keys >= middle).to(tl.int32), 0) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        bound = tl.maximum(bound, logit_of(low))
    tl.store(bounds + row, tl.where(is_on, bound, float("inf")))
    is_live = tl.where(is_on, maximum, float("-inf")) >= bound  # never -inf
    place = tl.cumsum(is_live.to(tl.int32), 0)
    tl.store(live_groups + row * G + place - 1, groups, mask=is_live)
    tl.store(num_live + row, tl.max(place, 0))


@triton.jit
def _by_thread(x, GROUPS: tl.constexpr, THREADS: tl.constexpr):
    # From (STEPS, GROUPS, 256 / STEPS), as `load_groups` has it, to (tokens of a thread, THREADS).
    STEPS: tl.constexpr = x.shape[0]
    x = tl.reshape(x, [STEPS, GROUPS * 8 // THREADS, THREADS // 8, 8, 32 // STEPS])
    return tl.reshape(tl.permute(x, 1, 0, 4, 2, 3), [GROUPS * GROUP // THREADS, THREADS])


@triton.jit
def _neighbours(x):
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), 0, 2, 1))


@triton.jit
def _entry_bound(pointer, element: tl.constexpr):
    # A pair of bfloat16 as one float32 differs from its second by less than a bit of bfloat16, or the least normal one.
    bound = tl.load(pointer)
    if element == tl.bfloat16:
        bound = tl.maximum(bound - (tl.abs(bound) * 0.0078125 + 1.1754943508222875e-38), LOWEST)
    # Of zeros the negative one, from which no zero differs by a negative number.
    return tl.where(bound == 0.0, -2147483648, bound.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def list_kernel(logits, live_groups, num_live, bounds, num_entries, entries, row_stride, V, G, capacity,
                GROUPS: tl.constexpr, THREADS: tl.constexpr):
    """Grid (B, splits). Entries of all tokens that reach the bound, in any order: the first num_entries of (B,
    capacity) uint64. A pair's other token need not reach it. Logits are read of live groups only."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS
    n = tl.load(num_live + row)
    if first < n:
        at = first + tl.arange(0, GROUPS)
        groups = tl.load(live_groups + row * G + at, mask=at < n, other=G)
        ids, x = load_groups(logits + row * row_stride, groups, V)
        ids, x = _by_thread(ids, GROUPS, THREADS), _by_thread(x, GROUPS, THREADS)
        bound = _entry_bound(bounds + row, x.dtype)
        if x.dtype == tl.float32:
            value, larger = x.to(tl.uint32, bitcast=True), x
        else:
            low, high = _neighbours(x.to(tl.uint16, bitcast=True))
            value = low.to(tl.uint32) | (high.to(tl.uint32) << 16)
            if x.dtype == tl.bfloat16:
                # A pair of which the second is -inf may be NaN as one number.
                larger = larger_number((value << 16).to(tl.float32, bitcast=True), value.to(tl.float32, bitcast=True))
            else:
                low, high = _neighbours(x.to(tl.float32))
                larger = tl.maximum(low, high)
            ids = _neighbours(ids)[0]
        # A thread's entries lie together. The sign of a difference is -1 where the entry does not reach the bound.
        short = tl.cumsum((larger - bound).to(tl.int32, bitcast=True) >> 31, 0)
        counts = tl.sum((larger - bound).to(tl.int32, bitcast=True) >> 31, 0) + larger.shape[0]
        start = tl.atomic_add(num_entries + row, tl.sum(counts, 0), sem="relaxed")
        target = entries + (row * capacity + start + (tl.cumsum(counts, 0) - counts).to(tl.int64))
        bound = _entry_bound(bounds + row, x.dtype)  # once more, or the compiler would keep every comparison's outcome
        place = tl.arange(0, larger.shape[0])[:, None] + short
        entry = (value.to(tl.uint64) << 32) | ids.to(tl.uint32).to(tl.uint64)
        tl.store(target[None] + place, entry, mask=larger >= bound)




@triton.jit
def listed_tokens(entries, start, n, bound, BLOCK: tl.constexpr, element: tl.constexpr):
    # A block of a list's tokens from `start`: logits and ranks, -1 past the end and below the bound.
    at = start + tl.arange(0, BLOCK)
    if element == tl.float32:
        entry = tl.load(entries + at, mask=at < n, other=0)
        x = (entry >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
        ids = (entry & LAST_ID).to(tl.int32)
    else:
        entry = tl.load(entries + (at >> 1), mask=at < n, other=0)
        x = (entry >> (32 + 16 * (at & 1)).to(tl.uint64)).to(tl.uint16).to(element, bitcast=True).to(tl.float32)
        ids = (entry & LAST_ID).to(tl.int32) + (at & 1)
    return x, tl.where((at < n) & (x >= bound), rank_of(x, ids), -1)


@triton.jit
def find_cut(entries, n, bound, lowest, highest, need, largest, scale, BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
             element: tl.constexpr):
    """Of n listed tokens with lowest <= rank <= highest the rank of the one that brings those from the top of the order
    to `need`, by mass or by count, and what it and equals bring of it: digit by digit from the first that differs,
    until one token is left."""
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
            x, rank = listed_tokens(entries, start, n, bound, BLOCK, element)
            head = rank >> shift
            is_left = (rank >= lowest) & (rank <= highest) & ((head >> 4) == prefix)
            of_digit = is_left[:, None] & ((head & 15)[:, None] == digits[None, :])
            counts += tl.sum(of_digit.to(tl.int32), 0)
            if BY_MASS:
                weights += tl.sum(tl.where(of_digit, mass_of(x, largest, scale)[:, None], 0), 0)
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
            _, rank = listed_tokens(entries, start, n, bound, BLOCK, element)
            is_left = (rank <= highest) & (((rank >> shift) >> 4) == prefix)
            cut = tl.maximum(cut, tl.max(tl.where(is_left, rank, 0), 0))
    return cut, need


@triton.jit
def needed_mass(total, p):
    # Of top-p, step 2.
    return tl.minimum(tl.maximum(tl.ceil(total.to(tl.float64) * p).to(tl.int64), 1), total)


@triton.jit
def cuts_kernel(maxima, scales, bounds, estimates, num_entries, entries, top_ks, top_ps, min_masses, cuts,
                doubtful_cuts, reached_masses, survivor_masses, doubtful_masses, V, G, capacity, BLOCK: tl.constexpr,
                PADDED_G: tl.constexpr, element: tl.constexpr):
    """Grid (B,). Step 2 on the list: the lowest rank that surely stays (B,), 0 where no filter is on; the lowest that
    may stay, equal to it where nothing is in doubt; the mass down to the former before min-p; and the groups' masses
    (B, G) of what surely stays and of what may."""
    row = tl.program_id(0).to(tl.int64)
    n, bound = tl.load(num_entries + row), tl.load(bounds + row)
    if element != tl.float32:
        n *= 2
    groups = tl.arange(0, PADDED_G)
    largest = tl.max(tl.load(maxima + row * G + groups, mask=groups < G, other=float("-inf")), 0)
    scale = tl.load(scales + row)
    entries += row * capacity
    k, p = tl.load(top_ks + row), tl.load(top_ps + row)
    by_count = (k > 0) & (k < V)
    highest = (order_key(largest) << 31) | LAST_ID
    # Of a row cut by count what is smaller is not listed and not among the first k.
    lowest = tl.where(bound < float("inf"), order_key(bound) << 31, 0)
    if by_count:
        count = k * 0
        for start in range(0, n, BLOCK):
            _, rank = listed_tokens(entries, start, n, bound, BLOCK, element)
            count += tl.sum((rank >= 0).to(tl.int64), 0)
        if count > k:
            lowest, _ = find_cut(entries, n, bound, lowest, highest, k, largest, scale, False, BLOCK, element)
    cut = lowest
    doubtful = lowest
    reached = k * 0
    if (p < 1.0) & (n > 0):
        estimate = tl.load(estimates + row)
        low = (estimate * (1.0 - ERROR)).to(tl.int64) - V
        high = (estimate * (1.0 + ERROR)).to(tl.int64) + 1
        if estimate == 0.0:  # all that count are listed
            low = k * 0
            for start in range(0, n, BLOCK):
                x, rank = listed_tokens(entries, start, n, bound, BLOCK, element)
                low += tl.sum(tl.where(rank >= lowest, mass_of(x, largest, scale), 0), 0)
            high = low
        need = needed_mass(low, p)
        is_first = n > 0
        is_open = is_first
        while is_open:
            doubtful, left = find_cut(entries, n, bound, lowest, highest, need, largest, scale, True, BLOCK, element)
            more = need - left + mass_of(logit_of(doubtful >> 31), largest, scale)
            if is_first:
                cut = doubtful
                reached = more
            highest = doubtful - 1
            need = needed_mass(high, p) - more
            is_open = is_first & (need > 0)
            is_first = n < 0
    tl.store(cuts + row, cut)
    tl.store(doubtful_cuts + row, doubtful)
    tl.store(reached_masses + row, reached)
    least = tl.maximum(tl.load(min_masses + row), 1)
    for start in range(0, n, BLOCK):
        x, rank = listed_tokens(entries, start, n, bound, BLOCK, element)
        w = mass_of(x, largest, scale)
        group = row * G + ((rank & LAST_ID) ^ LAST_ID) // GROUP
        stays = (rank >= 0) & (w >= least)
        tl.atomic_add(survivor_masses + group, w, mask=stays & (rank >= cut), sem="relaxed")
        if doubtful < cut:
            tl.atomic_add(doubtful_masses + group, w, mask=stays & (rank >= doubtful) & (rank < cut), sem="relaxed")
