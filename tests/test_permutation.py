"""The computed order: a bijection for every length, even over positions and over pairs, and no memory."""

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from fasttrain.permutation import MAX_LENGTH, permute, unpermute

GOLDEN = [0, 1, 5, 3, 6, 4, 9, 8, 2, 7]
GOLDEN_LONG = [238748652401, 927998569200, 768052531827]


def _whole(length: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(length), length, seed=seed, epoch=epoch)


def _excess(observed: np.ndarray, expected: float, freedom: int) -> float:
    """How many standard deviations a chi-squared statistic lies above its mean."""
    chi_squared = float(((observed - expected) ** 2 / expected).sum())
    return (chi_squared - freedom) / math.sqrt(2 * freedom)


def test_every_length_up_to_2000_is_a_bijection_with_its_inverse():
    for length in range(1, 2001):
        order = _whole(length, seed=length % 11, epoch=length % 5)
        assert np.array_equal(np.bincount(order, minlength=length), np.ones(length)), length
        back = unpermute(order, length, seed=length % 11, epoch=length % 5)
        assert np.array_equal(back, np.arange(length)), length


@pytest.mark.parametrize("length", [10**6 + 3, 2**31 - 1, 2**31, 10**12 + 39, 2**53 + 1, MAX_LENGTH - 1, MAX_LENGTH])
def test_large_lengths_stay_in_range_and_invert(length):
    positions = np.random.default_rng(0).integers(0, length, size=2000)
    positions = np.unique(np.concatenate([positions, [0, 1, length - 2, length - 1]]))
    indices = permute(positions, length, seed=5, epoch=2)
    assert indices.min() >= 0 and indices.max() < length
    assert len(np.unique(indices)) == len(positions)
    assert np.array_equal(unpermute(indices, length, seed=5, epoch=2), positions)


def test_any_part_of_the_order_can_be_asked_for_alone():
    whole = _whole(1000, seed=3, epoch=1)
    places = np.array([[999, 0, 17], [17, 500, 3]])
    assert np.array_equal(permute(places, 1000, seed=3, epoch=1), whole[places])


@pytest.mark.parametrize("length", [2, 3, 4])
def test_all_orders_of_a_short_range_are_equally_likely(length):
    seeds, epochs = 8, 25 * math.factorial(length)
    seen = Counter(tuple(_whole(length, seed=seed, epoch=epoch)) for seed in range(seeds) for epoch in range(epochs))
    counts = np.array([seen[order] for order in itertools.permutations(range(length))])
    assert _excess(counts, 25 * seeds, len(counts) - 1) < 5


@pytest.mark.parametrize("length", [7, 16, 31])
def test_positions_and_pairs_are_even_over_epochs(length):
    draws = 3000
    orders = np.stack([_whole(length, seed=9, epoch=epoch) for epoch in range(draws)])
    where = np.stack([np.bincount(orders[:, place], minlength=length) for place in range(length)])
    assert _excess(where, draws / length, (length - 1) ** 2) < 5
    apart = ~np.eye(length, dtype=bool)
    pairs = length * (length - 1)
    for first, second in ((orders[:, :-1], orders[:, 1:]), (orders[:, 0], orders[:, -1])):
        joint = np.bincount((first * length + second).ravel(), minlength=length**2).reshape(length, length)
        assert not joint[~apart].any()
        assert _excess(joint[apart], first.size / pairs, pairs - 1) < 5


def test_a_long_order_does_not_look_like_its_input():
    order = _whole(10_000, seed=4)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 20  # about 2 expected
    quarters = np.bincount(order[:2500] // 2500, minlength=4)
    assert _excess(quarters, 625, 3) < 5


def test_seed_and_epoch_both_change_the_order_and_are_not_interchangeable():
    orders = {tuple(_whole(50, seed=seed, epoch=epoch)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_the_order_never_changes_between_versions():
    assert _whole(10, seed=1, epoch=2).tolist() == GOLDEN
    assert permute(np.array([0, 1, 10**12 - 1]), 10**12, seed=1, epoch=0).tolist() == GOLDEN_LONG


def test_a_billion_samples_take_no_memory():
    tracemalloc.start()
    permute(np.arange(10**9 - 64, 10**9), 10**9, seed=0, epoch=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 1024


def test_places_outside_the_range_are_refused():
    for bad in (-1, 10):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            permute(np.array([0, bad]), 10, seed=0, epoch=0)
    with pytest.raises(ValueError, match="length is 0"):
        permute(np.array([], dtype=np.int64), 0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="epoch is -1"):
        permute(np.array([0]), 10, seed=0, epoch=-1)
