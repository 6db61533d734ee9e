"""Writes text with a model: one prompt or a ragged batch, all at once or streamed, the same words either way.

`generate` is the door. A row's text depends on the model, its prompt, the config and its seed alone: not on its
batchmates, on streaming, on the cache, on speculation, or on any global random state, and generating leaves no trace in
training. This file reads the request. Elsewhere: the loop (generation_loop.py), how a model is stepped (decoding.py,
speculation.py, context_window.py), a token is chosen (sampler.py), beams are searched (beam_search.py), ids become text
(text_stream.py).

What "batch equals solo" rests on: padding is invisible and each row has its own random numbers. What remains is the
rounding of matrix products, which libraries choose by shape: logits may differ in the last bits, so two tokens would
have to be equally likely to within them for a text to differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from .config import GenerationConfig, from_dict, load_config, to_dict
from .context_window import SlidingDecoder
from .decoding import (
    BranchingDecoder,
    Decoder,
    Engine,
    context_length,
    decoder_for,
    undisturbed,
    vocabulary_size,
)
from .generation_loop import Event, FinishReason, Job, Logprobs, Row, beam_events_of, events_of
from .prompts import check_ids, check_tokenizer, fit_to_context, ids_of, kind_of
from .sampler import Processor, truncation_of
from .speculation import Drafter, DraftModel, PromptLookup, SpeculativeDecoder
from .text_stream import TextStream
from .tokenization import Tokenizer, as_tokenizer
from .utils import device_of, unwrap


@dataclass(frozen=True)
class Generated:
    """One text and what is known about it: what `generate(..., details=True)` returns in a text's place."""

    ids: list[int]
    """The new ids, an end-of-text id included if it was drawn."""
    text: str | None
    """The new text, without the stop string; None if ids were given and no tokenizer."""
    finish_reason: FinishReason
    """What ended it: an end-of-text token, a stop string, or max_new_tokens."""
    logprobs: list[float] | None = None
    """Log-probability (natural) of each id if asked for. raw: under the model's own distribution; processed: under the
    one drawn from, after penalties, temperature and filters (0 for a greedy choice; beams: without filters)."""
    score: float | None = None
    """Beam search's score: the sum of log-probabilities / new ids ^ length_penalty."""
    drafted: int = 0
    """Tokens that speculation guessed."""
    accepted: int = 0
    """Those that were right, each of which saved a call of the model; accepted / drafted is the acceptance rate."""
    model_calls: int = 0
    """Calls of the model with speculation, the prompt's included."""


