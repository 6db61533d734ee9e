"""N-gram and xz yardsticks against hand-computed values and plain loops."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest

from fasttrain.corpus_statistics import ngram_entropies, xz_bits_per_byte


def _by_hand(train: bytes, val: bytes) -> tuple[float, float]:
    ones, pairs, contexts = Counter(train), Counter(itertools.pairwise(train)), Counter(train[:-1])
    unigram = lambda b: (ones[b] + 1) / (len(train) + 256)  # noqa: E731
    first = [-math.log2(unigram(b)) for b in val]
    second = [-math.log2((pairs[a, b] + unigram(b)) / (contexts[a] + 1)) for a, b in itertools.pairwise(val)]
    return sum(first) / len(val), (first[0] + sum(second)) / len(val)


def test_entropies_equal_a_plain_loop_and_unseen_pairs_are_finite():
    train, val = b"the quick brown fox jumps over the lazy dog. " * 9, b"the lazy fox \x00 jumps \xff"
    assert ngram_entropies(train, val) == pytest.approx(_by_hand(train, val), rel=1e-12)


def test_the_smoothed_models_are_distributions():
    """Summed over every possible next byte, the probabilities behind the entropies are 1."""
    train = b"abracadabra"
    unigram = [2.0 ** -ngram_entropies(train, bytes([b]))[0] for b in range(256)]
    assert sum(unigram) == pytest.approx(1.0)
    after_a = [2.0 ** -(2 * ngram_entropies(train, bytes([97, b]))[1]) / unigram[97] for b in range(256)]
    assert sum(after_a) == pytest.approx(1.0)


def test_known_sources_have_their_known_entropy():
    noise = random.Random(0).randbytes(400_000)
    assert ngram_entropies(noise[:200_000], noise[200_000:])[0] == pytest.approx(8.0, abs=0.01)
    unigram, bigram = ngram_entropies(b"ab" * 5000, b"ab" * 5000)
    assert unigram == pytest.approx(1.0, abs=0.05) and bigram < 0.01
    assert xz_bits_per_byte(b"", noise[:20_000]) == pytest.approx(8.0, abs=0.1)


def test_token_ids_are_scored_per_byte_of_text():
    text = np.frombuffer(b"hello hello hello", dtype=np.uint8)
    whole = ngram_entropies(text, text)
    assert ngram_entropies(text, text, bytes_per_symbol=4.0) == pytest.approx([value / 4 for value in whole])


def test_xz_may_refer_to_all_of_the_training_text():
    secret = random.Random(1).randbytes(60_000)
    filler = random.Random(2).randbytes(1_000_000)
    assert xz_bits_per_byte(b"", secret) > 7.9
    assert xz_bits_per_byte(secret + filler, secret, preset=0) < 0.5  # beyond preset 0's own 256 KiB dictionary


def test_nothing_to_score_or_too_many_symbols_is_refused():
    with pytest.raises(ValueError, match="val has shape"):
        ngram_entropies(b"x", b"")
    with pytest.raises(ValueError, match="pass the bytes of the text"):
        ngram_entropies(np.array([0, 50_000]), np.array([1]))
    with pytest.raises(ValueError, match="val is empty"):
        xz_bits_per_byte(b"x", b"")
