"""What simple models make of a text, in bits per byte: the yardsticks that a trained model is held against.

All of them are computed from the text at hand. They take what a language model is given: the training text to count in,
the validation text to be scored on. Left out: n-grams beyond two symbols, and token-level compressors.
"""

from __future__ import annotations

import lzma
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_SYMBOLS = 4096  # the pair counts are a table of that many squared


def ngram_entropies(train: bytes | NDArray[Any], val: bytes | NDArray[Any], *, bytes_per_symbol: float = 1.0,
                    ) -> tuple[float, float]:
    """Cross-entropy of `val` under the (unigram, bigram) counts of `train`, in bits per byte.

    With c the counts in train, C = len(train) and K the number of symbols (256 for bytes):
        p1(b)   = (c(b) + 1) / (C + K)                  add-one smoothing
        p2(b|a) = (c(ab) + p1(b)) / (c(a) + 1)          one pseudo-count per context, spread as the unigram
    The first symbol of val, which has no predecessor, is scored by p1 in both.

    train, val: bytes, or 1-D arrays of symbols below 4096, say token ids; then `bytes_per_symbol` says how many bytes
    of text a symbol stands for on average.
    """
    counted, scored = _symbols(train, "train"), _symbols(val, "val")
    num_symbols = 256 if isinstance(train, bytes) else int(max(counted.max(), scored.max())) + 1
    if num_symbols > _MAX_SYMBOLS:
        raise ValueError(f"the symbols reach {num_symbols - 1}; pairs are counted for up to {_MAX_SYMBOLS} only; "
                         f"pass the bytes of the text")
    ones = np.bincount(counted, minlength=num_symbols)  # (K,)
    unigram = (ones + 1) / (len(counted) + num_symbols)  # (K,)
    pairs = np.bincount(counted[:-1] * num_symbols + counted[1:], minlength=num_symbols**2)  # (K * K,)
    contexts = np.bincount(counted[:-1], minlength=num_symbols)  # (K,): the last symbol precedes nothing
    first, second = scored[:-1], scored[1:]
    bigram = (pairs[first * num_symbols + second] + unigram[second]) / (contexts[first] + 1)  # (len(val) - 1,)
    scale = 1.0 / (len(scored) * bytes_per_symbol)
    unigram_bits = -np.log2(unigram[scored]).sum()
    bigram_bits = -np.log2(unigram[scored[0]]) - np.log2(bigram).sum()
    return float(unigram_bits * scale), float(bigram_bits * scale)


def xz_bits_per_byte(train: bytes, val: bytes, *, preset: int = 6) -> float:
    """What `val` adds to an xz archive that holds `train` already, in bits per byte of val:
    8 * (len(xz(train + val)) - len(xz(train))) / len(val).

    The dictionary spans the whole text, so xz may refer to all of train, as a trained model may. train=b"" gives what
    `xz` makes of val alone. Takes about a second for each 2 MB of train.
    """
    if not val:
        raise ValueError("val is empty; there are no bytes to compress")
    dictionary = min(max(len(train) + len(val), 4096), 1 << 30)
    chain = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary}]
    sizes = [len(lzma.compress(text, filters=chain)) for text in (train + val, train)]
    return 8 * (sizes[0] - sizes[1]) / len(val)


def _symbols(text: bytes | NDArray[Any], name: str) -> NDArray[np.int64]:
    symbols = np.frombuffer(text, dtype=np.uint8) if isinstance(text, bytes) else np.asarray(text)
    if symbols.ndim != 1 or symbols.dtype.kind not in "iu" or not len(symbols):
        raise ValueError(f"{name} has shape {symbols.shape} and dtype {symbols.dtype}; pass bytes or a row of symbols, "
                         f"at least one")
    return symbols.astype(np.int64)
