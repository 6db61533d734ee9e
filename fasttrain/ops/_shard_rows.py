"""Rows of logits that are cut over processes: what one shard knows of a row, and its part of the row's gradient.

The softmax of a whole row needs one number from outside, the row's log-sum-exp. `statistics` reduces a shard to three
numbers a row, from which all shards together make it (and the loss); `gradient` then writes the shard's gradient,
optionally over its logits. No process talks to another here: that is vocab_parallel.py.

Legend: n rows (tokens), S classes of the shard, V classes of all shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cross_entropy import TERMS_SCHEMA, Terms

IGNORED, ELSEWHERE = -2, -1
"""Local targets that are no class of the shard: a row without a target, and one whose target another shard holds."""


def local_targets(targets: Tensor, start: int, size: int, ignore_index: int) -> Tensor:
    """Global class ids (n,) as rows of the shard [start, start + size), or ELSEWHERE, or IGNORED."""
    local = targets - start
    local = torch.where((local >= 0) & (local < size), local, ELSEWHERE)
    return torch.where(targets == ignore_index, IGNORED, local)


def shard_statistics(impl: str, logits: Tensor, targets: Tensor, terms: Terms) -> Tensor:
    """(3, n) float64: log-sum-exp of the shard's logits; the target's logit, 0 where it is elsewhere; the sum of the
    logits, 0 without label smoothing. All of the softcapped logits; 0 for an ignored row.

    Args:
        impl: "reference", "cpp" or "triton".
        logits: (n, S), the last dimension contiguous; targets: (n,) from `local_targets`.
        terms: the loss's; its ignore_index is not looked at.
    """
    if logits.size(1) == 0:
        nothing = logits.new_zeros((3, logits.size(0)), dtype=torch.float64)
        nothing[0] = torch.where(targets == IGNORED, 0.0, -torch.inf)
        return nothing
    terms = terms._replace(ignore_index=IGNORED)
    if impl == "cpp":
        return torch.ops.fasttrain.cross_entropy_shard_statistics(logits, targets, *terms)  # type: ignore[no-any-return]
    if impl == "triton":
        return _triton_statistics(logits, targets, terms)
    x = _capped(logits if logits.dtype == torch.float64 else logits.float(), terms)  # (n, S)
    sums = x.sum(1) if terms.label_smoothing else torch.zeros_like(x[:, 0])
    rows = torch.stack((torch.logsumexp(x.double(), 1), _at_target(x, targets).double(), sums.double()))
    rows[1] = torch.where(targets >= 0, rows[1], 0.0)
    return torch.where(targets == IGNORED, 0.0, rows)


def shard_gradient(impl: str, logits: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, terms: Terms,
                   num_classes: int, *, in_place: bool = False) -> Tensor:
    """The gradient (n, S) of sum(scale * losses) by the shard's logits, in their type.

        scale * (p * (1 + 2 * z_loss * lse) - label_smoothing / V - (1 - label_smoothing) * [j == y]) * slope

    with p = exp(x - lse) and the softcap's slope 1 - (x / softcap)^2. Zero for an ignored row.

    Args:
        lse: (n,) float64, of whole rows. scale: (n,), float32 (float64 for float64 logits), any stride.
        num_classes: V.
        in_place: write over the logits, which must be contiguous, and return them.
    """
    terms = terms._replace(ignore_index=IGNORED)
    if logits.size(1) == 0:
        return logits if in_place else torch.zeros_like(logits)
    if impl == "cpp":
        arguments = (logits, targets, lse.contiguous(), scale, num_classes, *terms)
        if not in_place:
            return torch.ops.fasttrain.cross_entropy_shard_gradient(*arguments)  # type: ignore[no-any-return]
        torch.ops.fasttrain.cross_entropy_shard_gradient_(*arguments)
        return logits
    if impl == "triton":
        return _triton_gradient(logits, targets, lse, scale, terms, num_classes, in_place)
    x = logits if logits.dtype == torch.float64 else logits.float()
    capped = _capped(x, terms)
    factor = scale * (1 + 2 * terms.z_loss * lse).to(x.dtype)
    full = torch.exp(capped - lse[:, None]).to(x.dtype) * factor[:, None]
    full = (full - (scale * (terms.label_smoothing / num_classes))[:, None]) * _slope(capped, terms)
    full = _with_target(full, _target_gradient(x, targets, lse, scale, terms, num_classes), targets)
    return logits.copy_(full) if in_place else full.to(logits.dtype)


def _capped(x: Tensor, terms: Terms) -> Tensor:
    return terms.softcap * torch.tanh(x / terms.softcap) if terms.softcap else x


def _slope(capped: Tensor, terms: Terms) -> Tensor | float:
    return 1 - (capped / terms.softcap).square() if terms.softcap else 1.0


def _at_target(x: Tensor, targets: Tensor) -> Tensor:
    """(n, S) -> (n,): each row's target, or its first class where it has none here."""
    return x.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)


