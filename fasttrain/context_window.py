"""Texts longer than the model's context: the oldest half is forgotten whenever the context is full.

What the model sees of a text is a function of the text's length alone, so batchmates and caches cannot change it: at
length n > C it starts at the smallest multiple of ceil(C / 2) that leaves at most C tokens, and positions count from
there. Forgetting one token at a time would move every position and so recompute the whole context for every token;
half at a time recomputes it once in C / 2 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .decoding import Decoder


class SlidingDecoder:
    """A decoder whose texts may outgrow the context of the one it uses."""

    def __init__(self, decoder: Decoder, context: int) -> None:
        self._decoder, self._context, self._capacity = decoder, context, 0
        self._held = 0  # positions in the decoder: as many as the longest row had, though it may have left since
        self._texts: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        self._texts = [list(prompt) for prompt in prompts]
        self._capacity = min(capacity, self._context)
        return self._restart()

    def step(self, tokens: Tensor) -> Tensor:
        self._held += 1
        moved = self._held > self._capacity
        for text, token in zip(self._texts, tokens.tolist()):
            before = window_start(len(text), self._context)
            text.append(token)
            moved |= window_start(len(text), self._context) != before
        return self._restart() if moved else self._decoder.step(tokens)

    def keep_rows(self, rows: Tensor) -> None:
        self._texts = [self._texts[row] for row in rows.tolist()]
        self._decoder.keep_rows(rows)

    def _restart(self) -> Tensor:
        windows = [text[window_start(len(text), self._context) :] for text in self._texts]
        self._held = max(map(len, windows))
        return self._decoder.start(windows, self._capacity)


def window_start(length: int, context: int) -> int:
    """The first position of a text that the model still sees."""
    stride = -(-context // 2)
    return max(0, -(-(length - context) // stride)) * stride
