"""From a batch to (sum of token losses, number of targets): the one place that knows batch and model conventions.

The sum, not the mean: only sums over micro-batches (and ranks) can be divided once by the true number of targets.
A batch is a dict in Hugging Face's form (`input_ids`, `labels` not yet shifted, `attention_mask`), a pair (x, y) with
y already shifted, or a tensor of ids (shifted here). A model returns logits, (logits, loss), or a dict or object with
`.logits`/`.loss`; one that can return its hidden states instead is never asked for logits, the largest tensor of a
step. Labels of -100 are no targets. Deliberately left out: losses other than next-token prediction;
pass `loss_fn(model, batch) -> (loss_sum, num_targets)` for those.

Legend: B sequences, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import OutputHead, forward_parameters, linear_head
from .ops import cross_entropy, linear_cross_entropy
from .utils import unwrap

__all__ = ["IGNORE", "LossFunction", "Parts", "batch_loss", "call_model", "check_is_causal", "linear_head",
           "split_batch", "shift_left"]

IGNORE = -100

_FEW_LOGITS = 1 << 17
"""So few logits are made after all: they fit a cache, and one product is quicker than the chunked op's bookkeeping."""

LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


class Parts(NamedTuple):
    """A batch in one form."""

    input_ids: Tensor  # (B, T)
    targets: Tensor  # (B, T), targets[:, t] is what logits[:, t] predict; IGNORE is no target
    extras: dict[str, Any]  # what else the batch holds and the model's forward accepts


