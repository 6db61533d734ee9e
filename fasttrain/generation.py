"""Writes text with a model: one prompt or a ragged batch, all at once or streamed, the same words either way.

`generate` is the door. A row's text depends on the model, its prompt, the config and its seed alone: not on its
batchmates, on streaming, on the cache, or on any global random state, and generating leaves no trace in training.
Elsewhere: how a model is stepped (decoding.py), ids become text (text_stream.py), a token is drawn (ops/sample.py).

What "batch equals solo" rests on: padding is invisible and each row has its own random numbers. What remains is the
rounding of matrix products, which libraries choose by shape: logits may differ in the last bits, so two tokens would
have to be equally likely to within them for a text to differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .config import GenerationConfig, from_dict, load_config, to_dict
from .decoding import context_length, decoder_for, vocabulary_size
from .ops.sample import sample
from .text_stream import TextStream
from .tokenization import Tokenizer, as_tokenizer
from .utils import device_of, preserve_rng, unwrap

Engine = Literal["auto", "eager"]
Event = tuple[int, int, str]  # (row, new token id, text that became certain; the id is -1 for text alone)


@dataclass
class _Row:
    """One text being written."""

    index: int  # among the prompts: names the row to the user, and its seed is config.seed + index
    prompt: list[int]
    text: TextStream | None  # None: ids in, ids out
    new_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)


def generate(
    model: nn.Module,
    prompt: Any,
    config: GenerationConfig | dict[str, Any] | str | Path | None = None,
    *,
    tokenizer: Any = None,
    stream: bool = False,
    engine: Engine = "auto",
    **overrides: Any,
) -> Any:
    """Continues `prompt`. Text in gives text out, ids in give ids out; only what is new is returned.

    Args:
        model: a module called with ids (B, T) that returns logits (B, T, V), `(logits, loss)` or a dict or object
            with `logits`. Its cache is used if it has one: `new_cache` (ours), `past_key_values` (Hugging Face).
        prompt: a str; a list of str; ids as a tensor (B, T) or (T,), a list of ids, or a list of lists of ids. The
            rows of a list may differ in length.
        config: a GenerationConfig, a dict of its fields, or the path of a TOML or JSON file.
        tokenizer: anything that `as_tokenizer` takes; by default `model.tokenizer`. Ids need none, except for `stop`.
        stream: return an iterator instead. For a str prompt it yields pieces of text that joined are the text; for a
            list of them pairs (row, piece); for ids pairs (row, id).
        engine: "auto" or "eager".
        overrides: fields of GenerationConfig, each for this call.

    Returns:
        A str; a list of str; or for ids a list of lists of the new ids, one list per row (the end-of-text id included
        if it was drawn). With `stream` an iterator.

    Raises:
        ValueError: an unknown option, an empty prompt, a prompt or a length beyond the model's context, ids that the
            model does not have, no tokenizer for text, or logits without a distribution (NaN) while generating.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if engine not in ("auto", "eager"):
        raise ValueError(f"engine is {engine!r}; this version has 'auto' and 'eager'")
    model = unwrap(model)  # a compiled wrapper would compile again for every length
    settings = _settings(config, overrides)
    as_text, single = _kind_of(prompt)
    if tokenizer is None:
        tokenizer = getattr(model, "tokenizer", None)
    tokens = None if tokenizer is None else as_tokenizer(tokenizer)
    if tokens is None and (as_text or settings.stop):
        what = "a text prompt" if as_text else f"stop={settings.stop!r}"
        raise ValueError(f"{what} needs a tokenizer: pass tokenizer=, set model.tokenizer, or pass ids without stop")
    rows = _rows(prompt, as_text, tokens, settings)
    _check(model, rows, tokens if as_text else None, settings)
    run = _events(model, rows, settings, tokens, as_text)
    if stream:
        return _streamed(run, model, as_text, as_text and single)
    with _undisturbed(model):
        for _ in run:
            pass
    if as_text:
        texts = ["".join(row.pieces) for row in rows]
        return texts[0] if single else texts
    return [row.new_ids for row in rows]


