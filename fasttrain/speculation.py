"""Speculation: tokens are guessed, one model call checks several guesses, and the text is the one without guessing.

A row's token is a function of its logits, seed and position (ops/sample.py), so checking needs no acceptance rule: the
model's own token is drawn at every position, and a guess that equals it has saved a call. The text is therefore the
same, greedy or drawn, whatever guesses; a bad guess costs time only. (Batched matrix products may round differently
from single ones, as batches do: generation.py.) A draft model that draws with the same random numbers as the model
guesses right about as often as is possible (Daliri et al. 2025, "drafter-invariant speculative decoding").

`SpeculativeDecoder` is a decoder like any other; the loop that writes does not know of it. Rows agree with their
guesses to different lengths, so each has a cache of its own and only the calls for missed rows are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .decoding import BranchingDecoder
from .ngram_index import ngram_index
from .truncation import Truncation

MIN_MATCH, MAX_MATCH = 2, 16  # tokens that must repeat before what came next is guessed; beyond, the latest is taken


class Drafter(Protocol):
    """Guesses how one text goes on."""

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens after `ids`, which start with those of every earlier call."""


@dataclass
class SpeculationCount:
    """What guessing brought for one row."""

    drafted: int = 0
    accepted: int = 0
    model_calls: int = 0


class PromptLookup:
    """Guesses what came after the latest longest repeat of the text's end (Saxena 2023)."""

    def __init__(self) -> None:
        self._index = ngram_index(MIN_MATCH, MAX_MATCH)

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        self._index.extend(ids[len(self._index) :])
        return self._index.continuation(count)


class DraftModel:
    """Guesses with a smaller model over the same vocabulary, drawing with the row's own random numbers."""

    def __init__(
        self, decoder: BranchingDecoder, truncation: Truncation, seed: Tensor, num_prompt: int, capacity: int
    ) -> None:
        self._decoder, self._truncation, self._seed = decoder, truncation, seed  # seed (1,) int64
        self._num_prompt, self._capacity = num_prompt, capacity
        self._read: list[int] = []  # the ids whose keys and values the decoder holds

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        if not self._read:
            logits = self._decoder.start([list(ids)], self._capacity)
        else:
            agree = next((i for i, (a, b) in enumerate(zip(self._read, ids)) if a != b), min(len(self._read), len(ids)))
            agree = min(agree, len(ids) - 1)  # something must be read for there to be logits
            self._decoder.rewind(len(self._read) - agree)
            logits = self._decoder.extend(torch.tensor([list(ids[agree:])], device=self._seed.device))[:, -1]
        self._read = list(ids)
        guesses: list[int] = []
        while True:
            token, _ = self._truncation.draw(logits, self._seed, len(ids) + len(guesses) - self._num_prompt)
            guesses.append(int(token))
            if len(guesses) == count:
                return guesses
            logits = self._decoder.step(token)
            self._read.append(guesses[-1])


class _Row:
    """One text: its decoder, and the logits after each guess that the last call checked."""

    def __init__(self, decoder: BranchingDecoder, drafter: Drafter, prompt: Sequence[int], capacity: int) -> None:
        self.count, self._decoder, self._drafter = SpeculationCount(), decoder, drafter
        self._ids, self._capacity = list(prompt), capacity
        self._guesses: list[int] = []
        self._used = 0  # guesses that were right so far
        self._checked = torch.empty(0)  # (1 + guesses, V)

    def start(self) -> Tensor:
        self.count.model_calls += 1
        return self._decoder.start([self._ids], self._capacity)

    def step(self, token: int, num_guesses: int, device: torch.device) -> Tensor:
        """Logits (1, V) after one more token: at hand if it was guessed."""
        self._ids.append(token)
        if self._used < len(self._guesses) and self._guesses[self._used] == token:
            self._used += 1
            self.count.accepted += 1
            return self._checked[self._used : self._used + 1]
        self._decoder.rewind(len(self._guesses) - self._used)
        room = self._capacity - len(self._ids)
        self._guesses = self._drafter.propose(self._ids, min(num_guesses, room)) if room > 0 else []
        self._used = 0
        self.count.drafted += len(self._guesses)
        self.count.model_calls += 1
        self._checked = self._decoder.extend(torch.tensor([[token, *self._guesses]], device=device))[0]
        return self._checked[:1]


class SpeculativeDecoder:
    """Decodes with guesses.

    Args:
        new_decoder: makes a decoder of the model; each row gets one.
        new_drafter: makes the drafter of a row, from its index, its prompt and the capacity.
        num_guesses: most guesses checked by a call.
    """

    def __init__(
        self, new_decoder: Callable[[], BranchingDecoder], new_drafter: Callable[[int, Sequence[int], int], Drafter],
        num_guesses: int,
    ) -> None:  # fmt: skip
        self._new_decoder, self._new_drafter, self._num_guesses = new_decoder, new_drafter, num_guesses
        self._rows: list[_Row] = []
        self.counts: list[SpeculationCount] = []
        """Of every row that was started, finished or not."""

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        self._rows = [
            _Row(self._new_decoder(), self._new_drafter(i, prompt, capacity), prompt, capacity)
            for i, prompt in enumerate(prompts)
        ]
        self.counts = [row.count for row in self._rows]
        return torch.cat([row.start() for row in self._rows])

    def step(self, tokens: Tensor) -> Tensor:
        ids = tokens.tolist()
        return torch.cat([row.step(token, self._num_guesses, tokens.device) for row, token in zip(self._rows, ids)])

    def keep_rows(self, rows: Tensor) -> None:
        self._rows = [self._rows[row] for row in rows.tolist()]
