"""How a model says what comes next: one step per new token, with its own key/value cache where it has one.

Three kinds of model, one protocol: ours (`new_cache`), Hugging Face's (`past_key_values`), and any other module that
maps ids (B, T) to logits (B, T, V), which is run over its whole text again. All give the same text; the first two give
it in time linear in its length. Where it can, the native engine (native_decoding.py) takes the place of the model's own
forward. Left out: choosing the token, and everything about text.

Shapes: B rows still being written, T positions of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import WeightDtype
from .native_decoding import NativeDecoder, native_problem, release
from .utils import device_of, preserve_rng

Engine = Literal["auto", "native", "eager"]
_logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """The model's side of writing a batch of texts."""

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """Logits (B, V) after each prompt; no text will be longer than `capacity` positions."""

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B,) int64 in each row."""

    def keep_rows(self, rows: Tensor) -> None:
        """The other rows are finished; rows (n,) int64, ascending."""


@runtime_checkable
class BranchingDecoder(Decoder, Protocol):
    """One whose rows can be taken several times and whose last positions can be taken back: what several samples of
    one prompt, beam search and speculation need. Every decoder here is one."""

    def select_rows(self, rows: Tensor) -> None:
        """The rows are now these ((n,) int64), in that order; a row may be taken several times."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Logits (B, m, V) after each of m more tokens (B, m) int64 in each row."""

    def rewind(self, count: int) -> None:
        """Forgets the last `count` tokens of every row."""


def decoder_for(
    model: nn.Module, engine: Engine = "auto", weight_dtype: WeightDtype = "model"
) -> BranchingDecoder:
    """The native decoder where it can serve the model, else the fastest of the three that the model offers.

    Raises:
        ValueError: engine "native", or a `weight_dtype` other than the model's, where the native decoder cannot serve.
    """
    if engine == "native" or (engine == "auto" and weight_dtype != "model"):
        return NativeDecoder(model, weight_dtype)
    if engine == "auto":
        problem = native_problem(model)
        if not problem:
            return NativeDecoder(model, weight_dtype)
        _logger.info("the native engine does not serve %s: %s", type(model).__name__, problem)
    if weight_dtype != "model":
        raise ValueError(f"weight_dtype={weight_dtype!r} needs the native engine; engine is {engine!r}")
    if hasattr(model, "new_cache") and hasattr(model, "get_output_embeddings"):
        return OwnCacheDecoder(model)
    if "past_key_values" in _parameters(model):
        return HuggingFaceDecoder(model)
    return WindowDecoder(model)


class OwnCacheDecoder:
    """A model with `new_cache(batch, length)` and `return_hidden`, such as models.gpt.GPT: only the last position's
    hidden state meets the output head, so a prompt costs no (B, T, V) logits."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._cache: Any = None

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        ids, mask = pad_left(prompts, device_of(self._model))
        self._cache = self._model.new_cache(len(prompts), capacity)
        return self._logits(ids, 1, attention_mask=mask)[:, 0]

    def step(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens[:, None], 1)[:, 0]

    def extend(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens, tokens.size(1))

    def rewind(self, count: int) -> None:
        self._cache.rewind(self._cache.length - count)

    def select_rows(self, rows: Tensor) -> None:
        self._cache.select_rows(rows)

    keep_rows = select_rows

    def _logits(self, ids: Tensor, count: int, **arguments: Any) -> Tensor:
        """(B, count, V): of the last positions only."""
        hidden = self._model(ids, cache=self._cache, return_hidden=True, **arguments)  # (B, T, D)
        return F.linear(hidden[:, -count:], self._model.get_output_embeddings().weight)


class HuggingFaceDecoder:
    """A causal language model of the transformers library, through the cache that it returns."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._accepted = _parameters(model)
        self._cache: Any = None
        self._mask = torch.empty(0)  # (B, positions so far) int64, 0 where padding is

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        ids, mask = pad_left(prompts, device_of(self._model))
        self._mask = torch.ones_like(ids) if mask is None else mask
        self._cache = None
        return self._logits(ids, 1)[:, 0]

    def step(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens[:, None])[:, 0]

    def extend(self, tokens: Tensor) -> Tensor:
        self._mask = F.pad(self._mask, (0, tokens.size(1)), value=1)
        return self._logits(tokens, tokens.size(1))

    def rewind(self, count: int) -> None:
        if count == 0:
            return
        length = self._mask.size(1) - count
        self._mask = self._mask[:, :length]
        if hasattr(self._cache, "crop"):
            self._cache.crop(-count)  # how many to remove; the length that is to stay is no longer taken
        else:  # tuples of tensors (B, heads, T, E), the form before the Cache classes
            self._cache = tuple(tuple(tensor[:, :, :length] for tensor in layer) for layer in self._cache)

    def select_rows(self, rows: Tensor) -> None:
        self._mask = self._mask[rows]
        if hasattr(self._cache, "batch_select_indices"):
            self._cache.batch_select_indices(rows)
        else:
            self._cache = tuple(tuple(tensor[rows] for tensor in layer) for layer in self._cache)

    keep_rows = select_rows

    def _logits(self, ids: Tensor, count: int) -> Tensor:
        """(B, count, V): of the last positions only, where the model can be told so."""
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.size(1) :]
        arguments: dict[str, Any] = {"attention_mask": self._mask, "past_key_values": self._cache, "use_cache": True}
        if "position_ids" in self._accepted:
            arguments["position_ids"] = positions
        if "logits_to_keep" in self._accepted:
            arguments["logits_to_keep"] = count
        output = self._model(ids, **arguments)
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise ValueError(f"{type(self._model).__name__} returned no past_key_values despite use_cache=True")
        return logits_of(output)[:, -count:]