def _settings(config: Any, overrides: dict[str, Any]) -> GenerationConfig:
    base = load_config(config, GenerationConfig)
    if isinstance(overrides.get("stop"), str):
        overrides = {**overrides, "stop": (overrides["stop"],)}
    return from_dict(GenerationConfig, {**to_dict(base), **overrides}) if overrides else base


def _kind_of(prompt: Any) -> tuple[bool, bool]:
    """(whether it is text, whether it is one prompt and not a batch)."""
    if isinstance(prompt, str):
        return True, True
    if isinstance(prompt, Tensor):
        if prompt.is_floating_point() or prompt.dtype == torch.bool or prompt.dim() not in (1, 2):
            raise ValueError(
                f"prompt is a {prompt.dtype} tensor of shape {tuple(prompt.shape)}; token ids are integers of shape "
                "(T,) or (B, T)"
            )
        return False, prompt.dim() == 1
    if isinstance(prompt, Sequence):
        if prompt and all(isinstance(item, str) for item in prompt):
            return True, False
        if all(isinstance(item, int) for item in prompt) and prompt:
            return False, True
        if all(isinstance(item, (Sequence, Tensor)) and not isinstance(item, str) for item in prompt):
            return False, False
    raise ValueError(
        f"prompt is a {type(prompt).__name__} of mixed or unknown items; pass a str, a list of str, a tensor of ids "
        "(B, T), or a list of lists of ids"
    )


