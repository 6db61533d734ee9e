"""Penalties on the tokens that a text already holds, as sparse edits: one copy of the logits, then O(tokens seen).

    logit += bias                                                        each token of logit_bias
    logit  = logit / r if logit > 0 else logit * r                       seen, repetition penalty r (Keskar et al. 2019)
    logit -= frequency * count + presence                                seen; count is how often

in this order, which Hugging Face, vLLM and llama.cpp share; banned tokens are set to -inf. Others hash or scatter over
the whole vocabulary for every token; here the distinct tokens of all rows stand side by side in one list of edits, so
rows of any lengths need no padding. Left out: penalties on sequences (repeats.py).

Shapes: B rows, V vocabulary, N (row, token) pairs seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Penalties:
    """What is edited, for all rows alike; 1 and 0 are off."""

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    repetition_sees_prompt: bool = True
    counts_see_prompt: bool = False
    """Whether frequency and presence count the prompt too."""

    @property
    def on_seen_tokens(self) -> bool:
        return self.repetition != 1.0 or self.frequency != 0.0 or self.presence != 0.0


class SeenTokens:
    """How often each row holds each token, as parallel arrays that grow by doubling, so that adding a token to every
    row is one small scatter."""

    def __init__(self, prompts: Sequence[Sequence[int]], penalties: Penalties, device: torch.device) -> None:
        self._penalties, self._device = penalties, device
        self._slots: list[dict[int, int]] = [{} for _ in prompts]  # row -> token -> place in the arrays
        self._used = 0
        size = 16
        self._rows = torch.zeros(size, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._counts = torch.zeros(size, device=device)  # float32: what frequency multiplies
        self._repeated = torch.zeros(size, dtype=torch.bool, device=device)  # the repetition penalty sees it
        for row, prompt in enumerate(prompts):
            counted = Counter(prompt)
            slots = self._slots_of([(row, token) for token in counted])
            if penalties.counts_see_prompt:
                self._counts[slots] = torch.tensor([float(n) for n in counted.values()], device=device)
            self._repeated[slots] = penalties.repetition_sees_prompt

    def _slots_of(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """The place of each (row, token), all different; pairs not met before get one at the end."""
        places, first_new = [], self._used
        for row, token in pairs:
            slot = self._slots[row].setdefault(token, self._used)
            self._used += slot == self._used
            places.append(slot)
        while self._used > self._rows.numel():
            for name in ("_rows", "_tokens", "_counts", "_repeated"):
                array = getattr(self, name)
                setattr(self, name, torch.cat((array, array.new_zeros(max(array.numel(), 16)))))
        added = [pair for pair, slot in zip(pairs, places) if slot >= first_new]
        if added:
            new = torch.tensor(added, device=self._device)  # (n, 2), in order of their slots
            self._rows[first_new : self._used] = new[:, 0]
            self._tokens[first_new : self._used] = new[:, 1]
        return torch.tensor(places, dtype=torch.int64, device=self._device)

    def add(self, tokens: Sequence[int]) -> None:
        """One new token in each row."""
        slots = self._slots_of(list(enumerate(tokens)))
        self._counts[slots] += 1.0
        self._repeated[slots] = True

    def select_rows(self, rows: Sequence[int]) -> None:
        """The rows are now these, in this order; a row may be taken twice."""
        before = self._slots
        places = [slot for row in rows for slot in before[row].values()]
        taken = torch.tensor(places, dtype=torch.int64, device=self._device)
        self._slots, at = [], 0
        for row in rows:
            self._slots.append({token: at + i for i, token in enumerate(before[row])})
            at += len(before[row])
        owners = [i for i, slots in enumerate(self._slots) for _ in slots]
        self._rows = torch.tensor(owners, dtype=torch.int64, device=self._device)
        self._tokens, self._counts = self._tokens[taken], self._counts[taken]
        self._repeated, self._used = self._repeated[taken], at

    def edit_inplace(self, logits: Tensor) -> None:
        """Applies the penalties to logits (B, V) float32."""
        n, penalties = self._used, self._penalties
        rows, tokens, counts = self._rows[:n], self._tokens[:n], self._counts[:n]
        values = logits[rows, tokens]  # (N,)
        if penalties.repetition != 1.0:
            r = penalties.repetition
            values = torch.where(self._repeated[:n], torch.where(values > 0, values / r, values * r), values)
        values = values - (penalties.frequency * counts + penalties.presence * (counts > 0))
        logits[rows, tokens] = values


def penalized_reference(
    logits: Tensor, prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]], penalties: Penalties
) -> Tensor:
    """The formula, token by token: logits (B, V) after the penalties for each row's prompt and new ids."""
    out = logits.float().clone()
    for row, (prompt, ids) in enumerate(zip(prompts, new)):
        repeated = {*ids, *(prompt if penalties.repetition_sees_prompt else ())}
        counts = Counter([*ids, *(prompt if penalties.counts_see_prompt else ())])
        for token in repeated:
            value = out[row, token]
            out[row, token] = value / penalties.repetition if value > 0 else value * penalties.repetition
        for token, count in counts.items():
            out[row, token] -= penalties.frequency * count + penalties.presence
    return out


class FixedEdits:
    """Bias and bans: the same tokens in every row at every step."""

    def __init__(self, bias: Mapping[int, float], banned: Sequence[int], device: torch.device) -> None:
        self._biased = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._banned = torch.tensor(list(banned), dtype=torch.int64, device=device)

    def add_bias_inplace(self, logits: Tensor) -> None:
        logits[:, self._biased] += self._bias

    def ban_inplace(self, logits: Tensor) -> None:
        logits[:, self._banned] = -math.inf
