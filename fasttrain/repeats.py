"""Where the end of a text stood before in it: what DRY, no-repeat-ngram and prompt lookup ask, kept up to date.

For every earlier position j the index knows how many tokens before j equal the last tokens of the text. A new token
touches only the positions that hold the same token, so a step costs their number and not the length of the text (the
Z-algorithm that others run at each step costs the length every time). Left out: what is done about a repeat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence


class RepeatIndex:
    """A growing text of token ids and, for its present end, all earlier occurrences of that end."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self.ids: list[int] = []
        self._positions: dict[int, list[int]] = {}  # token -> where it stands, ascending
        self._lengths: dict[int, int] = {}  # end of an earlier occurrence -> how many tokens agree
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        before, positions = self._lengths, self._positions.setdefault(token, [])
        self._lengths = {j: before.get(j - 1, 0) + 1 for j in positions}
        positions.append(len(self.ids))
        self.ids.append(token)

    def copy(self) -> RepeatIndex:
        other = RepeatIndex()
        other.ids, other._lengths = list(self.ids), self._lengths  # append() makes new lengths
        other._positions = {token: list(positions) for token, positions in self._positions.items()}
        return other

    def repeats(self) -> Iterator[tuple[int, int]]:
        """(L, j) for every earlier position j whose token is the last one, j ascending: ids[j + 1 - L : j + 1] equals
        the last L tokens and L is the most for which that holds. ids[j + 1] came next there."""
        for j, length in self._lengths.items():
            yield length, j

    def followers(self, length: int) -> set[int]:
        """Tokens that came after an earlier occurrence of the last `length` tokens."""
        if length == 0:
            return set(self._positions)
        return {self.ids[j + 1] for agreeing, j in self.repeats() if agreeing >= length}


class Dry:
    """The DRY penalty of one text: tokens that would lengthen a repeat lose logits, the more the longer it is.

    Where the last L tokens stood before and token t came next there, t loses multiplier * base^(L - allowed) if L is at
    least `allowed`; of several places the largest counts. A repeat is not followed across a breaker, and a token that
    holds a whole breaker loses nothing. (p-e-w 2024; llama.cpp's convention of L, which does not count t.)
    """

    def __init__(
        self, index: RepeatIndex, multiplier: float, base: float, allowed: int, breakers: Sequence[str],
        text_of: Callable[[int], str],
    ) -> None:  # fmt: skip
        self._index, self._multiplier, self._base, self._allowed = index, multiplier, base, allowed
        self._breakers, self._text_of = tuple(breakers), text_of
        self._tail = ""  # enough of the text's end to see a breaker that spans tokens
        self._unbroken = 0  # tokens since the last breaker
        for token in index.ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Tells it of a token that the index has got."""
        self._unbroken += 1
        if self._breakers:
            text = self._text_of(token)
            seen = self._tail + text
            old = len(seen) - len(text)
            if any(seen.find(breaker, max(0, old - len(breaker) + 1)) >= 0 for breaker in self._breakers):
                self._unbroken = 0
            self._tail = seen[-max(map(len, self._breakers)) :]

    def penalties(self) -> dict[int, float]:
        """Token -> what it loses."""
        longest: dict[int, int] = {}
        for length, j in self._index.repeats():
            length, token = min(length, self._unbroken), self._index.ids[j + 1]
            if length >= max(self._allowed, longest.get(token, 0)):
                longest[token] = length
        if self._breakers:
            longest = {t: n for t, n in longest.items() if not any(b in self._text_of(t) for b in self._breakers)}
        most = 88.0 / math.log(self._base) if self._base > 1.000001 else math.inf  # beyond it float32 overflows
        return {t: self._multiplier * self._base ** min(n - self._allowed, most) for t, n in longest.items()}