def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(loss_sum () float32, num_targets () int64), both on the model's device, without reading the device.

    A scalar loss that the model itself returns wins over its logits (it may hold more than cross-entropy); it is
    taken as a mean over the targets and multiplied by their number. Where `linear_head` finds one, the loss is computed
    from hidden states, and no logits are made (but for the few of a tiny problem).

    Raises:
        ValueError: a batch or an output of unknown form, or logits that do not fit the targets.
        IndexError: a label outside the vocabulary.
    """
    parts = split_batch(batch)
    num_targets = (parts.targets != IGNORE).sum()
    head, _ = linear_head(model)
    if head is not None:
        hidden, targets = hidden_states(model, head, parts), parts.targets.reshape(-1)
        if targets.numel() * head.weight.size(0) <= _FEW_LOGITS:
            few = F.cross_entropy if hidden.is_cpu else cross_entropy  # PyTorch's checks labels on the CPU only
            return few(head.logits(hidden).float(), targets, ignore_index=IGNORE, reduction="sum"), num_targets
        hidden = head.scaled(hidden)
        loss_sum = linear_cross_entropy(hidden, head.weight, targets, ignore_index=IGNORE,
                                        bias=head.bias, softcap=head.softcap, reduction="sum")
        return loss_sum.float(), num_targets
    logits, loss = call_model(model, parts)
    if loss is not None:
        return torch.where(num_targets > 0, loss.float() * num_targets, 0.0), num_targets
    flat = flat_logits(logits, parts.targets)
    return cross_entropy(flat, parts.targets.reshape(-1), ignore_index=IGNORE, reduction="sum").float(), num_targets


def split_batch(batch: Any) -> Parts:
    """Any of the three batch forms as `Parts`."""
    if isinstance(batch, Tensor):
        return Parts(batch, shift_left(batch), {})
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise ValueError(f"the batch is a mapping with {sorted(map(str, batch))}; it must hold 'input_ids' (and "
                             "'labels', 'attention_mask' if any), or pass loss_fn=")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = batch.get("labels")
        if labels is None:
            labels = ids if mask is None else ids.masked_fill(mask == 0, IGNORE)
        extras = {key: value for key, value in batch.items() if key not in ("input_ids", "labels")}
        return Parts(ids, shift_left(labels), extras)
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return Parts(batch[0], batch[1], {})
    raise ValueError(f"the batch is a {type(batch).__name__}; it must be a dict with 'input_ids', a pair (x, y) of "
                     "tensors with y already shifted, or a tensor of ids; for anything else pass loss_fn=")


def shift_left(labels: Tensor) -> Tensor:
    """Labels moved to the position that predicts them; the last position predicts nothing. (B, T) -> (B, T).

    The labels move and the logits stay: cutting (B, T, V) logits would copy them.
    """
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE)


def call_model(model: nn.Module, parts: Parts) -> tuple[Any, Tensor | None]:
    """(logits, the model's own scalar loss or None)."""
    arguments = _accepted(model, parts)
    # nanoGPT's convention: already shifted, and without them only the last logits come back.
    if "targets" in forward_parameters(type(unwrap(model)).forward):
        arguments["targets"] = parts.targets
    output = model(parts.input_ids, **arguments)
    if isinstance(output, Mapping):
        logits, loss = output.get("logits"), output.get("loss")
    elif isinstance(output, (tuple, list)):
        logits, loss = output[0], output[1] if len(output) > 1 else None
        if isinstance(logits, Tensor) and logits.dim() == 0:  # (loss, logits), Hugging Face's return_dict=False
            logits, loss = loss, logits
    elif hasattr(output, "logits"):
        logits, loss = output.logits, getattr(output, "loss", None)
    else:
        logits, loss = output, None
    if isinstance(logits, Tensor) and logits.dim() == 0:
        logits, loss = None, logits
    return logits, loss if isinstance(loss, Tensor) and loss.dim() == 0 else None


def _accepted(model: nn.Module, parts: Parts) -> dict[str, Any]:
    """What the batch holds besides ids and labels and the model's forward takes."""
    accepted = forward_parameters(type(unwrap(model)).forward)
    return {key: value for key, value in parts.extras.items() if key in accepted}


def hidden_states(model: nn.Module, head: OutputHead, parts: Parts) -> Tensor:
    """The model's last hidden states as (N, D), checked against the head and N targets."""
    hidden = head.hidden(model, parts.input_ids, {k: v for k, v in parts.extras.items() if k in head.accepts})
    size = head.weight.size(1)
    if not isinstance(hidden, Tensor) or hidden.shape[-1:] != (size,) or hidden.numel() != parts.targets.numel() * size:
        raise ValueError(f"the model returned {_describe(hidden)} for return_hidden=True and targets of shape "
                         f"{tuple(parts.targets.shape)}; it must return hidden states (B, T, {size}), one row for each "
                         f"target, {size} being what its get_output_embeddings().weight takes")
    return hidden.reshape(-1, size)


def flat_logits(logits: Any, targets: Tensor) -> Tensor:
    """Logits (..., V) as (N, V), checked against N targets."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        raise ValueError(f"the model returned {_describe(logits)}; it must return logits (B, T, V), (logits, loss), or "
                         "a dict or object with .logits or .loss; for anything else pass loss_fn=")
    flat = logits.reshape(-1, logits.size(-1))
    if flat.size(0) != targets.numel():
        raise ValueError(f"the model returned logits of shape {tuple(logits.shape)} for targets of shape "
                         f"{tuple(targets.shape)}; there must be one row of logits for each target")
    return flat


def check_is_causal(model: nn.Module) -> None:
    """Refuses a Hugging Face model with another objective than next-token prediction, which would train without
    an error and learn the wrong thing.

    Raises:
        ValueError: naming the objective and the way out.
    """
    inner = unwrap(model)
    objective = getattr(inner, "loss_type", None)
    encoder_decoder = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
    if encoder_decoder or (isinstance(objective, str) and objective != "ForCausalLM"):
        kind = "an encoder-decoder" if encoder_decoder else f"trained with the loss {objective!r}"
        raise ValueError(f"{type(inner).__name__} is {kind}, not a causal language model; pass "
                         "loss_fn(model, batch) -> (loss_sum, num_targets)")
    if getattr(getattr(inner, "config", None), "output_router_logits", False) is True:
        raise ValueError(f"{type(inner).__name__} adds a router loss to its own loss (config.output_router_logits), "
                         "which next-token cross-entropy would drop; set it to False, or pass loss_fn(model, batch) -> "
                         "(loss_sum, num_targets)")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
