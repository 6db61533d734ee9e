"""Draws one token per row of logits: temperature, top-k, top-p, min-p, and a draw that every implementation repeats.

Survivors are decided and drawn with integer masses, so no order of summation, block size, thread count or batchmate can
change a token; the only floating-point steps are short sequences of single IEEE operations, given below. This file is
the specification: an implementation that follows it returns the same token, bit for bit. Left out: penalties (sparse
edits of the logits, made by the caller before the call) and anything that needs the text.

Specification, for one row x[0..V) with its scalars. "f32" and "f64" are IEEE operations, each rounded to nearest even
on its own: no fused multiply-add, no approximate reciprocal.

0. x is converted to f32. A NaN, +inf or a row of nothing but -inf is an error. Parameters that are no integers are
   rounded to f32 first, whether they came as Python numbers or in a tensor. temperature 0 means temperature 1, top_k 1.
1. Mass of a token, an integer in [0, 2^40], 2^40 for the largest logit:
       c = f32(log2(e) / temperature), the quotient in f64, clamped to [2^-64, 2^64]
       t = max((x[i] - max(x)) * c, -100)                        f32: subtract, multiply, compare
       n = floor(t + 0.5);  f = t - n                            f32; f lies in [-0.5, 0.5]
       p = (((((c6 f + c5) f + c4) f + c3) f + c2) f + c1) f + 1  f32 Horner, EXP2_COEFFICIENTS: 2^f to 1.1e-7
       w[i] = (integer(p * 2^24) << 16) >> min(-n, 63)           the product is a whole number; 64-bit shifts
   A token below about 2^-40 of the likeliest has mass 0 and cannot be drawn.
2. Order of tokens: larger x first, equal x (-0 equals +0) by lower id. A filter that is off changes nothing; a token
   that a filter removes has mass 0 for all that follows.
   top-k  (k > 0)  the first k tokens of the order stay.
   top-p  (p < 1)  need = min(total, max(1, integer(ceil(f64(total) * f64(p))))), total the sum of the masses left;
                   a token stays if the masses before it in the order sum to less than `need`.
   min-p  (m > 0)  a token stays if w[i] >= integer(ceil(f64(m) * 2^40)). The likeliest always stays.
3. Uniforms: r = Philox4x32-10 with key (seed mod 2^32, seed div 2^32) and counter (id, domain, position mod 2^32,
   position div 2^32) (Salmon et al. 2011). u = (2 ((r0 << 20) | (r1 >> 12)) + 1) * 2^-53, exact in f64, never 0 or 1.
4. log2(v) of a positive f64: v = m 2^e with m in [0.5, 1); if m < 0.7071067811865476: m = 2 m, e = e - 1;
       s = (m - 1) / (m + 1);  z = s s;  log2 = e + s * Horner(z), LOG2_COEFFICIENTS highest first.  f64 throughout.
5. Draw: an exponential race, in two heats so that only V/256 + 256 uniforms are needed and not V. Groups are 256 ids
   wide, group g being ids [256 g, 256 g + 256); W[g] is the sum of its masses. The group is the g with W[g] > 0 that
   minimises f64(-log2 u(g, domain 1)) / f64(W[g]); the token is the id in it with w > 0 that minimises
   f64(-log2 u(id, domain 0)) / f64(w[id]). Equal quotients: the lower id. P(group) P(token | group) = w / total.
   A race, not one uniform against cumulated masses: when logits move by a rounding error (another batch size, another
   device) the winner changes with about the probability by which the distribution moved, however many tokens there are.
6. logprob = f32((log2(f64(w)) - log2(f64(total))) * 0.6931471805599453), total over the last survivors; 0 for one.
   Triton may estimate a total and then be off by up to 1e-4: the exact one of a row costs more than reading it.

Shapes: B rows, V tokens, G = ceil(V / 256) groups.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..backend import CPP_PROBLEM, TRITON_INTERPRETED
from ._dispatch import FORCED_IMPL, IMPLEMENTATIONS, Impl, resolve
from ._row_parameters import RowParameters, row_parameters

IMPLEMENTATIONS["sample"] = ("reference", "cpp", "triton")

GROUP_SIZE = 256
TOKEN_DOMAIN, GROUP_DOMAIN = 0, 1
EXP2_COEFFICIENTS = (
    0.00015353362, 0.0013398875, 0.009618437, 0.055503324, 0.24022648, 0.6931472,
)  # fmt: skip
"""c6 .. c1, to be rounded to float32; minimax for relative error on [-0.5, 0.5] with the constant held at 1."""

LOG2_COEFFICIENTS = (
    0.15186263588304878, 0.16972882833987804, 0.19235933878519512, 0.22195308321368668, 0.26230818925253880,
    0.32059889797532520, 0.41219858311113240, 0.57707801635558540, 0.96179669392597560, 2.88539008177792680,
)  # fmt: skip
"""2 / (ln 2 (2 k + 1)) for k = 9 .. 0: the series of 2 artanh(s) / ln 2 = log2((1 + s) / (1 - s)), in s^2."""

_NAMES = ("temperature", "top_k", "top_p", "min_p", "seed", "position")  # in the order of the kernels' arguments
_MASK = 0xFFFFFFFF
# Logits filtered and uniforms drawn at a time. No result depends on it: it bounds the temporaries.
_CHUNK_ELEMENTS, _RACE_ELEMENTS = 1 << 18, 1 << 14


@overload
def sample(
    logits: Tensor, *, temperature: float | Tensor = ..., top_k: int | Tensor = ..., top_p: float | Tensor = ...,
    min_p: float | Tensor = ..., seed: int | Tensor = ..., position: int | Tensor = ...,
    return_logprobs: Literal[False] = ..., impl: Impl = ...,
) -> Tensor: ...  # fmt: skip
@overload
def sample(
    logits: Tensor, *, temperature: float | Tensor = ..., top_k: int | Tensor = ..., top_p: float | Tensor = ...,
    min_p: float | Tensor = ..., seed: int | Tensor = ..., position: int | Tensor = ...,
    return_logprobs: Literal[True], impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    position: int | Tensor = 0,
    return_logprobs: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One token per row, drawn from softmax(logits / temperature) after top-k, top-p and min-p, in that order, each on
    the renormalised survivors of the one before.

    A row's token is a function of its logits and its own parameters: neither batch, nor threads, nor any global
    generator has a part in it. Rows that share seed and position share their randomness; give each its own seed.

    Args:
        logits: (B, V) float32, bfloat16, float16 (float64 is rounded to float32); any strides. Never written to.
        temperature: at least 0; 0 takes the largest logit, of equal ones the lowest id.
        top_k: exactly this many tokens stay, ties to the lower id (0, or V and more: all).
        top_p: in [0, 1]; the smallest leading set of at least this share stays (1: all; 0: the first).
        min_p: in [0, 1]; tokens at least this fraction as likely as the likeliest stay (0: all).
        seed, position: at least 0; the key of the random numbers. A text uses its seed and the index of the new token.
            Each parameter is a number, or a (B,) tensor with one for each row.
        return_logprobs: also return the log-probability (natural, float32) of each token under the processed
            distribution, that is after temperature and filters; to 1e-4 where Triton runs, usually to 1e-6.
        impl: "auto", "reference", "cpp" (CPU) or "triton" (CUDA). Inside torch.compile pass seed and position as
            tensors: a number is a constant there, and every new one compiles again.

    Returns:
        (B,) int64 tokens on the logits' device, with `return_logprobs` a pair of them and (B,) float32.

    Raises:
        ValueError: a shape, dtype or parameter out of its range, or a row with NaN, +inf or no finite logit.

    Equivalent to: the module docstring's specification; in distribution to Hugging Face's warpers and `multinomial`.
    """
    # The usual call of a decoding loop, without the microseconds of looking at each argument: the kernel refuses what
    # it cannot take, and then the long way finds out why.
    kinds = (type(temperature), type(top_k), type(top_p), type(min_p), type(seed), type(position))
    if (impl == "auto" and _CPP_IS_AUTO and logits.is_cpu and not logits.requires_grad and logits.numel()
            and _PLAIN.issuperset(kinds)):
        try:
            op = _SAMPLE if return_logprobs else _SAMPLE_TOKENS
            return op(logits, temperature, top_k, top_p, min_p, seed, position)  # type: ignore[no-any-return]
        except (RuntimeError, TypeError, OverflowError):
            pass
    if logits.dim() != 2 or logits.size(1) == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; they must be (B, V) with at least one token")
    if not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype}; they must be float32, bfloat16, float16 or float64")
    given = dict(zip(_NAMES, (temperature, top_k, top_p, min_p, seed, position)))
    chosen = resolve("sample", impl, logits)
    if chosen == "reference":
        drawn = sample_reference(logits.detach(), row_parameters(logits.size(0), logits.device, given))
        return drawn if return_logprobs else drawn[0]
    interpreted = chosen == "triton" and logits.device.type == "cpu"
    return _run(logits, given, "fasttrain_interpreted" if interpreted else "fasttrain", return_logprobs)


