"""ops.sample against a second reading of its specification, against float64 probabilities, and at its edges."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import ops
from fasttrain.backend import extension
from fasttrain.ops.sample import (
    EXP2_COEFFICIENTS,
    LOG2_COEFFICIENTS,
    log2,
    open_uniform,
    philox_4x32_10,
    token_masses,
)

f32 = np.float32
needs_extension = pytest.mark.skipif(extension() is None, reason="the compiled extension is not installed")
Sample = Callable[..., Any]


@pytest.fixture(scope="module", params=["reference", pytest.param("cpp", marks=needs_extension)])
def sample(request: pytest.FixtureRequest) -> Sample:
    """ops.sample by each implementation: what is said here holds for every one."""
    return functools.partial(ops.sample, impl=request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The specification transcribed with scalars, one token at a time, sharing only the tables of coefficients.


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high & 0xFFFFFFFF, (low >> 32) ^ c[3] ^ k[1], low & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def scalar_log2(v: float) -> float:
    m, e = math.frexp(v)
    if m < 0.7071067811865476:
        m, e = m * 2.0, e - 1
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    total = LOG2_COEFFICIENTS[0]
    for c in LOG2_COEFFICIENTS[1:]:
        total = total * z + c
    return e + s * total


def scalar_masses(x: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    if temperature == 0:
        temperature, top_k = 1.0, 1
    scale = f32(min(max(math.log2(math.e) / float(f32(temperature)), 2.0**-64), 2.0**64))
    largest, masses = x.max(), []
    for value in x:
        with np.errstate(over="ignore"):
            t = max(f32(f32(value - largest) * scale), f32(-100.0))
        n = f32(np.floor(f32(t + f32(0.5))))
        f, p = f32(t - n), f32(EXP2_COEFFICIENTS[0])
        for c in (*EXP2_COEFFICIENTS[1:], 1.0):
            p = f32(f32(p * f) + f32(c))
        masses.append((int(float(p) * 2**24) << 16) >> min(int(-n), 63))
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if top_k > 0:
        for i in order[top_k:]:
            masses[i] = 0
    if top_p < 1.0:
        total, before = sum(masses), 0
        need = min(total, max(1, math.ceil(float(total) * float(f32(top_p)))))
        for i in order:
            mass = masses[i]
            if before >= need:
                masses[i] = 0
            before += mass
    return [mass if mass >= math.ceil(float(f32(min_p)) * 2.0**40) else 0 for mass in masses]


def scalar_sample(x: np.ndarray, seed: int, position: int, **filters: float) -> tuple[int, float]:
    masses = scalar_masses(x, **filters)  # type: ignore[arg-type]

    def winner(weights: dict[int, int], domain: int) -> int:
        def quotient(i: int) -> float:
            counter = [i, domain, position % 2**32, position >> 32]
            r = scalar_philox(counter, [seed % 2**32, seed >> 32])
            u = (2 * ((r[0] << 20) | (r[1] >> 12)) + 1) * 2.0**-53
            return -scalar_log2(u) / float(weights[i])

        return min((i for i in sorted(weights) if weights[i] > 0), key=quotient)

    groups = {g: sum(masses[256 * g : 256 * g + 256]) for g in range(-(-len(x) // 256))}
    g = winner(groups, 1)
    token = winner({i: masses[i] for i in range(256 * g, min(256 * g + 256, len(x)))}, 0)
    share = scalar_log2(float(masses[token])) - scalar_log2(float(sum(masses)))
    return token, float(f32(share * 0.6931471805599453))


def test_philox_matches_the_published_vectors() -> None:
    def block(counter: list[int], key: list[int]) -> list[int]:
        c, k = [torch.tensor(word) for word in counter], [torch.tensor(word) for word in key]
        return [int(word) for word in philox_4x32_10((c[0], c[1], c[2], c[3]), (k[0], k[1]))]

    # Random123's known-answer file, philox4x32 with 10 rounds.
    assert block([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert block([2**32 - 1] * 4, [2**32 - 1] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert block(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_uniforms_are_never_zero_or_one_and_their_logarithms_are_finite_and_exact() -> None:
    words = torch.tensor([0, 0, 2**31, 2**32 - 1])
    u = open_uniform(words, torch.tensor([0, 2**12, 0, 2**32 - 1]))
    assert u.tolist() == [2.0**-53, 3 * 2.0**-53, 0.5 + 2.0**-53, 1 - 2.0**-53]
    x = torch.cat((u, torch.rand(2000, dtype=torch.float64), torch.tensor([2.0**58, 3.0])))
    torch.testing.assert_close(log2(x), torch.log2(x), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_masses_equal_the_scalar_reading_in_every_bit(temperature: float) -> None:
    """A fused multiply-add moves single bits of a mass, which a drawn token shows once in a million times."""
    x = np.random.default_rng(0).standard_normal(3000).astype(f32) * f32(6.0)
    row, scale = torch.from_numpy(x)[None], torch.tensor([f32(math.log2(math.e) / float(f32(temperature)))])
    got = token_masses(row, row.amax(1, keepdim=True), scale)
    assert got[0].tolist() == scalar_masses(x, temperature, 0, 1.0, 0.0)
    exact = 2.0**40 * torch.exp((row.double() - row.double().max()) / temperature)
    assert bool((got - exact).abs().le(1.0 + exact * 3e-6).all())


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_tokens_and_logprobs_equal_the_scalar_reading_bit_for_bit(sample: Sample, data: st.DataObject) -> None:
    V = data.draw(st.sampled_from([1, 2, 7, 255, 256, 257, 700]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from([0.0, 0.3, 3.0, 40.0, 1e30]))
    x = (rng.standard_normal(V) * spread).astype(f32)
    if data.draw(st.booleans()):
        x = np.round(x)  # ties
    if V > 1 and data.draw(st.booleans()):
        x[rng.permutation(V)[: V // 2]] = -np.inf
    filters = {
        "temperature": data.draw(st.sampled_from([1.0, 0.0, 0.7, 1e-6, 1e-30, 50.0, 1e30])),
        "top_k": data.draw(st.sampled_from([0, 1, 2, 50, 10**9])),
        "top_p": data.draw(st.sampled_from([1.0, 0.9, 0.5, 0.3, 0.0])),
        "min_p": data.draw(st.sampled_from([0.0, 0.05, 1.0])),
    }
    seed, position = data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(0, 2**63 - 1))
    token, logprob = sample(torch.from_numpy(x)[None], seed=seed, position=position, return_logprobs=True, **filters)
    assert (token.item(), logprob.item()) == scalar_sample(x, seed, position, **filters)


# --- Distribution


def kept_float64(
    x: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Processed probabilities in float64 by sorting, (V,)."""
    p = torch.softmax(x.double() / temperature, 0)
    order = p.argsort(descending=True, stable=True)
    ranked = p[order]
    if top_k:
        ranked[top_k:] = 0
    ranked /= ranked.sum()
    ranked[ranked.cumsum(0) - ranked >= top_p] = 0
    ranked /= ranked.sum()
    ranked[ranked < min_p * ranked[0]] = 0
    return torch.zeros_like(p).scatter(0, order, ranked / ranked.sum())


