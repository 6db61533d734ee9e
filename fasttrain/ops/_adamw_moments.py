"""AdamW's moments in two bytes or one, and bfloat16 parameters with all of float32: the codes, and the random bits that
round into them, in plain PyTorch.

A moment moves by less than a narrow type can hold, so rounding to nearest would stop it; here it is rounded up or down
with the probability that makes the mean exact. This file is the specification: the kernels repeat it bit for bit.

bfloat16: sixteen random bits are added below the bits that are kept and the rest is cut off: the carry is the rounding.
int8: a float with 3 bits of mantissa, rounded the same way (twenty random bits below the kept ones). Blocks
    of 256 elements share one float32 scale, 2^E with E the exponent of the block's largest magnitude once rounded up.
    m: bit 7 is the sign, 1..127 are the float's values from 1.125 * 2^(E-15) up to 1.875 * 2^E; a smaller magnitude
    becomes code 1 or 0 with its probability. v: 1..255, from 1.125 * 2^(E-31); what is not zero is at least code 1:
    a v of 0 under an m that is not would be a step of m / eps. A power of two as scale costs no rounding and no
    division, so widening and narrowing again gives the same value, and a reload changes nothing.
Random bits of parameter k in step t: Philox4x32-7 with key `seed` and counters (c, its high word, t, k); seven rounds
    are the fewest that pass BigCrush (Salmon et al. 2011). Of each 64 elements, i and i + 32 share word i / 8 of
    counter (element / 64) * 8 + i mod 8: m of the first and v of the second take its lowest 16 or 20 bits, the other
    two its highest, so the two moments of an element never round with the same bits (of the eight that 20 and 20
    share, those of the highest weigh 2^-12). Elements are counted in the whole parameter in row-major order, so
    neither threads, nor devices, nor sharding, nor a resume can change a bit.
Remainder: a float32 master w lives as the bfloat16 parameter p, its upper half, and 16 bits, its lower half as a signed
    number: bits(w) = bits(p) * 2^16 + remainder, so p is w rounded to nearest. A tie goes away from zero: to even, the
    two neighbours of a tie would share their remainder and w could not be told. NaN is kept as the quiet one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = "moment_scales"
"""State key of the (2, blocks) float32 scales of both moments; its presence says that they are 8-bit codes."""

REMAINDER = "remainder"
"""State key of the int16 lower halves of a bfloat16 parameter's float32 master; its presence says that there is one."""

BLOCK = 256
SMALLEST_CODED = 4096
"""Parameters with fewer elements, all shards together, keep float32 moments under state_dtype="int8"."""

_TOP = (127, 255)
_MASK = 0xFFFFFFFF


def new_moments(p: Tensor, state_dtype: str, global_numel: int) -> dict[str, Tensor]:
    """State entries of a parameter that has not moved yet."""
    if state_dtype == "int8" and p.is_floating_point() and global_numel >= SMALLEST_CODED:
        blocks = -(-p.numel() // BLOCK)
        coded = {key: torch.zeros(p.shape, dtype=torch.uint8, device=p.device) for key in MOMENTS}
        return {**coded, SCALES: torch.zeros((2, blocks), dtype=torch.float32, device=p.device)}
    dtype = torch.bfloat16 if state_dtype == "bfloat16" else wide_dtype(p)
    return {key: torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format) for key in MOMENTS}