def generate(
    model: nn.Module,
    prompt: Any,
    config: GenerationConfig | dict[str, Any] | str | Path | None = None,
    *,
    tokenizer: Any = None,
    stream: bool = False,
    engine: Engine = "auto",
    processors: Sequence[Processor] = (),
    draft_model: nn.Module | None = None,
    details: bool = False,
    logprobs: Logprobs | None = None,
    **overrides: Any,
) -> Any:
    """Continues `prompt`. Text in gives text out, ids in give ids out; only what is new is returned.

    Args:
        model: a module called with ids (B, T) that returns logits (B, T, V), `(logits, loss)` or a dict or object
            with `logits`. Its cache is used if it has one: `new_cache` (ours), `past_key_values` (Hugging Face).
        prompt: a str; a list of str; ids as a tensor (B, T) or (T,), a list of ids, or a list of lists of ids. The
            rows of a list may differ in length.
        config: a GenerationConfig, a dict of its fields, or the path of a TOML or JSON file.
        tokenizer: anything that `as_tokenizer` takes; by default `model.tokenizer`. Ids need none, except for `stop`
            and `dry_breakers`.
        stream: return an iterator instead. For a str prompt it yields pieces of text that joined are the text; for a
            list of them pairs (row, piece); for ids pairs (row, id). Beam search yields what all beams that can still
            win agree in.
        engine: "native" is the C++ decoder (native_decoding.py) or an error that says why it cannot serve the model;
            "eager" is the model's own forward; "auto" the first where it can serve, else the second.
        processors: functions (ids (1, T) int64, logits (1, V) float32) -> logits (1, V), called in turn for each row
            and token before the temperature; ids are prompt and new text. For grammars and the like.
        draft_model: a smaller model over the same vocabulary that guesses `num_draft_tokens` at a time; the text is
            the same with it.
        details: return `Generated` objects instead of texts or ids.
        logprobs: keep the log-probability of each token, "raw" or "processed" (see `Generated`); implies details.
        overrides: fields of GenerationConfig, each for this call.

    Returns:
        A str; a list of str; or for ids a list of lists of the new ids, one list per row (the end-of-text id included
        if it was drawn). With `num_samples` > 1, in place of each of these a list of them. With `stream` an iterator.

    Raises:
        ValueError: an unknown option, options that contradict each other, an empty prompt, a prompt or a length beyond
            the model's context, ids that the model does not have, no tokenizer for text, or logits without a
            distribution (NaN, every token banned) while generating.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if engine not in get_args(Engine):
        raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(map(repr, get_args(Engine)))}")
    if logprobs not in (None, "raw", "processed"):
        raise ValueError(f"logprobs is {logprobs!r}; it must be 'raw', 'processed' or None")
    details = details or logprobs is not None
    if stream and details:
        raise ValueError("stream=True yields pieces and details=True (or logprobs) whole results; choose one of them")
    model = unwrap(model)  # a compiled wrapper would compile again for every length
    settings = _settings(config, overrides)
    as_text, single = kind_of(prompt)
    tokens = _tokenizer_for(model, tokenizer, settings, as_text)
    prompts = fit_to_context(model, ids_of(prompt, tokens), settings)
    job = _job(model, prompts, settings, tokens, as_text, processors, draft_model, logprobs, engine, stream)
    reads = tokens if as_text or settings.stop or details else None
    rows = [
        Row(i, prompts[i // settings.num_samples], None if reads is None else TextStream(reads, settings.stop))
        for i in range(len(prompts) * settings.num_samples)
    ]
    run = beam_events_of(job, rows) if settings.num_beams > 1 else events_of(job, rows)
    models = [model] if draft_model is None else [model, unwrap(draft_model)]
    if stream:
        return _streamed(run, models, as_text, as_text and single and settings.num_samples == 1)
    with undisturbed(models):
        for _ in run:
            pass
    results = [_result(row, job, details) for row in rows]
    if settings.num_samples > 1:
        results = [results[i : i + settings.num_samples] for i in range(0, len(rows), settings.num_samples)]
    return results[0] if as_text and single else results


def _settings(config: Any, overrides: dict[str, Any]) -> GenerationConfig:
    base = load_config(config, GenerationConfig)
    if isinstance(overrides.get("stop"), str):
        overrides = {**overrides, "stop": (overrides["stop"],)}
    return from_dict(GenerationConfig, {**to_dict(base), **overrides}) if overrides else base


def _tokenizer_for(model: nn.Module, tokenizer: Any, settings: GenerationConfig, as_text: bool) -> Tokenizer | None:
    if tokenizer is None:
        tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        return as_tokenizer(tokenizer)
    if settings.dry_multiplier > 0.0 and settings.dry_breakers:
        raise ValueError(
            f"dry_breakers={settings.dry_breakers!r} needs a tokenizer to find them: pass tokenizer= or dry_breakers=()"
        )
    if as_text or settings.stop:
        what = "a text prompt" if as_text else f"stop={settings.stop!r}"
        raise ValueError(f"{what} needs a tokenizer: pass tokenizer=, set model.tokenizer, or pass ids without stop")
    return None


def _job(
    model: nn.Module, prompts: list[list[int]], settings: GenerationConfig, tokenizer: Tokenizer | None, as_text: bool,
    processors: Sequence[Processor], draft_model: nn.Module | None, logprobs: Logprobs | None,
    engine: Engine, stream: bool,
) -> Job:  # fmt: skip
    """Checks what remains and picks the decoder."""
    if tokenizer is not None and as_text:
        check_tokenizer(model, tokenizer)
    eos = settings.eos_token_id
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos_token_id
    ends = eos if isinstance(eos, tuple) else () if eos is None else (eos,)
    check_ids(model, prompts, settings, ends)
    num_rows = len(prompts) * settings.num_samples
    seeds = list(settings.seed) if isinstance(settings.seed, tuple) else [settings.seed + i for i in range(num_rows)]
    if len(seeds) != num_rows:
        raise ValueError(
            f"GenerationConfig.seed holds {len(seeds)} seeds; {len(prompts)} prompts with num_samples="
            f"{settings.num_samples} are {num_rows} texts: give one seed, or one for each"
        )
    decoder: Decoder
    if draft_model is not None or settings.speculation != "none":
        decoder = _speculative(model, draft_model, settings, seeds, engine)
    else:
        decoder = decoder_for(model, engine, settings.weight_dtype)
    context = context_length(model)
    if settings.long_text == "sliding" and context is not None:
        decoder = SlidingDecoder(decoder, context)
    return Job(model, settings, tokenizer, as_text, ends, seeds, decoder, tuple(processors), logprobs, stream)


def _speculative(
    model: nn.Module, draft_model: nn.Module | None, settings: GenerationConfig, seeds: list[int], engine: Engine
) -> SpeculativeDecoder:
    if settings.long_text == "sliding":
        raise ValueError(
            "long_text='sliding' moves the text under the guesses of speculation; use one of the two, or "
            "long_text='truncate_left'"
        )

    def new_decoder() -> BranchingDecoder:
        return decoder_for(model, engine, settings.weight_dtype)

    if draft_model is None:
        return SpeculativeDecoder(new_decoder, lambda *_: PromptLookup(), settings.num_draft_tokens)
    if settings.speculation != "none":
        raise ValueError(f"speculation={settings.speculation!r} and draft_model both guess; give one of the two")
    if settings.num_beams > 1:
        raise ValueError(f"draft_model cannot be joined with num_beams={settings.num_beams}; leave out one of the two")
    if not isinstance(draft_model, nn.Module):
        raise ValueError(f"draft_model is a {type(draft_model).__name__}; pass a torch.nn.Module")
    drafts = unwrap(draft_model)
    sizes = vocabulary_size(model), vocabulary_size(drafts)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"draft_model has {sizes[1]} ids and the model {sizes[0]}; it must be trained with the same tokenizer"
        )
    context, truncation = context_length(drafts), truncation_of(settings)

    def new_drafter(row: int, prompt: Sequence[int], capacity: int) -> Drafter:
        if context is not None and capacity > context:
            raise ValueError(f"draft_model's context is {context}; the texts grow to {capacity} tokens: shorten them")
        seed = torch.tensor([seeds[row] % 2**63], device=device_of(drafts))
        return DraftModel(decoder_for(drafts), truncation, seed, len(prompt), capacity)

    return SpeculativeDecoder(new_decoder, new_drafter, settings.num_draft_tokens)


def _result(row: Row, job: Job, details: bool) -> Any:
    text = "".join(row.pieces) if row.text is not None else None
    if not details:
        return text if job.as_text else row.new_ids
    count = job.decoder.counts[row.index] if isinstance(job.decoder, SpeculativeDecoder) else None
    return Generated(
        ids=row.new_ids, text=text, finish_reason=row.reason, score=row.score,
        logprobs=row.logprobs if job.logprobs is not None else None, drafted=count.drafted if count else 0,
        accepted=count.accepted if count else 0, model_calls=count.model_calls if count else 0,
    )  # fmt: skip


def _streamed(run: Iterator[list[Event]], models: Sequence[nn.Module], as_text: bool, bare: bool) -> Iterator[Any]:
    """Steps `run` and hands out its events. The modes are set for each step and not across a yield: between two pieces
    the caller's own code runs."""
    while True:
        with undisturbed(models):
            events = next(run, None)
        if events is None:
            return
        for row, token, piece in events:
            if as_text and piece:
                yield piece if bare else (row, piece)
            elif not as_text and token >= 0:
                yield row, token
