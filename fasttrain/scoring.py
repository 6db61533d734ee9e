"""How likely a model finds given texts: the log-probability of every token after those before it.

Texts go through the model a few at a time, the longest first, so no (B, T, V) logits of all are ever held; a model that
returns hidden states on request makes no logits at all (losses.linear_head). A text's score depends on no batchmate.
Left out: averages over a data set (evaluation.py).

Shapes: B texts in one call, T tokens of the longest, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .decoding import WindowDecoder, context_length, decoder_for, logits_of, undisturbed
from .losses import IGNORE, Parts, hidden_states, linear_head, shift_left
from .ops import cross_entropy, linear_cross_entropy
from .prompts import check_ids, check_tokenizer, ids_of, kind_of
from .tokenization import as_tokenizer
from .utils import device_of, unwrap

_TOKENS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Scored:
    """What a model makes of one text."""

    ids: list[int]
    """The text's token ids."""
    logprobs: list[float]
    """Natural log-probability of each id but the first, which has nothing before it."""

    @property
    def total(self) -> float:
        """Log-probability of the text after its first token."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token; NaN for a text of one token."""
        return math.exp(-self.total / len(self.logprobs)) if self.logprobs else math.nan


def score(model: nn.Module, prompt: Any, *, tokenizer: Any = None) -> Any:
    """The log-probabilities that `model` gives to the tokens of `prompt`, in float32 and without temperature.

    Args:
        model, prompt, tokenizer: as in `generate`.

    Returns:
        A `Scored` for a str, else a list of them, one for each row.

    Raises:
        ValueError: an empty text, one longer than the model's context, ids that the model does not have, no tokenizer
            for text, or logits of NaN.

    Equivalent to: model(ids).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]) for each text alone.
    """
    model = unwrap(model)
    as_text, single = kind_of(prompt)
    if tokenizer is None:
        tokenizer = getattr(model, "tokenizer", None)
    if as_text:
        if tokenizer is None:
            raise ValueError("a text needs a tokenizer: pass tokenizer=, set model.tokenizer, or pass ids")
        tokenizer = as_tokenizer(tokenizer)
        check_tokenizer(model, tokenizer)
    texts = ids_of(prompt, tokenizer)
    context = context_length(model)
    for index, text in enumerate(texts):
        if not text:
            raise ValueError(f"text {index} is empty; give it at least one token")
        if context is not None and len(text) > context:
            raise ValueError(
                f"text {index} has {len(text)} tokens; the model's context is {context}: score it in pieces"
            )
    check_ids(model, texts)
    results: list[Scored] = [Scored(text, []) for text in texts]
    with undisturbed([model]):
        for rows in _batches(texts, padded=not isinstance(decoder_for(model, "eager"), WindowDecoder)):
            for row, logprobs in zip(rows, _logprobs(model, [texts[row] for row in rows])):
                if any(math.isnan(value) for value in logprobs):
                    raise ValueError(f"text {row}: the model gives NaN; look for a diverged model or an overflow")
                results[row] = Scored(texts[row], logprobs)
    return results[0] if as_text and single else results


def _batches(texts: Sequence[Sequence[int]], padded: bool) -> Iterator[list[int]]:
    """Indices of the texts of each call, longest first. A model of unknown kind gets texts of one length together:
    nothing is known about how it would take padding."""
    batch: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: -len(texts[row])):
        full = batch and (len(batch) + 1) * len(texts[batch[0]]) > _TOKENS_AT_A_TIME
        if full or (batch and not padded and len(texts[row]) != len(texts[batch[0]])):
            yield batch
            batch = []
        if len(texts[row]) > 1:
            batch.append(row)
    if batch:
        yield batch


def _logprobs(model: nn.Module, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of each text's ids but the first."""
    device, longest = device_of(model), len(texts[0])
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)  # (B, T)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    mask = torch.arange(longest, device=device) < lengths[:, None]  # (B, T), padding on the right
    extras = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    parts = Parts(ids, shift_left(torch.where(mask, ids, IGNORE)), extras)
    targets = parts.targets.flatten()  # (B T,), each row's last is none
    head, _ = linear_head(model)
    if head is not None:
        hidden = head.scaled(hidden_states(model, head, parts))  # (B T, D)
        loss: Tensor = linear_cross_entropy(
            hidden, head.weight, targets, bias=head.bias, softcap=head.softcap, ignore_index=IGNORE, reduction="none"
        )
    else:
        logits = logits_of(model(ids, **extras)).flatten(0, 1)  # (B T, V)
        loss = cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    rows = (-loss.float()).view(ids.shape).tolist()
    return [row[: len(text) - 1] for row, text in zip(rows, texts)]