def _rows(prompt: Any, as_text: bool, tokenizer: Tokenizer | None, settings: GenerationConfig) -> list[_Row]:
    if as_text:
        assert tokenizer is not None
        prompts = [tokenizer.encode(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
    else:
        batch = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        batch = [batch] if batch and isinstance(batch[0], int) else batch
        prompts = [[int(token) for token in row] for row in batch]
    reads = tokenizer if as_text or settings.stop else None
    return [
        _Row(index, list(ids), None if reads is None else TextStream(reads, settings.stop))
        for index, ids in enumerate(prompts)
    ]


def _check(model: nn.Module, rows: list[_Row], tokenizer: Tokenizer | None, settings: GenerationConfig) -> None:
    context, vocabulary = context_length(model), vocabulary_size(model)
    size = None if tokenizer is None else _size(tokenizer)
    if size is not None and vocabulary is not None and size > vocabulary:
        raise ValueError(
            f"tokenizer has {size} ids and the model {vocabulary}; pass the tokenizer that the model was trained with"
        )
    for row in rows:
        length = len(row.prompt)
        if length == 0:
            raise ValueError(f"prompt {row.index} is empty; give it at least one token, say a newline")
        if context is not None and length > context:
            raise ValueError(
                f"prompt {row.index} has {length} tokens; the model's context is {context}: shorten it, say to its "
                f"last {max(1, context - settings.max_new_tokens)} tokens"
            )
        if context is not None and length + settings.max_new_tokens - 1 > context:  # the last token is never read
            raise ValueError(
                f"max_new_tokens is {settings.max_new_tokens} after the {length} tokens of prompt {row.index}; the "
                f"model's context is {context}: at most {context - length + 1} fit"
            )
        bad = next((token for token in row.prompt if token < 0 or (vocabulary or 2**63) <= token), None)
        if bad is not None:
            raise ValueError(f"prompt {row.index} holds token id {bad}; the model's ids lie in [0, {vocabulary})")


def _size(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.vocab_size
    except ValueError:  # a plain object that only encodes and decodes
        return None


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast and the caller's random state put back: whatever happens inside, the model
    and the process are then as they were."""
    training = [module for module in model.modules() if module.training]
    with preserve_rng(), torch.inference_mode(), torch.autocast(device_of(model).type, enabled=False):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _streamed(run: Iterator[list[Event]], model: nn.Module, as_text: bool, bare: bool) -> Iterator[Any]:
    """Steps `run` and hands out its events. The modes are set for each step and not across a yield: between two pieces
    the caller's own code runs."""
    while True:
        with _undisturbed(model):
            events = next(run, None)
        if events is None:
            return
        for row, token, piece in events:
            if as_text and piece:
                yield piece if bare else (row, piece)
            elif not as_text and token >= 0:
                yield row, token


def _events(
    model: nn.Module, rows: list[_Row], settings: GenerationConfig, tokenizer: Tokenizer | None, as_text: bool
) -> Iterator[list[Event]]:
    """The loop: draw, record, drop what is finished, step. Yields what each round brought."""
    if not rows:
        return
    decoder, device = decoder_for(model), device_of(model)
    eos = settings.eos_token_id if settings.eos_token_id is not None or tokenizer is None else tokenizer.eos_token_id
    size = _size(tokenizer) if tokenizer is not None and as_text else None
    live = rows
    capacity = max(len(row.prompt) for row in rows) + settings.max_new_tokens - 1
    logits = decoder.start([row.prompt for row in rows], capacity)
    seen = _seen(rows, settings, device)
    for position in range(settings.max_new_tokens):
        tokens = _draw(logits, live, seen, settings, size, position)
        if seen is not None:
            seen = torch.cat((seen, tokens[:, None]), dim=1)
        last = position + 1 == settings.max_new_tokens
        events, going = _record(live, tokens.tolist(), eos, last)
        yield events
        if not going:
            return
        if len(going) < len(live):
            kept = torch.tensor(going, device=device)
            live, tokens, seen = [live[i] for i in going], tokens[kept], None if seen is None else seen[kept]
            decoder.keep_rows(kept)
        logits = decoder.step(tokens)


def _record(live: list[_Row], tokens: list[int], eos: int | None, last: bool) -> tuple[list[Event], list[int]]:
    """Adds a token to each row; returns the events and the positions in `live` of the rows that go on."""
    events, going = [], []
    for i, (row, token) in enumerate(zip(live, tokens)):
        row.new_ids.append(token)
        piece, stopped = ("", False) if row.text is None or token == eos else row.text.push(token)
        done = stopped or last or token == eos
        if done and not stopped and row.text is not None:
            piece += row.text.finish()
        row.pieces.append(piece)
        events.append((row.index, token, piece))
        if not done:
            going.append(i)
    return events, going


def _draw(
    logits: Tensor, live: list[_Row], seen: Tensor | None, settings: GenerationConfig, size: int | None, position: int
) -> Tensor:
    """(n,) int64: the next token of each row."""
    if size is not None and size < logits.size(1):
        # A vocabulary rounded up has ids that stand for nothing: they cannot be written, so they are not drawn.
        logits = logits[:, :size]
    if seen is not None:
        values = logits.gather(1, seen)
        penalty = settings.repetition_penalty
        # An id may be in `seen` twice: all its entries are computed from the same logit, so they agree.
        logits = logits.scatter(1, seen, torch.where(values > 0, values / penalty, values * penalty))
    seeds = torch.tensor([(settings.seed + row.index) % 2**63 for row in live], device=logits.device)
    try:
        return sample(
            logits,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            seed=seeds,
            position=position,
        )
    except ValueError as error:
        bad = (~torch.isfinite(logits.float().amax(1))).nonzero()[:, 0].tolist()
        if not bad:
            raise
        raise ValueError(f"prompt {live[bad[0]].index}, new token {position}: {error}") from None


def _seen(rows: list[_Row], settings: GenerationConfig, device: torch.device) -> Tensor | None:
    """Ids each row holds so far, (B, T) int64, short rows filled up with one of their own; None without a penalty."""
    if settings.repetition_penalty == 1.0:
        return None
    longest = max(len(row.prompt) for row in rows)
    return torch.tensor([row.prompt + row.prompt[:1] * (longest - len(row.prompt)) for row in rows], device=device)