def chi_square_z(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Standard score of the chi-square statistic, neighbours in probability pooled until a bin expects 20."""
    n = float(counts.sum())
    order = probabilities.argsort(descending=True)
    expected, seen = probabilities[order] * n, counts[order].double()
    bins = ((expected.cumsum(0) - expected / 2) / 20.0).long()
    bins = torch.where(expected >= 20, torch.arange(len(bins)) - len(bins), bins)  # large ones alone
    _, bins = bins.unique(return_inverse=True)
    wanted = torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add_(0, bins, expected)
    found = torch.zeros_like(wanted).index_add_(0, bins, seen)
    full = wanted >= 5
    wanted = torch.cat((wanted[full], wanted[~full].sum()[None]))
    found = torch.cat((found[full], found[~full].sum()[None]))
    keep = wanted > 0
    assert found[~keep].sum() == 0
    statistic = ((found - wanted)[keep] ** 2 / wanted[keep]).sum().item()
    freedom = int(keep.sum()) - 1
    if freedom == 0:
        return 0.0
    # Wilson and Hilferty: the cube root of chi-square over its mean is close to normal.
    variance = 2.0 / (9.0 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1.0 - variance)) / math.sqrt(variance)


FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.02},
    "all": {"temperature": 1.3, "top_k": 2000, "top_p": 0.95, "min_p": 0.001},
}


def draws_follow_the_float64_probabilities(sample: Sample, n: int, filters: dict[str, float]) -> bool:
    V = 50304
    x = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 2.5
    counts = torch.bincount(sample(x.expand(n, V), seed=torch.arange(n), **filters), minlength=V)
    probabilities = kept_float64(x, **filters)  # type: ignore[arg-type]
    return bool(counts[probabilities == 0].sum() == 0) and chi_square_z(counts, probabilities) < 4.0


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_float64_probabilities_at_a_real_vocabulary_size(sample: Sample, name: str) -> None:
    n = 20_000 if sample.keywords["impl"] == "reference" else 100_000  # type: ignore[attr-defined]
    assert draws_follow_the_float64_probabilities(sample, n, FILTERS[name])


@pytest.mark.slow
def test_a_mass_is_within_its_polynomials_bound_for_every_argument() -> None:
    """All float32 in (-1, -2^-28]: f of any other argument is among theirs."""
    for octave in range(1, 29):
        bits = torch.arange((127 - octave) << 23, (128 - octave) << 23, dtype=torch.int32)
        t = -bits.view(torch.float32)
        got = token_masses(t[None], torch.zeros(1, 1), torch.ones(1))[0].double()
        want = torch.exp2(t.double() + 40)
        assert float(((got - want).abs() / want).max()) <= 1.1e-7


@pytest.mark.slow
@needs_extension
@pytest.mark.parametrize("name", FILTERS)
def test_a_million_draws_follow_the_float64_probabilities(name: str) -> None:
    assert draws_follow_the_float64_probabilities(functools.partial(ops.sample, impl="cpp"), 1_000_000, FILTERS[name])


def test_the_chi_square_yardstick_notices_probabilities_off_by_six_percent() -> None:
    n, p = 100_000, torch.softmax(torch.linspace(0, 5, 1000, dtype=torch.float64), 0)
    tilted = p * (1 + 0.06 * (-1.0) ** torch.arange(1000))
    generator = torch.Generator().manual_seed(0)
    draws = [torch.multinomial(q, n, True, generator=generator) for q in (p, tilted)]
    honest, false = (torch.bincount(tokens, minlength=1000) for tokens in draws)
    assert chi_square_z(honest, p) < 4.0 < chi_square_z(false, p)


def test_neighbouring_seeds_and_positions_are_independent(sample: Sample) -> None:
    n = 20_000
    flat = torch.zeros(n, 16)
    by_seed = sample(flat, seed=torch.arange(n), position=7)
    by_position = sample(flat, seed=7, position=torch.arange(n))
    for draws in (by_seed, by_position):
        pairs = torch.bincount(draws[:-1] * 16 + draws[1:], minlength=256)
        assert chi_square_z(pairs, torch.full((256,), 1 / 256, dtype=torch.float64)) < 4.0
    assert abs((by_seed == by_position).double().mean().item() - 1 / 16) < 0.01


def test_logprobs_are_those_of_the_processed_distribution(sample: Sample) -> None:
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1)) * 3
    for filters in ({"temperature": 0.8}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}):
        tokens, logprobs = sample(x, seed=torch.arange(64), return_logprobs=True, **filters)
        for row in range(64):
            expected = kept_float64(x[row], **filters)[tokens[row]].log()
            assert logprobs[row].item() == pytest.approx(expected.item(), abs=3e-5)


# --- What a row depends on


def test_a_batch_equals_its_rows_one_at_a_time_whatever_the_strides(sample: Sample) -> None:
    generator = torch.Generator().manual_seed(2)
    B, V = 12, 777
    x = torch.randn(V, B, generator=generator).t() * 4  # (B, V), not contiguous
    rows = {
        "temperature": torch.rand(B, generator=generator) * 2,
        "top_k": torch.randint(0, 60, (B,), generator=generator),
        "top_p": torch.rand(B, generator=generator),
        "min_p": torch.rand(B, generator=generator) * 0.2,
        "seed": torch.randint(0, 2**62, (B,), generator=generator),
        "position": torch.arange(B),
    }
    rows["temperature"][3] = 0
    tokens, logprobs = sample(x, return_logprobs=True, **rows)
    for i in range(B):
        alone = {name: values[i].item() for name, values in rows.items()}
        token, logprob = sample(x[i : i + 1].contiguous(), return_logprobs=True, **alone)
        assert token[0] == tokens[i] and logprob[0] == logprobs[i]


def test_a_parameter_means_the_same_as_a_number_and_in_a_tensor(sample: Sample) -> None:
    x, seeds = torch.zeros(10).expand(400, 10), torch.arange(400)  # 0.3 of ten equal tokens: on the edge of rounding
    in_tensor = sample(x, top_p=torch.full((400,), 0.3), seed=seeds)
    assert torch.equal(sample(x, top_p=0.3, seed=seeds), in_tensor)
    assert torch.equal(sample(x, top_p=torch.tensor(0.3, dtype=torch.float64), seed=seeds), in_tensor)


def test_one_row_drawn_many_times_equals_copies_of_the_row(sample: Sample) -> None:
    x = torch.randn(600) * 2
    seeds = torch.arange(300)
    copies = sample(x.repeat(300, 1), seed=seeds, top_p=0.7)
    assert torch.equal(sample(x.expand(300, -1), seed=seeds, top_p=0.7), copies)


def test_global_generators_are_not_touched(sample: Sample) -> None:
    before = torch.get_rng_state()
    sample(torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), seed=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_reduced_precision_logits_are_taken_as_they_are(sample: Sample, dtype: torch.dtype) -> None:
    x = (torch.randn(8, 400) * 3).to(dtype)
    assert torch.equal(sample(x, seed=3, top_k=40), sample(x.float(), seed=3, top_k=40))


# --- Edges


def test_exactly_k_survive_and_ties_go_to_the_lowest_ids(sample: Sample) -> None:
    x = torch.zeros(500)
    x[::2] = 1.0  # 250 equal logits at even ids
    for V in (500, 20):  # by partial selection, by full sort
        seen = sample(x[:V].expand(3000, V), top_k=5, seed=torch.arange(3000)).unique()
        assert seen.tolist() == [0, 2, 4, 6, 8]
    assert sample(x[None], temperature=0).item() == 0
    assert sample(x[None], top_p=0.0, seed=9).item() == 0


def test_temperature_zero_is_argmax_for_any_filter_and_its_logprob_is_zero(sample: Sample) -> None:
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(3))
    tokens, logprobs = sample(x, temperature=0, top_p=0.5, min_p=0.3, top_k=9, seed=4, return_logprobs=True)
    assert torch.equal(tokens, x.argmax(1)) and bool((logprobs == 0).all())
    assert torch.equal(sample(x, temperature=1e-30, seed=torch.arange(50)), x.argmax(1))


def test_a_huge_temperature_is_uniform_over_the_finite_logits(sample: Sample) -> None:
    x = torch.tensor([-5.0, -math.inf, 7.0, 0.0])
    counts = torch.bincount(sample(x.expand(6000, 4), temperature=1e30, seed=torch.arange(6000)), minlength=4)
    assert counts[1] == 0 and bool((counts[[0, 2, 3]] > 1800).all())


def test_tokens_of_no_mass_are_never_drawn(sample: Sample) -> None:
    x = torch.full((2000, 300), -math.inf)
    x[:, 17], x[:, 280] = 0.0, -20.0
    x[:, 5] = -60.0  # below 2^-40 of the likeliest
    assert set(sample(x, seed=torch.arange(2000)).tolist()) == {17}
    assert set(sample(x, seed=torch.arange(2000), temperature=10.0).tolist()) == {17, 280, 5}


def test_top_p_keeps_the_token_that_reaches_the_share(sample: Sample) -> None:
    x = torch.tensor([0.5, 0.3, 0.2]).log()
    seeds = torch.arange(400)
    for p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2})):
        assert set(sample(x.expand(400, 3), top_p=p, seed=seeds).tolist()) == kept
    # Two of four equal tokens hold exactly one half: the third is not needed.
    assert set(sample(torch.zeros(4).expand(400, 4), top_p=0.5, seed=seeds).tolist()) == {0, 1}
    # On the survivors of top-k (0.625, 0.375) 0.6 is reached by the first token alone.
    assert set(sample(x.expand(400, 3), top_k=2, top_p=0.6, seed=seeds).tolist()) == {0}


@pytest.mark.parametrize(
    ("row", "found"),
    [([0.0, math.nan], "NaN"), ([0.0, math.inf], r"\+inf"), ([-math.inf, -math.inf], "nothing but -inf")],
)
def test_a_row_without_a_distribution_raises_and_is_named(sample: Sample, row: list[float], found: str) -> None:
    with pytest.raises(ValueError, match=f"row 1 holds {found}"):
        sample(torch.tensor([[0.0, 1.0], row]))
    with pytest.raises(ValueError, match="row 0 holds"):
        sample(torch.tensor([row]), temperature=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e-60}, "0 in float32"),
        ({"top_k": -3}, "top_k is -3"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": torch.tensor([0.1, 2.0])}, "min_p is 2.0"),
        ({"seed": -1}, "seed is -1"),
        ({"position": torch.zeros(3, dtype=torch.int64)}, r"position has shape \(3,\)"),
        ({"impl": "numpy"}, "impl is 'numpy'"),
    ],
)
def test_a_parameter_out_of_range_is_named(sample: Sample, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(2, 5), **arguments)


def test_shapes_without_tokens_are_refused_and_no_rows_give_no_tokens(sample: Sample) -> None:
    for shape in ((5,), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="must be \\(B, V\\)"):
            sample(torch.zeros(shape))
    with pytest.raises(ValueError, match="int64"):
        sample(torch.zeros(1, 3, dtype=torch.int64))
    assert sample(torch.zeros(0, 5)).shape == (0,)
