"""The loop that writes a batch of texts: draw, record, let finished rows leave, step; and its counterpart for beams.

A job is what generation.py settled beforehand, rows are the texts in the making. Left out: what is a valid request.

Shapes: B rows still being written, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .beam_search import beam_search
from .config import GenerationConfig
from .decoding import BranchingDecoder, Decoder
from .native_decoding import NativeDecoder
from .ops.sample import check_rows
from .prompts import size_of
from .sampler import Processor, Sampler
from .text_stream import TextStream
from .tokenization import Tokenizer
from .utils import device_of

Logprobs = Literal["raw", "processed"]
FinishReason = Literal["eos", "stop", "length"]
Event = tuple[int, int, str]  # (row, new token id, text that became certain; the id is -1 for text alone)


@dataclass
class Row:
    """One text being written."""

    index: int  # among all texts: prompt * num_samples + sample
    prompt: list[int]
    text: TextStream | None  # None: ids in, ids out
    new_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason = "length"
    score: float | None = None


@dataclass(frozen=True)
class Job:
    """What one call of `generate` has settled before the first token."""

    model: nn.Module
    settings: GenerationConfig
    tokenizer: Tokenizer | None
    as_text: bool
    eos: tuple[int, ...]
    seeds: list[int]  # one for each row
    decoder: Decoder
    processors: tuple[Processor, ...]
    logprobs: Logprobs | None
    stream: bool = False


def _sampler(job: Job, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Sampler:
    # A vocabulary rounded up has ids that stand for nothing: they cannot be written, so they are not drawn.
    size = size_of(job.tokenizer) if job.tokenizer is not None and job.as_text else None
    return Sampler(
        job.settings, prompts, seeds, device=device_of(job.model), eos=job.eos, size=size, processors=job.processors,
        text_of=None if job.tokenizer is None else _TokenText(job.tokenizer),
    )  # fmt: skip


class _TokenText:
    """The text of one token, looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._tokenizer.decode([token])
        return self._known[token]


def events_of(job: Job, rows: list[Row]) -> Iterator[list[Event]]:
    """The loop: draw, record, drop what is finished, step. Yields what each round brought."""
    if not rows:
        return
    settings, decoder, device = job.settings, job.decoder, device_of(job.model)
    capacity = max(len(row.prompt) for row in rows) + settings.max_new_tokens - 1
    logits = _start(decoder, rows, settings.num_samples, capacity, device)
    sampler = _sampler(job, [row.prompt for row in rows], job.seeds)
    arguments = sampler.arguments_of_the_op() if job.logprobs is None else None
    if isinstance(decoder, NativeDecoder) and arguments is not None:
        yield from _native_events(job, rows, decoder, arguments, logits.size(1))
        return
    live = rows
    for position in range(settings.max_new_tokens):
        drawn = _draw(logits, live, sampler, job, position)
        tokens = drawn.tolist()
        events, going = _record(live, tokens, job, position)
        yield events
        if not going:
            return
        if len(going) < len(live):
            kept = torch.tensor(going, device=device)
            live, tokens, drawn = [live[i] for i in going], [tokens[i] for i in going], drawn[kept]
            sampler.select_rows(going)
            decoder.keep_rows(kept)
        sampler.add(tokens)
        logits = decoder.step(drawn)


def _native_events(
    job: Job, rows: list[Row], decoder: NativeDecoder, arguments: dict[str, Any], vocabulary: int
) -> Iterator[list[Event]]:
    """The same loop inside the native decoder, for draws that are `ops.sample` on the model's own logits. It comes back
    for each round's record; a stream gets its rounds one by one."""
    size = size_of(job.tokenizer) if job.tokenizer is not None and job.as_text else None
    vocabulary = vocabulary if size is None else min(size, vocabulary)
    live, position, events = rows, 0, list[Event]()

    def record(tokens: list[int]) -> list[int]:
        nonlocal live, position
        new, going = _record(live, tokens, job, position)
        events.extend(new)
        live, position = [live[i] for i in going], position + 1
        return going

    while live:
        events.clear()
        seeds = [job.seeds[row.index] % 2**63 for row in live]
        try:
            decoder.run(1 if job.stream else job.settings.max_new_tokens, seeds, vocabulary, (), record, **arguments)
        except ValueError:
            _check_logits(decoder.logits(len(live))[:, :vocabulary], live, job, position)
            raise
        yield list(events)


