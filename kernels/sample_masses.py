"""What sampling kernels compute of single tokens and of groups, by the specification in fasttrain/ops/sample.py.

A key orders float32 as an unsigned 32-bit number (equal for both zeros); a rank puts the id below it,
key * 2^31 + (2^31 - 1 - id), so that ranks are unique and order tokens. To be compiled without fused multiply-adds.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

GROUP: tl.constexpr = tl.constexpr(256)
LAST_ID: tl.constexpr = tl.constexpr(2**31 - 1)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # the most negative finite float32
LOWEST_KEY: tl.constexpr = tl.constexpr(0x00800000)  # its key
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
ERROR: tl.constexpr = tl.constexpr(2.0**-16)
"""An estimated mass W of n tokens is within W * ERROR + n of the exact one. Relative errors, with u = 2^-24, of tokens
from -42 up (below, both are less than the one unit that rounding down a mass may take): exp2's argument is off by 2
roundings of at most 42 in step 1 and one of at most 74 in the estimate, 158 u ln 2 = 6.5e-6; two exp2 by 4.8e-7 each
(twice what PTX promises), step 1's polynomial by 1.1e-7; the sum by 35 roundings in whatever order, 2.1e-6. Together
9.7e-6, and 2^-16 = 1.53e-5."""


@triton.jit
def order_key(x):
    # int64, so that comparisons mean the same everywhere. Adding 0 makes -0 into +0.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def logit_of(key):
    bits = tl.where(key < 2147483648, -1 - key, key - 2147483648)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def rank_of(x, ids):
    return (order_key(x) << 31) | (ids ^ LAST_ID).to(tl.int64)


@triton.jit
def mass_of(x, largest, scale):
    # Step 1, which has -100 where this has -63: the mass is 0 from -42 down, and so the shift below needs no bound.
    t = tl.maximum((x - largest) * scale, -63.0)
    n = tl.floor(t + 0.5)
    whole = (power_of_two(t - n) * 16777216.0).to(tl.int32).to(tl.int64) << 16
    return whole >> (-n).to(tl.int32).to(tl.int64)


@triton.jit
def power_of_two(f):
    # 2^f of f in [-0.5, 0.5], as in step 1.
    p = f * 0.00015353362 + 0.0013398875
    p = p * f + 0.009618437
    p = p * f + 0.055503324
    p = p * f + 0.24022648
    p = p * f + 0.6931472
    return p * f + 1.0


@triton.jit
def log2(v):
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
def exponents_of(maximum, largest, scale):
    # log2 of a token's mass, float64, 40 for the largest, from -160 up.
    return 40.0 + tl.maximum((maximum.to(tl.float64) - largest.to(tl.float64)) * scale.to(tl.float64), -200.0)


@triton.jit
def estimated_mass(share, exponent):
    # Of tokens that have `share` times the mass of one with that exponent: float64.
    n = tl.floor(exponent + 0.5)
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return share.to(tl.float64) * power_of_two(exponent - n) * power


@triton.jit
def noise_of(ids, DOMAIN: tl.constexpr, seed, position):
    # Steps 3 and 4: -log2(u), positive float64.
    zero = ids.to(tl.uint32) * 0
    c2 = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + (position >> 32).to(tl.uint32)
    r0, r1, _, _ = tl.philox(seed, ids.to(tl.uint32), zero + DOMAIN, c2, c3)
    return -log2((2 * ((r0.to(tl.int64) << 20) | (r1.to(tl.int64) >> 12)) + 1).to(tl.float64) * 1.1102230246251565e-16)


@triton.jit
def quotient(noise, weight):
    # Step 5. A weight of 0 never wins.
    return tl.where(weight > 0, noise / tl.where(weight > 0, weight, 1).to(tl.float64), float("inf"))


@triton.jit
def load_groups(x_row, groups, V):
    # Ids (STEPS, groups, 256 / STEPS) of groups of a row, and their logits, -inf past the end. 8 threads hold a group,
    # 32 tokens each, in loads of 16 bytes: then little of a sum over a group goes through other threads.
    STEPS: tl.constexpr = x_row.dtype.element_ty.primitive_bitwidth // 4
    WIDTH: tl.constexpr = GROUP // STEPS
    steps = (tl.arange(0, STEPS) * WIDTH)[:, None, None]
    ids = steps + (groups * GROUP)[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
    return ids, tl.load(x_row + ids, mask=ids < V, other=float("-inf"))


@triton.jit
def multiply_add(a, b, c):
    # a * b + c of float32, rounded once. The interpreter's own fma rounds twice.
    if INTERPRETED:
        result = (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        result = tl.fma(a, b, c)
    return result


@triton.jit
def larger_number(a, b):
    # The larger, or `a` where b is NaN. The interpreter's own maximum is NaN then.
    if INTERPRETED:
        result = tl.where(b > a, b, a)
    else:
        result = tl.maximum(a, b)
    return result
