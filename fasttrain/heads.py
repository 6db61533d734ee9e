"""Where a model's logits come from: hidden states times one matrix, found so that the loss never needs the logits.

The logits (B, T, V) are the largest tensor of a training step, and `ops.linear_cross_entropy` does without them if it
gets the hidden states and the head's weight instead. Two kinds of model offer both: ours (`forward(...,
return_hidden=True)` and `get_output_embeddings()`) and Hugging Face's causal models (`base_model`, whose output has
`last_hidden_state`). For the second kind the claim is checked once by a tiny forward pass, because some models scale
or cap their logits; whatever does not check keeps its logits, and the reason is reported.

Legend: B sequences, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .utils import device_of, preserve_rng, unwrap


class OutputHead(NamedTuple):
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), without softcap: scale * (...)."""

    module: nn.Module
    """Holds `weight` (V, D) and perhaps `bias` (V,)."""
    hidden: Callable[[nn.Module, Tensor, Mapping[str, Any]], Any]
    """(model, input_ids (B, T), more arguments) -> hidden states (B, T, D)."""
    accepts: frozenset[str]
    """Names that `hidden` takes as more arguments."""
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if bias is None or self.scale == 1.0 else bias * self.scale

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states whose product with the weight has the logits' scale."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        logits = F.linear(self.scaled(hidden), self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def linear_head(model: nn.Module) -> tuple[OutputHead | None, str]:
    """The head that turns the model's hidden states into exactly its logits, or None; and why."""
    inner = unwrap(model)
    name, accepted = type(inner).__name__, forward_parameters(type(inner).forward)
    if "targets" in accepted:
        return None, f"{name} computes a loss of its own"
    if not callable(getattr(inner, "get_output_embeddings", None)):
        return None, f"{name} does not offer get_output_embeddings() with forward(return_hidden=True) or a base_model"
    if model is not inner and any(getattr(wrapper, "find_unused_parameters", False)
                                  for wrapper in (model, model._modules.get("_orig_mod"))):
        return None, "find_unused_parameters=True would take the head for unused"
    module = inner.get_output_embeddings()  # type: ignore[operator]
    if type(module) not in (nn.Linear, nn.Embedding):  # a subclass may compute something else with its weight
        return None, f"the head of {name} is a {type(module).__name__}, not a plain nn.Linear or nn.Embedding"
    if "return_hidden" in accepted:
        return OutputHead(module, _by_argument, accepted), "no logits are made"
    return _hugging_face_head(model, inner, module)


@functools.lru_cache(maxsize=64)
def forward_parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Names that a module class's forward takes."""
    return frozenset(inspect.signature(forward).parameters)


def _by_argument(model: nn.Module, input_ids: Tensor, arguments: Mapping[str, Any]) -> Any:
    return model(input_ids, return_hidden=True, **arguments)


def _by_base_model(model: nn.Module, input_ids: Tensor, arguments: Mapping[str, Any]) -> Any:
    return model.base_model(input_ids=input_ids, **arguments).last_hidden_state  # type: ignore[operator, union-attr]


def _by_base_model_without_cache(model: nn.Module, input_ids: Tensor, arguments: Mapping[str, Any]) -> Any:
    return _by_base_model(model, input_ids, {"use_cache": False, **arguments})


_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[OutputHead | None, str]] = weakref.WeakKeyDictionary()
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def _hugging_face_head(model: nn.Module, inner: nn.Module, module: nn.Module) -> tuple[OutputHead | None, str]:
    name, base = type(inner).__name__, getattr(inner, "base_model", None)
    if not isinstance(base, nn.Module) or base is inner:
        return None, f"{name} has no base_model that gives its hidden states"
    if model is not inner:
        return None, f"{name} is wrapped as a whole ({type(model).__name__}), and its base_model cannot be called alone"
    known = _CHECKED.get(inner)
    if known is not None and (known[0] is None or known[0].module is module):
        return known
    accepts = forward_parameters(type(base).forward)
    config = getattr(inner, "config", None)
    head = OutputHead(module, _by_base_model_without_cache if "use_cache" in accepts else _by_base_model, accepts,
                      _scale_of(config), getattr(config, "final_logit_softcapping", None))
    verdict, final = _check_once(inner, head)
    if final:
        _CHECKED[inner] = verdict
    return verdict


def _scale_of(config: Any) -> float:
    """What Cohere (logit_scale), Falcon-H1 (lm_head_multiplier) and Granite (logits_scaling, a divisor) declare."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    return scale / float(getattr(config, "logits_scaling", None) or 1.0)


@torch.no_grad()
def _check_once(model: nn.Module, head: OutputHead) -> tuple[tuple[OutputHead | None, str], bool]:
    """((the head or None, reason), whether that is final): compares the logits of four tokens with head(hidden)."""
    name, size = type(model).__name__, head.weight.size(0)
    device = device_of(model)
    ids = torch.arange(1, 5, device=device)[None] % size  # (1, 4)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with preserve_rng(), torch.autocast(device.type, enabled=False):
            want = model(input_ids=ids).logits
            got = head.logits(head.hidden(model, ids, {}))
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError) as error:
        return (None, f"{name} could not be asked for hidden states ({type(error).__name__}: {error})"), True
    finally:
        for module, mode in modes:
            module.training = mode
    if got.shape != want.shape:
        return (None, f"{name} gives logits of shape {tuple(want.shape)}, its head {tuple(got.shape)}"), True
    largest = float(want.abs().max())
    if not largest:
        return (None, f"all logits of {name} are zero, which proves nothing about its head"), False
    error_size = float((got.float() - want.float()).abs().max()) / largest
    if not error_size <= _TOLERANCE.get(want.dtype, 2e-2):
        return (None, f"{name}'s logits are not its head times its last hidden states (they differ by "
                      f"{error_size:.1e} of the largest)"), True
    return (head, f"no logits are made; checked on four tokens of {name} to {error_size:.0e}"), True
