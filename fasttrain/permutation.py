"""A shuffled order that is computed, not stored: place i of epoch e, in O(1) time and memory.

A keyed permutation of range(n) replaces the usual index array, so a billion samples cost nothing to shuffle, any
process can ask for any place, and resuming needs one number. It is a Feistel network whose halves live in Z_a and
Z_b, with a * b the smallest such grid that holds n, and which walks the cycle when it lands on one of the
a * b - n < a places outside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It is meant to be
statistically even, not to resist an adversary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

MAX_LENGTH = 2**62
NUM_ROUNDS = 16
_WORD = 2**64 - 1

Indices: TypeAlias = NDArray[np.int64]
_Words: TypeAlias = NDArray[np.uint64]


def permute(positions: Indices, length: int, *, seed: int, epoch: int) -> Indices:
    """Where each position of the shuffled order points: a bijection of range(length), one per (seed, epoch).

    positions: int64 of any shape, each in [0, length). Returns int64 of that shape. Any part of the order can be
    asked for alone; memory is that of the answer. Raises IndexError for a position outside the range.
    """
    return _walk(positions, length, _round_keys(seed, epoch), inverse=False)


def unpermute(indices: Indices, length: int, *, seed: int, epoch: int) -> Indices:
    """The inverse of `permute`: at which position of the shuffled order each index comes up."""
    return _walk(indices, length, _round_keys(seed, epoch), inverse=True)


def _walk(values: Indices, length: int, keys: list[int], *, inverse: bool) -> Indices:
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"length is {length}; it must lie in [1, 2**62]")
    values = np.asarray(values, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= length):
        raise IndexError(f"positions reach from {values.min()} to {values.max()}; they must lie in [0, {length})")
    columns = math.isqrt(length - 1) + 1
    rows = -(-length // columns)
    cipher = _decrypt if inverse else _encrypt
    result = cipher(values.reshape(-1).astype(np.uint64), columns, rows, keys)
    outside = np.flatnonzero(result >= length)
    while outside.size:
        # Each cycle of the grid's permutation that leaves range(length) re-enters it, so this ends, and mostly at once.
        result[outside] = cipher(result[outside], columns, rows, keys)
        outside = outside[result[outside] >= length]
    return result.astype(np.int64).reshape(values.shape)


def _encrypt(values: _Words, columns: int, rows: int, keys: list[int]) -> _Words:
    a, b = np.uint64(columns), np.uint64(rows)
    left, right = values % a, values // a
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right, even) % a) % a
        right = (right + _mix(left, odd) % b) % b
    values = right * a + left
    return values


def _decrypt(values: _Words, columns: int, rows: int, keys: list[int]) -> _Words:
    a, b = np.uint64(columns), np.uint64(rows)
    left, right = values % a, values // a
    for odd, even in zip(keys[::-2], keys[-2::-2], strict=True):
        right = (right + b - _mix(left, odd) % b) % b
        left = (left + a - _mix(right, even) % a) % a
    values = right * a + left
    return values


def _mix(values: _Words, key: int) -> _Words:
    """SplitMix64's finaliser: every input bit, and every key bit, reaches every output bit."""
    mixed: _Words = values + np.uint64(key)  # unsigned arrays wrap silently, which is what a mixer wants
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _round_keys(seed: int, epoch: int) -> list[int]:
    """One 64-bit key per round. Seed and epoch enter one after the other, so (1, 2) and (2, 1) share nothing."""
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed is {seed} and epoch is {epoch}; neither must be negative")
    state = 0
    for word in (*_words(seed), *_words(epoch)):
        state = _splitmix(state ^ word)
    keys = []
    for _ in range(NUM_ROUNDS):
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        keys.append(_splitmix(state))
    return keys


def _words(value: int) -> Iterator[int]:
    yield value & _WORD
    yield value >> 64 & _WORD


def _splitmix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