class WindowDecoder:
    """Any other module: each step runs every row's whole text. Rows of one length share a call; rows of different
    lengths do not, because nothing is known about how the module would take padding."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._groups: list[tuple[Tensor, Tensor]] = []  # (rows (g,), their ids (g, T)), one for each length

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        device = device_of(self._model)
        by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        self._groups = [
            (torch.tensor(rows, device=device), torch.tensor([list(prompts[row]) for row in rows], device=device))
            for rows in by_length.values()
        ]
        return self._logits(1)[:, 0]

    def step(self, tokens: Tensor) -> Tensor:
        return self.extend(tokens[:, None])[:, 0]

    def extend(self, tokens: Tensor) -> Tensor:
        self._groups = [(rows, torch.cat((ids, tokens[rows]), dim=1)) for rows, ids in self._groups]
        return self._logits(tokens.size(1))

    def rewind(self, count: int) -> None:
        self._groups = [(rows, ids[:, : ids.size(1) - count]) for rows, ids in self._groups]

    def select_rows(self, rows: Tensor) -> None:
        groups = []
        for members, ids in self._groups:
            new, old = (rows[:, None] == members[None, :]).nonzero().unbind(1)  # (g,) each
            if new.numel():
                groups.append((new, ids[old]))
        self._groups = groups

    keep_rows = select_rows

    def _logits(self, count: int) -> Tensor:
        """(B, count, V): of each row's last positions."""
        parts = [logits_of(self._model(ids))[:, -count:] for _, ids in self._groups]
        order = torch.cat([rows for rows, _ in self._groups]).argsort()
        return torch.cat(parts)[order]


@contextlib.contextmanager
def undisturbed(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode, no gradients, no autocast and the caller's random state put back: whatever happens inside, the models
    and the process are then as they were."""
    training = [module for model in models for module in model.modules() if module.training]
    with preserve_rng(), torch.inference_mode(), torch.autocast(device_of(models[0]).type, enabled=False):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
            for model in models:
                if model.training:  # its weights change before the next text: a packed copy would only take memory
                    release(model)


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids (B, T) int64, padded with 0 on the left, and the mask (B, T) int64, 1 for a token; None if all are."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids, None
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def logits_of(output: Any) -> Tensor:
    """The logits (B, T, V) in what a model returned: logits, (logits, loss), or a dict or object with `logits`."""
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, (tuple, list)):
        logits = output[0]
    else:
        logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"the model returned {got}; to generate it must return logits (B, T, V), (logits, loss), or a dict or "
            "object with .logits"
        )
    return logits


def context_length(model: nn.Module) -> int | None:
    """The most positions the model's config admits, under the names in use for it; None if it names none."""
    config = getattr(model, "config", None)
    for name in ("max_seq_len", "max_position_embeddings", "n_positions", "block_size"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def vocabulary_size(model: nn.Module) -> int | None:
    """How many ids the model's config names; None if it names none."""
    value = getattr(getattr(model, "config", None), "vocab_size", None)
    return value if isinstance(value, int) else None


def _parameters(model: nn.Module) -> frozenset[str]:
    """Names that the model's forward takes; of an adapter around a model (PEFT), the names that it hands on."""
    base: Any = getattr(model, "get_base_model", None)
    inner = model if base is None else base()
    return frozenset(inspect.signature(inner.forward).parameters)
