"""From a model's logits to the next token of each row: everything of a GenerationConfig that acts on one token.

In this order: bias, penalties on tokens (penalties.py), DRY and no-repeat-ngram (repeats.py), bans and the minimal
length, the caller's processors, then temperature, filters and the draw (truncation.py, ops/sample.py). The sampler
holds what these remember of each row. A row's token depends on its own text, seed and position alone. Left out: when a
text ends.

Shapes: B rows still being written, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import GenerationConfig
from .penalties import FixedEdits, Penalties, SeenTokens
from .repeats import Dry, RepeatIndex
from .truncation import Truncation

Processor = Callable[[Tensor, Tensor], Tensor]
"""(ids of the text so far (1, T) int64, logits (1, V) float32) -> logits (1, V); transformers' LogitsProcessors fit."""


class Sampler:
    """Draws for the rows of one batch.

    Args:
        prompts: the ids of each row.
        seeds: one for each row.
        eos: ids that end a text; not drawn before `min_new_tokens`.
        size: ids from here on stand for nothing and are never drawn (None: all of the model's stand for something).
        text_of: the text of one token, for DRY's breakers.
    """

    def __init__(
        self, settings: GenerationConfig, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *,
        device: torch.device, eos: Sequence[int] = (), size: int | None = None,
        processors: Sequence[Processor] = (), text_of: Callable[[int], str] | None = None,
    ) -> None:  # fmt: skip
        self._settings, self._size, self._processors = settings, size, tuple(processors)
        self.truncation = truncation_of(settings)
        self._seeds = torch.tensor([seed % 2**63 for seed in seeds], dtype=torch.int64, device=device)
        self._device = device
        penalties = _penalties_of(settings)
        self._seen = SeenTokens(prompts, penalties, device) if penalties.on_seen_tokens else None
        self._fixed = FixedEdits(settings.logit_bias, settings.banned_tokens, device)
        self._eos = torch.tensor(list(eos), dtype=torch.int64, device=device)
        self._texts = [RepeatIndex(prompt) for prompt in prompts] if self._needs_texts() else None
        self._dry: list[Dry] | None = None
        if settings.dry_multiplier > 0.0 and self._texts is not None:
            arguments = (settings.dry_multiplier, settings.dry_base, settings.dry_allowed_length, settings.dry_breakers)
            self._dry = [Dry(text, *arguments, text_of or _no_text) for text in self._texts]

    def _needs_texts(self) -> bool:
        settings = self._settings
        return bool(self._processors) or settings.dry_multiplier > 0.0 or settings.no_repeat_ngram > 0

    def draw(self, logits: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """The next token of each row (B,) int64 and its log-probability under the processed distribution (B,) float32.

        Raises:
            ValueError: a row without a distribution.
        """
        return self.truncation.draw(self.adjusted(logits, position), self._seeds, position)

    def adjusted(self, logits: Tensor, position: int) -> Tensor:
        """Logits (B, V or size) with everything applied that comes before temperature; the caller's stay as they are.

        Args:
            position: how many new tokens each row has.
        """
        settings = self._settings
        if self._size is not None and self._size < logits.size(1):
            logits = logits[:, : self._size]
        eos_is_early = position < settings.min_new_tokens and len(self._eos) > 0
        edits = settings.logit_bias or settings.banned_tokens or self._seen or self._texts or eos_is_early
        if not edits:
            return logits
        logits = logits.to(torch.float32, copy=True)
        self._fixed.add_bias_inplace(logits)
        if self._seen is not None:
            self._seen.edit_inplace(logits)
        if self._texts is not None:
            self._edit_repeats_inplace(logits, self._texts)
        self._fixed.ban_inplace(logits)
        if eos_is_early:
            logits[:, self._eos] = -math.inf
        return self._processed(logits, self._texts) if self._processors and self._texts is not None else logits

    def arguments_of_the_op(self) -> dict[str, Any] | None:
        """temperature, top_k, top_p, min_p if every draw is `ops.sample` with these on untouched logits, else None."""
        settings = self._settings
        edits = settings.logit_bias or settings.banned_tokens or self._seen or self._texts
        if edits or (settings.min_new_tokens > 0 and len(self._eos) > 0):
            return None
        return self.truncation.arguments_of_the_op()

    def add(self, tokens: Sequence[int]) -> None:
        """One new token in each row."""
        if self._seen is not None:
            self._seen.add(tokens)
        for text, token in zip(self._texts or (), tokens):
            text.append(token)
        for dry, token in zip(self._dry or (), tokens):
            dry.append(token)

    def select_rows(self, rows: Sequence[int]) -> None:
        """The rows are now these, in this order; a row may be taken twice."""
        self._seeds = self._seeds[torch.tensor(rows, device=self._device)]
        if self._seen is not None:
            self._seen.select_rows(rows)
        if self._texts is None:
            return
        branches = len(set(rows)) < len(rows)
        self._texts = [self._texts[row].copy() if branches else self._texts[row] for row in rows]
        if self._dry is not None:
            assert not branches, "DRY follows one text and beam search excludes it"
            self._dry = [self._dry[row] for row in rows]

    def _edit_repeats_inplace(self, logits: Tensor, texts: list[RepeatIndex]) -> None:
        n = self._settings.no_repeat_ngram
        for row, text in enumerate(texts):
            if self._dry is not None:
                lost = {token: loss for token, loss in self._dry[row].penalties().items() if token < logits.size(1)}
                ids = torch.tensor(list(lost), dtype=torch.int64, device=logits.device)
                logits[row, ids] -= torch.tensor(list(lost.values()), dtype=torch.float32, device=logits.device)
            if n > 0:
                banned = [token for token in text.followers(n - 1) if token < logits.size(1)]
                logits[row, torch.tensor(banned, dtype=torch.int64, device=logits.device)] = -math.inf

    def _processed(self, logits: Tensor, texts: list[RepeatIndex]) -> Tensor:
        rows = []
        for row, text in enumerate(texts):
            ids, one = torch.tensor([text.ids], device=logits.device), logits[row : row + 1]
            for processor in self._processors:
                result: Any = processor(ids, one)
                if not isinstance(result, Tensor) or result.shape != one.shape or not result.is_floating_point():
                    name = getattr(processor, "__name__", type(processor).__name__)
                    got = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else f"{result!r}"
                    raise ValueError(
                        f"processor {name} returned {got}; it gets ids (1, T) and logits (1, V) and must return "
                        f"floating-point logits {list(one.shape)}"
                    )
                one = result.float()
            rows.append(one)
        return torch.cat(rows)


def truncation_of(settings: GenerationConfig) -> Truncation:
    names = Truncation.__dataclass_fields__
    return Truncation(**{name: getattr(settings, name) for name in names})


def _penalties_of(settings: GenerationConfig) -> Penalties:
    scope = settings.penalty_scope
    return Penalties(
        repetition=settings.repetition_penalty, frequency=settings.frequency_penalty,
        presence=settings.presence_penalty, repetition_sees_prompt=scope != "new", counts_see_prompt=scope == "all",
    )  # fmt: skip


def _no_text(token: int) -> str:
    raise AssertionError(f"token {token}: breakers were accepted without a tokenizer")