def _target_gradient(x: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, terms: Terms, num_classes: int) -> Tensor:
    """(n,) float64: the gradient at the column of `_at_target`, without the cancellation in p - 1 where p is near 1."""
    capped = _capped(_at_target(x, targets).double(), terms)
    spread = terms.label_smoothing / num_classes
    p = torch.exp(capped - lse)
    at_target = torch.expm1(capped - lse) + terms.label_smoothing
    value = torch.where(targets >= 0, at_target, p) + 2 * terms.z_loss * lse * p - spread
    return scale.double() * value * _slope(capped, terms)


def _with_target(full: Tensor, at_target: Tensor, targets: Tensor) -> Tensor:
    """`full` (n, S) with the columns of `_at_target` replaced and ignored rows zero; in place."""
    full.scatter_(1, targets.clamp(min=0)[:, None], at_target.to(full.dtype)[:, None])
    return full.masked_fill_((targets == IGNORED)[:, None], 0.0)


def _triton_statistics(logits: Tensor, targets: Tensor, terms: Terms) -> Tensor:
    """By the forward kernel, which takes every row's target for one of its own. One read of the logits."""
    forward = _kernels().cross_entropy_forward
    held = torch.where(targets == ELSEWHERE, 0, targets)
    # Smoothed by 1 and without z-loss its loss is lse - the mean of the logits.
    smoothing = 1.0 if terms.label_smoothing else 0.0
    losses, lse = forward(logits, held, ignore_index=IGNORED, label_smoothing=smoothing, z_loss=0.0,
                          softcap=terms.softcap)
    lse = lse.double()
    x_y = torch.where(targets >= 0, _capped(_at_target(logits, targets).double(), terms), 0.0)
    sums = (lse - losses) * logits.size(1) if terms.label_smoothing else torch.zeros_like(lse)
    return torch.stack((lse, x_y, sums))


def _triton_gradient(logits: Tensor, targets: Tensor, lse: Tensor, scale: Tensor, terms: Terms, num_classes: int,
                     in_place: bool) -> Tensor:
    """By the backward kernel; the one column of each row that it takes for the target is then written over."""
    at_target = _target_gradient(logits, targets, lse, scale, terms, num_classes)  # before it may be written over
    ours = terms._replace(label_smoothing=terms.label_smoothing * logits.size(1) / num_classes)  # it divides by S
    held = torch.where(targets == ELSEWHERE, 0, targets)
    gradient: Tensor = _kernels().cross_entropy_backward(
        scale, logits, held, lse.float(), **ours._asdict(), out=logits if in_place else None)
    return _with_target(gradient, at_target, targets)


def _kernels() -> Any:
    from ..kernels import cross_entropy  # triton is imported by the first call that needs it

    return cross_entropy


_LIBRARY: Any = torch.library.Library("fasttrain", "FRAGMENT")  # type: ignore[no-untyped-call]
_SHARD = f"Tensor targets, Tensor lse, Tensor scale, int num_classes, {TERMS_SCHEMA}"
_LIBRARY.define(f"cross_entropy_shard_statistics(Tensor logits, Tensor targets, {TERMS_SCHEMA}) -> Tensor")
_LIBRARY.define(f"cross_entropy_shard_gradient(Tensor logits, {_SHARD}) -> Tensor")
_LIBRARY.define(f"cross_entropy_shard_gradient_(Tensor(a!) logits, {_SHARD}) -> ()")