def _check_logits(logits: Tensor, live: list[Row], job: Job, position: int) -> None:
    """Raises for the first row without a distribution, naming its prompt."""
    for i, row in enumerate(live):
        try:
            check_rows(logits[i : i + 1], 0)
        except ValueError as error:
            raise ValueError(f"prompt {row.index // job.settings.num_samples}, new token {position}: {error}") from None


def _start(decoder: Decoder, rows: list[Row], num_samples: int, capacity: int, device: torch.device) -> Tensor:
    """Logits (B, V) after each row's prompt; the samples of one prompt read it once where the decoder can branch."""
    if num_samples == 1 or not isinstance(decoder, BranchingDecoder):
        return decoder.start([row.prompt for row in rows], capacity)
    logits = decoder.start([row.prompt for row in rows[::num_samples]], capacity)
    sources = torch.arange(logits.size(0), device=device).repeat_interleave(num_samples)
    decoder.select_rows(sources)
    return logits[sources]


def _record(live: list[Row], tokens: list[int], job: Job, position: int) -> tuple[list[Event], list[int]]:
    """Adds a token to each row; returns the events and the positions in `live` of the rows that go on."""
    events, going = [], []
    last, may_stop = position + 1 == job.settings.max_new_tokens, position + 1 >= job.settings.min_new_tokens
    for i, (row, token) in enumerate(zip(live, tokens)):
        row.new_ids.append(token)
        ended = token in job.eos
        piece, stopped = ("", False) if row.text is None or ended else row.text.push(token, may_stop)
        if ended or stopped or last:
            row.reason = "stop" if stopped else "eos" if ended else "length"
            if not stopped and row.text is not None:
                piece += row.text.finish()
        else:
            going.append(i)
        row.pieces.append(piece)
        events.append((row.index, token, piece))
    return events, going


def _draw(logits: Tensor, live: list[Row], sampler: Sampler, job: Job, position: int) -> Tensor:
    """(B,) int64: the next token of each row."""
    try:
        tokens, logprobs = sampler.draw(logits, position)
    except ValueError as error:
        bad = (~torch.isfinite(logits.float().amax(1))).nonzero()[:, 0].tolist()
        where = f"prompt {live[bad[0]].index // job.settings.num_samples}, " if bad else ""
        raise ValueError(f"{where}new token {position}: {error}") from None
    if job.logprobs == "raw":
        x = logits.float()
        logprobs = x.gather(1, tokens[:, None])[:, 0] - x.logsumexp(1)
    if job.logprobs is not None:
        for row, value in zip(live, logprobs.tolist()):
            row.logprobs.append(value)
    return tokens


def beam_events_of(job: Job, rows: list[Row]) -> Iterator[list[Event]]:
    """Beam search: a text grows by what all beams that can still win agree in."""
    if not rows:
        return
    settings = job.settings
    if not isinstance(job.decoder, BranchingDecoder):
        name = type(job.decoder).__name__
        raise ValueError(f"num_beams is {settings.num_beams}; {name} cannot branch: use engine='eager'")
    prompts = [row.prompt for row in rows]
    capacity = max(map(len, prompts)) + settings.max_new_tokens - 1
    of_beams = [i for i in range(len(rows)) for _ in range(settings.num_beams)]
    sampler = _sampler(job, [prompts[i] for i in of_beams], [job.seeds[i] for i in of_beams])
    for news in beam_search(job.decoder, prompts, sampler, settings, job.eos, capacity, job.logprobs == "raw"):
        events = list[Event]()
        for settled in news:
            row = rows[settled.index]
            for token in settled.ids:
                row.new_ids.append(token)
                row.pieces.append("" if row.text is None or token in job.eos else row.text.push(token)[0])
                events.append((row.index, token, row.pieces[-1]))
            if settled.finished is not None:
                best = settled.finished[0]
                row.logprobs, row.score = best.logprobs, best.score
                row.reason = "eos" if best.ids[-1] in job.eos else "length"
                if row.text is not None:
                    row.pieces.append(row.text.finish())
                    events.append((row.index, -1, row.pieces[-1]))
        yield events