def joined(p: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 parameter."""
    return ((p.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16 parameter, int16 remainder) of a float32 master: `joined` gives it back, bit for bit but for NaN."""
    bits = master.contiguous().view(torch.int32)
    bits = torch.where(master.isnan(), (bits & -(1 << 31)) | 0x7FC00000, bits)
    low = (bits << 16) >> 16  # sign-extended
    return ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def wide_dtype(p: Tensor) -> torch.dtype:
    """What a parameter is computed in."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def widened(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both moments as float32 (float64 where they are), in the parameter's shape."""
    if SCALES not in state:
        m, v = (state[key] if state[key].dtype == torch.float64 else state[key].float() for key in MOMENTS)
        return m, v
    m, v = (_decoded(state[key], scale, top) for key, scale, top in zip(MOMENTS, state[SCALES], _TOP))
    return m, v


def keep(state: dict[str, Any], m: Tensor, v: Tensor, *, seed: int, parameter: int, offset: int = 0) -> None:
    """Writes both moments into the state, rounded as it keeps them, with the random bits of the step it is at."""
    if not is_narrow(state):
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        return
    noises = random_bits(20 if SCALES in state else 16, m.shape, seed=seed, step=state["step"], parameter=parameter,
                         offset=offset, device=m.device)
    for which, (key, wide, noise) in enumerate(zip(MOMENTS, (m, v), noises)):
        if SCALES in state:
            codes, scale = _encoded(wide, noise, _TOP[which])
            state[key].copy_(codes)
            state[SCALES][which].copy_(scale)
        else:
            state[key].copy_(_rounded(wide, noise))


def is_narrow(state: dict[str, Any]) -> bool:
    return SCALES in state or state["exp_avg"].dtype == torch.bfloat16


def random_bits(num_bits: int, shape: torch.Size, *, seed: int, step: Tensor | int, parameter: int, offset: int = 0,
                device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Random `num_bits`-bit numbers, int64, for m and for v of each element of a shard that starts at `offset`."""
    numel = shape.numel()
    first = offset // 64
    units = -(-(offset + numel) // 64) - first
    counter = torch.arange(first * 8, (first + units) * 8, device=device)
    fixed = [torch.as_tensor(x, device=device).to(torch.int64) & _MASK for x in (step, parameter, seed, seed >> 32)]
    words = _philox((counter & _MASK, counter >> 32, fixed[0], fixed[1]), (fixed[2], fixed[3]))
    word = torch.stack([word.view(units, 8) for word in words], dim=1).view(units, 32)
    low, high = word & (1 << num_bits) - 1, word >> 32 - num_bits
    both = torch.stack([low, high], dim=1).flatten(), torch.stack([high, low], dim=1).flatten()  # (units * 64,)
    m, v = (noise[offset - first * 64:][:numel].view(shape) for noise in both)
    return m, v


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-7 on int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # all 64 bits of the products, sign or no sign
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def round_stochastically(wide: Tensor, narrow: Tensor, *, seed: int, step: int = 0, parameter: int = 0) -> None:
    """Writes float32 `wide` into bfloat16 `narrow`, up or down with the probability that makes the mean exact.

    Infinities and NaN are passed on as they are.
    """
    noise, _ = random_bits(16, wide.shape, seed=seed, step=step, parameter=parameter, device=wide.device)
    narrow.copy_(_rounded(wide, noise))


def _rounded(wide: Tensor, bits: Tensor) -> Tensor:
    up = (wide.contiguous().view(torch.int32) + bits.to(torch.int32)) & -(1 << 16)
    return torch.where(torch.isfinite(wide), up.view(torch.float32), wide)


def _code_base(exponent: Tensor, top: int) -> Tensor:
    """What is subtracted from a float's sign-less upper 11 bits to give its code."""
    return ((exponent << 3) + (7 - top)).clamp(min=0)


def _decoded(codes: Tensor, scales: Tensor, top: int) -> Tensor:
    base = _per_element(_code_base(scales.view(torch.int32) >> 23, top), codes.numel()).view(codes.shape)
    code = codes.to(torch.int32)
    magnitude = torch.where(code & top != 0, ((code & top) + base) << 20, 0).view(torch.float32)
    return torch.where(code > top, -magnitude, magnitude)


def _encoded(wide: Tensor, bits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes in the shape of `wide`, and (blocks,) scales; `bits` are 20 for each element."""
    pattern = wide.contiguous().view(torch.int32).flatten()
    magnitude, noise = (pattern & 0x7FFFFFFF).to(torch.int64), bits.flatten()
    blocks = torch.nn.functional.pad(magnitude, (0, -magnitude.numel() % BLOCK)).view(-1, BLOCK)
    exponent = ((blocks.amax(dim=1) + 0xFFFFF) >> 23).clamp(max=255)  # (blocks,)
    base = _per_element(_code_base(exponent, top), magnitude.numel())
    code = (((magnitude + noise) >> 20) - base).clamp(max=top)
    lowest = (base + 1) << 20
    if top == _TOP[0]:
        size, unit = (x.to(torch.int32).view(torch.float32) for x in (magnitude, lowest))
        drawn = size * 2.0**20 > noise.to(torch.float32) * unit  # exact products
        code = torch.where(magnitude < lowest, drawn.to(torch.int64), code)
        code = code | torch.where(pattern < 0, 0x80, 0)
    else:
        code = torch.where(magnitude == 0, 0, code.clamp(min=1))
    scales = (exponent << 23).to(torch.int32).view(torch.float32)
    return code.to(torch.uint8).view(wide.shape), scales


def _per_element(per_block: Tensor, numel: int) -> Tensor:
    return per_block.repeat_interleave(BLOCK)[:numel]
