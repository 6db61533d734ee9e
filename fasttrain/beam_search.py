"""Beam search: of all ways to go on, the few likeliest are kept side by side; nothing is drawn.

The score of a finished text is its log-probability / (new tokens ^ length_penalty). At each step the best
max(2, 1 + number of end tokens) * num_beams continuations of a prompt's beams are looked at: those among the first
num_beams that end are finished, the first num_beams of those that do not end go on. Penalties and bans act on the
log-probabilities, which are not normalised again: a text does not become likelier because others are banned. These are
the rules of transformers' `generate(num_beams=...)`, so the texts are its texts; but a prompt that is done leaves the
batch.
Left out: sampling beams, groups, constraints.

Shapes: P prompts still open, K beams each, V vocabulary; the decoder's rows are P * K, prompt by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import GenerationConfig
from .decoding import BranchingDecoder
from .sampler import Sampler


@dataclass
class Beam:
    """A text with the sum of its log-probabilities; finished, its score."""

    ids: list[int]
    log_probability: float
    logprobs: list[float]  # of each id
    score: float = -math.inf


@dataclass
class _Search:
    """The state of one prompt."""

    index: int
    beams: list[Beam]  # open ones, best first
    finished: list[Beam] = field(default_factory=list)  # best first, at most num_beams
    settled: list[int] = field(default_factory=list)


@dataclass
class Settled:
    """What one step settled for one prompt."""

    index: int
    ids: list[int]
    """New ids that every text which can still win has next; with `finished` the rest of the winner's."""
    finished: list[Beam] | None = None
    """At a prompt's end its finished texts, best first; their `ids` are the new ones, an end token included."""


def beam_search(
    decoder: BranchingDecoder, prompts: Sequence[Sequence[int]], sampler: Sampler, settings: GenerationConfig,
    eos: Sequence[int], capacity: int, raw_logprobs: bool,
) -> Iterator[list[Settled]]:  # fmt: skip
    """Yields what each step settled. What can win are the open beams and the finished ones: the ids in which they agree
    do not change any more, so they can be shown.

    Args:
        decoder: not started.
        sampler: for `num_beams` rows of each prompt; of it the penalties and bans are used.
        raw_logprobs: whether `Beam.logprobs` are those before penalties and bans.
    Raises:
        ValueError: NaN logits, or every token banned.
    """
    K = settings.num_beams
    logits = decoder.start(prompts, capacity)  # (P, V)
    rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(K)
    decoder.select_rows(rows)
    logits = logits[rows]
    nothing = Beam([], -math.inf, [])
    open_ = [_Search(i, [Beam([], 0.0, []), *[nothing] * (K - 1)]) for i in range(len(prompts))]
    for position in range(settings.max_new_tokens):
        own = logits.float().log_softmax(1)  # (P K, V)
        logprobs = sampler.adjusted(own, position)
        _check(logprobs, open_, K, position)
        shown = own if raw_logprobs else logprobs
        parents, tokens, going, news = [], [], [], list[Settled]()
        for number, search in enumerate(open_):
            part = slice(number * K, (number + 1) * K)
            chosen = _advance(search, logprobs[part], shown[part], settings, eos, position)
            if _is_done(search, settings, position + 1) or not chosen:
                rest = search.finished[0].ids[len(search.settled) :]
                news.append(Settled(search.index, rest, search.finished))
                continue
            news.append(Settled(search.index, _settle(search)))
            going.append(search)
            parents += [number * K + parent for parent, _ in chosen]
            tokens += [token for _, token in chosen]
        yield news
        if not going:
            return
        open_ = going
        decoder.select_rows(torch.tensor(parents, device=logits.device))
        sampler.select_rows(parents)
        sampler.add(tokens)
        logits = decoder.step(torch.tensor(tokens, device=logits.device))
    raise AssertionError("the last position ends every beam")


def _settle(search: _Search) -> list[int]:
    """Lengthens `settled` by the ids that all which can win have next, and returns these."""
    texts = [beam.ids for beam in [*search.finished, *search.beams] if beam.log_probability > -math.inf]
    begin = at = len(search.settled)
    while all(len(ids) > at and ids[at] == texts[0][at] for ids in texts):
        at += 1
    search.settled += texts[0][begin:at]
    return search.settled[begin:]


def _check(logprobs: Tensor, searches: list[_Search], K: int, position: int) -> None:
    bad = (~torch.isfinite(logprobs.amax(1))).nonzero()[:, 0].tolist()
    if bad:
        row = bad[0]
        found = "nothing but -inf" if bool((logprobs[row] == -math.inf).all()) else "NaN or +inf"
        raise ValueError(
            f"prompt {searches[row // K].index}, new token {position}: the logits hold {found}; there is no likeliest "
            "token. Look for a diverged model, an overflow in reduced precision or bans that leave nothing"
        )


def _advance(
    search: _Search, logprobs: Tensor, shown: Tensor, settings: GenerationConfig, eos: Sequence[int], position: int
) -> list[tuple[int, int]]:
    """One step of one prompt, logprobs and shown (K, V). Returns (beam it comes from, token) of the beams that go on;
    none if all continuations end."""
    K, V = logprobs.shape
    before = torch.tensor([beam.log_probability for beam in search.beams], device=logprobs.device)
    totals = (logprobs + before[:, None]).flatten()  # (K V,)
    best = totals.topk(min(max(2, 1 + len(eos)) * K, totals.numel()))
    values = shown.flatten()[best.indices].tolist()
    last = position + 1 == settings.max_new_tokens
    chosen: list[tuple[int, int]] = []
    beams: list[Beam] = []
    for rank, (total, place, value) in enumerate(zip(best.values.tolist(), best.indices.tolist(), values)):
        parent, token = divmod(place, V)
        if total == -math.inf:
            break
        source = search.beams[parent]
        beam = Beam([*source.ids, token], total, [*source.logprobs, value])
        if last or token in eos:
            if rank < K:
                beam.score = total / (position + 1) ** settings.length_penalty
                search.finished.append(beam)
        elif len(beams) < K:
            chosen.append((parent, token))
            beams.append(beam)
    search.finished = sorted(search.finished, key=lambda beam: -beam.score)[:K]
    if beams:  # fewer than K only where bans or a tiny vocabulary leave so few: filled up with beams that never win
        filler = Beam(beams[0].ids, -math.inf, [])
        chosen += [chosen[0]] * (K - len(chosen))
        search.beams = beams + [filler] * (K - len(beams))
    return chosen


def _is_done(search: _Search, settings: GenerationConfig, length: int) -> bool:
    """Whether the open beams can no longer change what is returned, by the rule of `early_stopping`."""
    if len(search.finished) < settings.num_beams:
        return False
    if settings.early_stopping == "first":
        return True
    hopeful = settings.early_stopping == "never" and settings.length_penalty > 0.0
    longest = settings.max_new_tokens if hopeful else length
    best: float = search.beams[0].log_probability / longest**settings.length_penalty
    return best <= search.finished[-1].score
