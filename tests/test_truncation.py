"""Filters: the kept sets of transformers' warpers, hand-computed cases of the others, and the named orders."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain import ops
from fasttrain.ops.sample import GROUP_DOMAIN, TOKEN_DOMAIN, open_uniform, philox_4x32_10
from fasttrain.truncation import Truncation, coin, epsilon, min_p, top_k, top_p, typical_p, xtc

SEEDS = torch.arange(8)


def rows_of(logits: Tensor) -> list[set[int]]:
    return [set((row > -math.inf).nonzero()[:, 0].tolist()) for row in logits]


def likelihoods(*probabilities: float) -> Tensor:
    """One row of logits whose softmax is this."""
    return torch.tensor([probabilities]).log()


def random_rows(spread: float, vocabulary: int = 700) -> Tensor:
    return spread * torch.randn(16, vocabulary, generator=torch.Generator().manual_seed(int(spread * 10)))


WARPERS = [
    ("TopKLogitsWarper", {"top_k": 13}, lambda x: top_k(x, 1.0, 13)),
    ("TopPLogitsWarper", {"top_p": 0.83}, lambda x: top_p(x, 1.0, 0.83)),
    ("TopPLogitsWarper", {"top_p": 0.999}, lambda x: top_p(x, 1.0, 0.999)),
    ("MinPLogitsWarper", {"min_p": 0.07}, lambda x: min_p(x, 1.0, 0.07)),
    ("TypicalLogitsWarper", {"mass": 0.35}, lambda x: typical_p(x, 1.0, 0.35)),
    ("TypicalLogitsWarper", {"mass": 0.9}, lambda x: typical_p(x, 1.0, 0.9)),
    ("EpsilonLogitsWarper", {"epsilon": 0.003}, lambda x: epsilon(x, 1.0, 0.003)),
    ("EpsilonLogitsWarper", {"epsilon": 0.9}, lambda x: epsilon(x, 1.0, 0.9)),
]


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize(("name", "options", "ours"), WARPERS, ids=lambda v: "" if callable(v) else str(v))
def test_a_filter_keeps_what_transformers_warper_keeps(
    name: str, options: dict[str, Any], ours: Any, spread: float
) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    x = random_rows(spread)
    theirs = getattr(warpers, name)(**options)(None, x.clone())
    assert rows_of(ours(x)) == rows_of(theirs)
    kept = theirs > -math.inf
    assert torch.equal(ours(x)[kept], x[kept])


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_a_whole_chain_keeps_what_transformers_chain_keeps(spread: float) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    x = random_rows(spread)
    chain = [
        warpers.TemperatureLogitsWarper(0.8), warpers.TopKLogitsWarper(60), warpers.TopPLogitsWarper(0.95),
        warpers.MinPLogitsWarper(0.01), warpers.TypicalLogitsWarper(0.9), warpers.EpsilonLogitsWarper(0.002),
    ]  # fmt: skip
    theirs = x.clone()
    for warper in chain:
        theirs = warper(None, theirs)
    ours = Truncation(temperature=0.8, top_k=60, top_p=0.95, min_p=0.01, typical_p=0.9, epsilon=0.002)
    masked, rest = ours.before_the_op(x, torch.arange(16), 0)
    assert rest == {"temperature": 0.8} and rows_of(masked) == rows_of(theirs)
    tokens, logprobs = ours.draw(x, torch.arange(16), 0)
    expected = theirs.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


def test_the_filters_of_the_op_are_the_same_filters() -> None:
    """A filter that does nothing on top pushes top-k, top-p and min-p out of the op and into this module."""
    x = random_rows(2.0).to(torch.bfloat16)  # bfloat16: many ties
    seeds = torch.arange(16)
    for options in ({"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 50, "top_p": 0.7, "min_p": 0.2}):
        inside = Truncation(temperature=0.7, **options)
        outside = Truncation(temperature=0.7, **options, epsilon=1e-30)
        assert inside.before_the_op(x, seeds, 0)[0] is x
        assert set(outside.before_the_op(x, seeds, 0)[1]) == {"temperature"}
        for position in range(20):
            for ours, theirs in zip(inside.draw(x, seeds, position), outside.draw(x, seeds, position)):
                assert torch.equal(ours, theirs)


def test_exactly_k_stay_and_ties_go_to_the_lower_id() -> None:
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert rows_of(top_k(x, 1.0, 3)) == [{1, 2, 3}]
    assert rows_of(top_k(x, 1.0, 6)) == rows_of(top_k(x, 1.0, 99)) == [set(range(6))]


def test_typical_keeps_what_surprises_as_expected_and_may_drop_the_likeliest() -> None:
    # H = 1.168 nats; surprises 0.693, 1.609, 1.897, 1.897, ...: distances 0.475, 0.441, 0.729, ...
    x = likelihoods(0.5, 0.2, 0.15, 0.15)
    assert rows_of(typical_p(x, 1.0, 0.1)) == [{1}]
    assert rows_of(typical_p(x, 1.0, 0.21)) == [{0, 1}]
    assert rows_of(typical_p(x, 1.0, 0.71)) == [{0, 1, 2}]
    # A token of probability 0 is 0 * log 0 in the entropy and must not make it NaN.
    assert rows_of(typical_p(torch.cat((x, torch.tensor([[-math.inf, -500.0]])), 1), 1.0, 0.21)) == [{0, 1}]


def test_xtc_takes_all_top_choices_but_the_least_likely_and_only_where_the_coin_says_so() -> None:
    x = likelihoods(0.1, 0.4, 0.05, 0.25, 0.2)
    seed = torch.tensor([3])
    assert rows_of(xtc(x, 1.0, 1.0, 0.15, seed, 0)) == [{0, 2, 4}]  # 0.4 and 0.25 go, 0.2 is the least of the three
    assert rows_of(xtc(x, 1.0, 1.0, 0.35, seed, 0)) == [set(range(5))]  # one top choice: nothing to exclude
    assert rows_of(xtc(x, 1.0, 1.0, 0.6, seed, 0)) == [set(range(5))]
    assert rows_of(xtc(x, 1.0, 0.0, 0.15, seed, 0)) == [set(range(5))]
    assert rows_of(xtc(likelihoods(0.3, 0.3, 0.3, 0.1), 1.0, 1.0, 0.2, seed, 0)) == [{2, 3}]  # of equals the last stays
    # At temperature 4 the five are closer together and more of them pass the same threshold.
    assert rows_of(xtc(x, 4.0, 1.0, 0.15, seed, 0)) == [{0, 2}]
    acts = [rows_of(xtc(x, 1.0, 0.3, 0.15, seed, position))[0] != set(range(5)) for position in range(2000)]
    assert acts == [bool(coin(seed, position) < 0.3) for position in range(2000)]
    assert abs(sum(acts) - 600) < 4.5 * math.sqrt(2000 * 0.3 * 0.7)


def test_the_coin_is_the_rows_own_and_no_draw_uses_it() -> None:
    x = torch.zeros(8, 300)
    together = coin(SEEDS, 5)
    for row in range(8):
        assert torch.equal(coin(SEEDS[row : row + 1], 5), together[row : row + 1])
    with_coin = Truncation(xtc_probability=0.5, xtc_threshold=0.5).draw(x, SEEDS, 5)  # nothing is that likely
    assert torch.equal(with_coin[0], ops.sample(x, seed=SEEDS, position=5))
    assert len(set(together.tolist())) == 8 and not torch.equal(coin(SEEDS, 6), together)
    for domain in (TOKEN_DOMAIN, GROUP_DOMAIN):
        zero, five = torch.zeros_like(SEEDS), torch.full_like(SEEDS, 5)
        r0, r1, _, _ = philox_4x32_10((zero, torch.full_like(SEEDS, domain), five, zero), (SEEDS, zero))
        assert not bool((open_uniform(r0, r1) == together).any())


def test_named_orders_differ_where_programs_differ() -> None:
    seed = torch.tensor([1])
    # llama.cpp: top-p looks at the plain distribution, the temperature comes last.
    x = likelihoods(0.6, 0.3, 0.07, 0.03)
    options: dict[str, Any] = {"temperature": 10.0, "top_p": 0.8}
    masked, rest = Truncation(order="llama.cpp", **options).before_the_op(x, seed, 0)
    assert rows_of(masked) == [{0, 1}] and rest == {"temperature": 10.0}
    masked, rest = Truncation(order="hf", **options).before_the_op(x, seed, 0)
    assert rows_of(masked) == [{0, 1, 2, 3}] and rest == options
    # llama.cpp: top-k before typical; with typical first the likeliest would have gone.
    options = {"top_k": 2, "typical_p": 0.5}
    assert rows_of(Truncation(order="llama.cpp", **options).before_the_op(x, seed, 0)[0]) == [{0}]
    # vllm: min-p before top-p: 0.6 of 0.9 is enough for 0.65, of 1.0 it is not.
    options = {"top_p": 0.65, "min_p": 0.4}
    tokens = {order: set() for order in ("hf", "vllm")}
    for order in tokens:
        for position in range(200):
            tokens[order] |= {int(Truncation(order=order, **options).draw(x, seed, position)[0])}
    assert tokens == {"hf": {0, 1}, "vllm": {0}}


def test_a_row_alone_keeps_what_it_keeps_in_a_batch() -> None:
    x = random_rows(2.0, 50257)[:8]
    filters = Truncation(
        temperature=0.9, top_k=4000, top_p=0.97, min_p=1e-4, typical_p=0.9, epsilon=1e-6, xtc_probability=0.5,
        xtc_threshold=0.001, order="llama.cpp",
    )  # fmt: skip
    together, _ = filters.before_the_op(x, SEEDS, 3)
    threads = torch.get_num_threads()
    for row in range(8):
        torch.set_num_threads(1 + row % 2)
        alone, _ = filters.before_the_op(x[row : row + 1].clone(), SEEDS[row : row + 1], 3)
        assert torch.equal(alone[0], together[row])
    torch.set_num_threads(threads)


def test_the_draws_follow_the_distribution_of_the_survivors() -> None:
    x = likelihoods(0.3, 0.25, 0.2, 0.1, 0.08, 0.04, 0.02, 0.01).expand(20000, -1)
    filters = Truncation(temperature=0.9, typical_p=0.9, epsilon=0.03)
    survivors = filters.before_the_op(x[:1], torch.zeros(1, dtype=torch.int64), 0)[0][0]
    expected = (survivors / 0.9).softmax(0) * 20000
    counts = torch.bincount(filters.draw(x, torch.arange(20000), 0)[0], minlength=8).float()
    possible = expected > 0
    assert bool((counts[~possible] == 0).all()) and 2 <= int(possible.sum()) < 8
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("bad", "found"), [(math.nan, "holds NaN"), (math.inf, r"holds \+inf"), (-math.inf, "holds nothing but -inf")]
)
def test_a_row_without_a_distribution_is_refused_before_any_filter_can_hide_it(bad: float, found: str) -> None:
    x = torch.zeros(2, 9)
    x[1, 3 if bad > 0 or bad != bad else slice(None)] = bad
    for filters in (Truncation(typical_p=0.5), Truncation(epsilon=0.1), Truncation(top_p=0.5, order="llama.cpp"),
                    Truncation(xtc_probability=1.0), Truncation()):  # fmt: skip
        with pytest.raises(ValueError, match=f"row 1 {found}"):
            filters.draw(x, torch.arange(2), 0)