def _run(
    logits: Tensor, given: dict[str, Any], namespace: str, return_logprobs: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The compiled kernels. They check their arguments, faster than it is done here; this finds out what is wrong."""
    if logits.requires_grad:
        logits = logits.detach()
    if logits.dtype == torch.float64:
        logits = logits.float()
    if logits.size(0) == 0:  # no row would look at its parameters
        row_parameters(0, logits.device, given)
        return _fake(logits, return_logprobs=return_logprobs)
    if logits.stride(1) != 1 and logits.size(1) > 1:
        logits = logits.contiguous()
    try:
        numbers, tensors = _kernel_arguments(logits, given)
        # Nobody pays for log-probabilities that nobody asked for: here a tensor, on CUDA a pass over the logits.
        op = getattr(getattr(torch.ops, namespace), "sample_rows" if return_logprobs else "sample_tokens")
        return op(logits, *numbers, *tensors)  # type: ignore[no-any-return]
    except (RuntimeError, TypeError, OverflowError):
        row_parameters(logits.size(0), logits.device, given)
        check_rows(logits.float(), 0)
        raise


def _kernel_arguments(logits: Tensor, given: dict[str, Any]) -> tuple[list[int | float], list[Tensor | None]]:
    """Each parameter as a number for all rows, and as a tensor where it came as one."""
    numbers: list[int | float] = []
    tensors: list[Tensor | None] = []
    for name, value in given.items():
        whole = name in ("top_k", "seed", "position")
        tensor = None
        if isinstance(value, Tensor):
            if value.dtype == torch.bool or value.is_complex() or (whole and value.is_floating_point()):
                raise TypeError(f"{name} is a tensor of {value.dtype}")
            tensor, value = value.to(logits.device, torch.int64 if whole else torch.float32), 0
            if tensor.dim() == 0:
                tensor = tensor.expand(logits.size(0))
        elif isinstance(value, bool):
            raise TypeError(f"{name} is a bool")
        numbers.append(operator.index(value) if whole else float(value))
        tensors.append(tensor)
    return numbers, tensors


def sample_reference(logits: Tensor, parameters: RowParameters) -> tuple[Tensor, Tensor]:
    """The specification in plain PyTorch: tokens (B,) int64 and their log-probabilities (B,) float32."""
    B, V = logits.shape
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(B, dtype=torch.float32, device=logits.device)
    # Many draws from one row (`row.expand(n, -1)`): filter it once.
    shared = B > 1 and logits.stride(0) == 0 and all(tensor.stride(0) == 0 for tensor in parameters[:4])
    filtered_rows = B if shared else max(1, _CHUNK_ELEMENTS // V)
    for start in range(0, B, filtered_rows):
        part = slice(start, start + filtered_rows)
        one_or_part = slice(0, 1) if shared else part
        masses = _survivor_masses(logits[one_or_part], RowParameters(*(p[one_or_part] for p in parameters)), start)
        _race(masses, parameters.seed[part], parameters.position[part], tokens[part], logprobs[part])
    return tokens, logprobs


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 10-round Philox4x32 block function (Salmon et al. 2011) on int64 tensors of 32-bit words, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the 64 product bits, sign or no sign
        c0 = ((p1 >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def open_uniform(r0: Tensor, r1: Tensor) -> Tensor:
    """Two 32-bit words as a float64 strictly between 0 and 1, the odd multiples of 2^-53."""
    return ((r0 << 20) | (r1 >> 12)).mul_(2).add_(1).double().mul_(2.0**-53)


def log2(v: Tensor) -> Tensor:
    """Base-2 logarithm of positive float64 values by the operations of step 4."""
    m, e = torch.frexp(v)
    small = m < 0.7071067811865476
    m, e = torch.where(small, m * 2.0, m), torch.where(small, e - 1, e)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = torch.full_like(z, LOG2_COEFFICIENTS[0])
    for coefficient in LOG2_COEFFICIENTS[1:]:
        series.mul_(z).add_(coefficient)
    return e.double() + s * series


def _survivor_masses(logits: Tensor, parameters: RowParameters, first_row: int) -> Tensor:
    """Steps 0 to 2: int64 masses (R, V) of logits (R, V), 0 where a filter removed the token."""
    x = logits.float()
    largest = check_rows(x, first_row)
    w = token_masses(x, largest, parameters.scale)
    use_top_k = (parameters.top_k > 0) & (parameters.top_k < x.size(1))
    if bool(use_top_k.any()):
        k = torch.where(use_top_k, parameters.top_k, x.size(1))
        ids = leading_ids(x, int(k.max()) if bool(use_top_k.all()) else x.size(1))
        stays = torch.arange(ids.size(1), device=x.device) < k[:, None]
        w = torch.zeros_like(w).scatter_(1, ids, torch.where(stays, w.gather(1, ids), 0))
    if bool((parameters.top_p < 1.0).any()):
        most = x.size(1) if not bool(use_top_k.all()) else int(parameters.top_k.max())
        ids = leading_ids(x, most)
        leading = w.gather(1, ids)
        total = leading.sum(1, keepdim=True)
        need = (total.double() * parameters.top_p[:, None]).ceil_().long().clamp_(min=1).minimum(total)
        need = torch.where(parameters.top_p[:, None] < 1.0, need, total)
        before = leading.cumsum(1) - leading
        w = torch.zeros_like(w).scatter_(1, ids, torch.where(before < need, leading, 0))
    return torch.where(w >= parameters.min_mass[:, None], w, 0)


def check_rows(x: Tensor, first_row: int) -> Tensor:
    """The largest value of each row, (R, 1); ValueError for the first row without a distribution."""
    largest = x.amax(1, keepdim=True) if x.size(0) else x[:, :1]  # NaN if there is one
    bad = ~torch.isfinite(largest[:, 0])
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        found = "nothing but -inf" if largest[row] == -math.inf else "NaN" if bool(x[row].isnan().any()) else "+inf"
        raise ValueError(
            f"logits: row {first_row + row} holds {found}; there is no distribution to draw from. Look for a diverged "
            "model, an overflow in reduced precision or a mask that bans every token"
        ) from None
    return largest


def token_masses(x: Tensor, largest: Tensor, scale: Tensor) -> Tensor:
    """Step 1: x (R, V), largest (R, 1), scale (R,), all float32 -> (R, V) int64.

    Each operation rounds; merging two (addcmul, say) changes results.
    """
    t = ((x - largest) * scale[:, None]).clamp_(min=-100.0)
    n = (t + 0.5).floor_()
    f = t - n
    p = torch.full_like(f, EXP2_COEFFICIENTS[0])
    for coefficient in (*EXP2_COEFFICIENTS[1:], 1.0):
        p.mul_(f).add_(coefficient)
    return (p * 2.0**24).long().bitwise_left_shift_(16).bitwise_right_shift_((-n).long().clamp_(max=63))


def leading_ids(x: Tensor, count: int) -> Tensor:
    """Ids of the first `count` tokens in the order of step 2, (R, count) int64.

    A partial selection first where it pays: torch.topk breaks ties as it likes, so all ids that tie with the last one
    taken must be looked at, and only the selection's values are used.
    """
    if 4 * count > x.size(1):
        return x.sort(dim=1, descending=True, stable=True).indices[:, :count]
    last = x.topk(count, dim=1).values[:, -1:]  # (R, 1)
    above, equal = x > last, x == last
    stays = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    ids = stays.nonzero()[:, 1].view(x.size(0), count)  # ascending: the stable sort then puts ties in order of id
    return ids.gather(1, x.gather(1, ids).sort(dim=1, descending=True, stable=True).indices)


def _race(masses: Tensor, seed: Tensor, position: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
    """Steps 3 to 6 for seed and position (n,); masses (n, V), or (1, V) for all. Writes tokens and logprobs (n,)."""
    groups = -(-masses.size(1) // GROUP_SIZE)
    padded = torch.nn.functional.pad(masses, (0, groups * GROUP_SIZE - masses.size(1)))
    by_group = padded.view(-1, groups, GROUP_SIZE)  # (n or 1, G, 256)
    group_masses = by_group.sum(2)  # (n or 1, G)
    total = group_masses.sum(1)  # (n or 1,)
    group_ids = torch.arange(groups, device=masses.device)
    member = torch.arange(GROUP_SIZE, device=masses.device)
    step = max(1, _RACE_ELEMENTS // max(groups, GROUP_SIZE))
    for start in range(0, seed.size(0), step):
        part = slice(start, start + step)
        key = seed[part, None], position[part, None]
        rows = torch.arange(key[0].size(0), device=masses.device) + start if by_group.size(0) > 1 else 0
        group = _winner(group_ids, GROUP_DOMAIN, group_masses[rows], *key)  # (r,)
        candidates = by_group[rows, group]  # (r, 256)
        ids = group[:, None] * GROUP_SIZE + member  # (r, 256)
        winner = _winner(ids, TOKEN_DOMAIN, candidates, *key)[:, None]
        tokens[part] = ids.gather(1, winner)[:, 0]
        share = log2(candidates.gather(1, winner)[:, 0].double()) - log2(total[rows].double())
        logprobs[part] = (share * 0.6931471805599453).float()


def _winner(ids: Tensor, domain: int, weights: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Index (r,) of the least -log2(u) / weight in each row; the first of equals (torch.argmin promises that)."""
    counter = (ids, torch.full_like(position, domain), position & _MASK, position >> 32)
    r0, r1, _, _ = philox_4x32_10(counter, (seed & _MASK, seed >> 32))
    return (-log2(open_uniform(r0, r1)) / weights.double()).argmin(1)  # a weight of 0 makes +inf


_NUMBERS = "Tensor logits, float temperature, int top_k, float top_p, float min_p, int seed, int position"
_ROWS = "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor? seeds, Tensor? positions"


def _fake(logits: Tensor, *_: Any, return_logprobs: bool) -> Tensor | tuple[Tensor, Tensor]:
    tokens = logits.new_empty(logits.size(0), dtype=torch.int64)
    return (tokens, logits.new_empty(logits.size(0), dtype=torch.float32)) if return_logprobs else tokens


def _launch(logits: Tensor, *values: Any, return_logprobs: bool) -> Tensor | tuple[Tensor, Tensor]:
    from ..kernels import sample as kernels  # triton is imported by the first call that needs it

    numbers, tensors = values[:6], values[6:] or (None,) * 6
    given = {name: n if t is None else t for name, n, t in zip(_NAMES, numbers, tensors)}
    parameters = row_parameters(logits.size(0), logits.device, given)
    temperature, top_k, top_p, min_p = numbers[:4]
    is_on = temperature == 0 or top_k > 0 or top_p < 1 or min_p > 0
    filtered = is_on or any(tensor is not None for tensor in tensors[:4])
    tokens, logprobs = kernels.sample(logits, *parameters, filtered=filtered, return_logprobs=return_logprobs)
    if bool((tokens < 0).any()):  # waits for the device: a token that is none must not be used
        check_rows(logits.float(), 0)
    return (tokens, logprobs) if return_logprobs else tokens


def _register(namespace: str, triton_device: str) -> Any:
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"sample({_NUMBERS}) -> (Tensor, Tensor)")
    # A parameter given as a tensor (B,), float32 or int64, takes the place of the number.
    library.define(f"sample_rows({_NUMBERS}, {_ROWS}) -> (Tensor, Tensor)")
    # Both without log-probabilities.
    library.define(f"sample_tokens({_NUMBERS}, {_ROWS}) -> Tensor")
    library.define(f"sample_tokens_by_numbers({_NUMBERS}) -> Tensor")
    for name in ("sample", "sample_rows", "sample_tokens", "sample_tokens_by_numbers"):
        fake, launch = (functools.partial(f, return_logprobs="tokens" not in name) for f in (_fake, _launch))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        library.impl(name, launch, triton_device)
    return library


# The CPU kernels of namespace `fasttrain` are the extension's.
_LIBRARIES = [_register("fasttrain", triton_device="CUDA")]
if TRITON_INTERPRETED:
    _LIBRARIES.append(_register("fasttrain_interpreted", triton_device="CPU"))

# Looked up once: a lookup costs a tenth of a small call.
_SAMPLE, _SAMPLE_TOKENS = torch.ops.fasttrain.sample.default, torch.ops.fasttrain.sample_tokens_by_numbers.default
_CPP_IS_AUTO = FORCED_IMPL == "auto" and not CPP_PROBLEM
_PLAIN = frozenset({int, float})
