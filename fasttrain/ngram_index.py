"""Where the end of a text stood before: what prompt lookup asks, in time that does not grow with the text.

The compiled index hashes the n-grams of each new token; the Python one is its reference (repeats.py). Both propose the
same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from .backend import extension
from .repeats import RepeatIndex


class NgramIndex(Protocol):
    """A growing text of token ids that knows where its last tokens stood before."""

    def extend(self, ids: Sequence[int], /) -> None:
        """Appends tokens."""

    def continuation(self, count: int, /) -> list[int]:
        """Up to `count` tokens that came after the longest repeat of the text's end (of equally long ones the latest).
        Repeats longer than the index's longest count as that long; none shorter than its shortest counts."""

    def __len__(self) -> int:
        """How many tokens it has got."""


class PythonNgramIndex:
    """The reference, and what runs without the extension: a token costs the number of its earlier occurrences."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest, self._index = shortest, longest, RepeatIndex()

    def extend(self, ids: Sequence[int], /) -> None:
        for token in ids:
            self._index.append(token)

    def continuation(self, count: int, /) -> list[int]:
        repeats = ((min(length, self._longest), j) for length, j in self._index.repeats())
        length, j = max(repeats, default=(0, 0))
        return self._index.ids[j + 1 : j + 1 + count] if length >= self._shortest else []

    def __len__(self) -> int:
        return len(self._index.ids)


def ngram_index(shortest: int, longest: int) -> NgramIndex:
    """The compiled index where there is one (csrc/ngram_index.h: a token costs the same however long the text is)."""
    compiled: Any = extension()
    index: NgramIndex = (PythonNgramIndex if compiled is None else compiled.NgramIndex)(shortest, longest)
    return index
