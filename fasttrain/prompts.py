"""What a caller may pass as a prompt, turned into rows of ids, and everything about them that cannot work said first.

Shapes: a prompt is a str or ids; a batch is a list of either, or a tensor (B, T).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import GenerationConfig
from .decoding import context_length, vocabulary_size
from .tokenization import Tokenizer


def kind_of(prompt: Any) -> tuple[bool, bool]:
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


def ids_of(prompt: Any, tokenizer: Tokenizer | None) -> list[list[int]]:
    """The ids of each prompt; text needs the tokenizer."""
    as_text, single = kind_of(prompt)
    if as_text:
        assert tokenizer is not None
        return [list(tokenizer.encode(text)) for text in ([prompt] if single else prompt)]
    batch = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    batch = [batch] if single and isinstance(batch[0], int) else batch
    return [[int(token) for token in row] for row in batch]


def fit_to_context(model: nn.Module, prompts: list[list[int]], settings: GenerationConfig) -> list[list[int]]:
    """The prompts as the policy `long_text` lets the model read them.

    Raises:
        ValueError: an empty prompt, or a text that the context cannot hold under that policy.
    """
    context, wanted = context_length(model), settings.max_new_tokens
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give it at least one token, say a newline")
    if context is None or settings.long_text == "sliding":
        return prompts
    room = context - wanted + 1  # the last token is never read
    if settings.long_text == "truncate_left":
        if room < 1:
            raise ValueError(
                f"max_new_tokens is {wanted}; the model's context is {context}, of which truncate_left must leave a "
                f"token of the prompt: at most {context} fit, or set long_text='sliding'"
            )
        return [prompt[-room:] for prompt in prompts]
    for index, prompt in enumerate(prompts):
        length = len(prompt)
        ways = "or set long_text='truncate_left' or 'sliding'"
        if length > context:
            raise ValueError(
                f"prompt {index} has {length} tokens; the model's context is {context}: shorten it, say to its "
                f"last {max(1, context - wanted)} tokens, {ways}"
            )
        if length > room:
            raise ValueError(
                f"max_new_tokens is {wanted} after the {length} tokens of prompt {index}; the "
                f"model's context is {context}: at most {context - length + 1} fit, {ways}"
            )
    return prompts


def check_ids(
    model: nn.Module, prompts: Sequence[Sequence[int]], settings: GenerationConfig | None = None,
    eos: Sequence[int] = (),
) -> None:  # fmt: skip
    """Refuses ids that the model does not have, in the prompts and in the settings."""
    vocabulary = vocabulary_size(model)
    end = 2**63 if vocabulary is None else vocabulary
    named = [(f"prompt {index} holds", row) for index, row in enumerate(prompts)]
    if settings is not None:
        named += [("GenerationConfig.banned_tokens holds", settings.banned_tokens)]
        named += [("GenerationConfig.logit_bias holds", list(settings.logit_bias)), ("eos_token_id holds", eos)]
    for where, ids in named:
        bad = next((token for token in ids if not 0 <= token < end), None)
        if bad is not None:
            raise ValueError(f"{where} token id {bad}; the model's ids lie in [0, {vocabulary})")


def check_tokenizer(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer with more ids than the model has."""
    size, vocabulary = size_of(tokenizer), vocabulary_size(model)
    if size is not None and vocabulary is not None and size > vocabulary:
        raise ValueError(
            f"tokenizer has {size} ids and the model {vocabulary}; pass the tokenizer that the model was trained with"
        )


def size_of(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.vocab_size
    except ValueError:  # a plain object that only encodes and decodes
        return None
