"""The two cross-entropies with the vocabulary cut over processes: every rank holds some classes, all the same tokens.

Tensor parallelism cuts a language model's head by rows, and the softmax then needs the whole row. Gathering the logits
would move N x V numbers; here two or three numbers a row do: a shard's log-sum-exp, its target's logit and, for label
smoothing, the sum of its logits. Their sums over the ranks give every rank the loss and the log-sum-exp of whole rows,
from which it writes the gradient of its own shard. The groups are PyTorch's, or a DTensor's own mesh. Left out: class
weights, probability targets, a second derivative; inside torch.compile the graph breaks here.

Legend: N rows (tokens), M of them with a target, D hidden size, V classes, S classes of this rank's shard, n ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from .collectives import own_rows_of_sum
from .ops._dispatch import Impl
from .ops._shard_rows import local_targets, shard_gradient, shard_statistics
from .ops.cross_entropy import Reduction
from .products import By, add_transposed_product, kernels_for, multiply, multiply_into
from .utils import on_host
from .vocab_shards import HiddenGrad, Shards, agree, fingerprint, local_parts

__all__ = ["cross_entropy", "linear_cross_entropy"]

_LARGEST_EXPONENT = 600.0
"""exp of a row's log-sum-exp fits a float64 up to here without being taken against the row's maximum."""


@_disable_dynamo
def cross_entropy(logits: Tensor, targets: Tensor, *, group: dist.ProcessGroup | None = None,
                  vocab_start: int | None = None, vocab_size: int | None = None, ignore_index: int = -100,
                  label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
                  reduction: Reduction = "mean", impl: Impl = "auto") -> Tensor:
    """`ops.cross_entropy(all logits, targets, ...)` where this rank holds the logits of S classes.

    Args:
        logits: (N, S), this rank's classes; float32, bfloat16, float16 or float64. Shards may differ in size and be
            empty. A DTensor (N, V) in Shard(1) brings its group with it.
        targets: (N,), int64 or int32, the same on every rank: ids in [0, V), or `ignore_index`.
        group: the ranks that share the vocabulary; None: the default group, or the DTensor's.
        vocab_start: the id of this rank's first class; None: the shards follow each other in rank order.
        vocab_size: V; needed only where one group holds several vocabularies (without DTensors).
        The others: as in `ops.cross_entropy`.

    Returns:
        float32 (float64 for float64 logits), the same on every rank: 0-d, or (N,) for "none".

    Raises:
        ValueError: what `ops.cross_entropy` refuses; ranks whose arguments do not fit together, or whose shards overlap
            or leave a hole (compared at the first call of each kind, by one all-gather); other targets on another rank.
        IndexError: a target out of range. On an accelerator, where looking would stall it, that row's loss is NaN.

    On the wire: one all-reduce of 8 * (2 M + 2) bytes (3 M with label smoothing); M = N on an accelerator. Where it may
    not read the result (an accelerator, without softcap <= 600), or where that shows a log-sum-exp beyond +-667 (CPU),
    another one of 8 * M for the maxima. The backward sends nothing: every rank calls it, with the same gradient.

    Saved for backward: the logits and one float64 per row.
    """
    group, local, total = local_parts(group, 1, {"logits": logits}, {"targets": targets})
    options = (ignore_index, label_smoothing, z_loss, softcap)
    shards = agree(group, local, options, reduction, impl, vocab_start, total if vocab_size is None else vocab_size)
    logits, targets = local["logits"], local["targets"].long()
    losses: Tensor = _FromLogits.apply(logits, targets, shards)  # type: ignore[no-untyped-call]
    return losses if reduction == "none" else losses.sum() * _scale(targets, shards, reduction)


@_disable_dynamo
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
                         group: dist.ProcessGroup | None = None, vocab_start: int | None = None,
                         vocab_size: int | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
                         z_loss: float = 0.0, softcap: float | None = None, reduction: Reduction = "mean",
                         impl: Impl = "auto", hidden_grad: HiddenGrad = "all") -> Tensor:
    """`ops.linear_cross_entropy(hidden, whole weight, targets, ...)` where this rank holds S rows of the weight.

    Args:
        hidden: (N, D), the same on every rank.
        weight: (S, D), this rank's classes, or a DTensor (V, D) in Shard(0), which brings its group with it.
        bias: (S,) or a DTensor (V,) in Shard(0), or None.
        hidden_grad: which rows of hidden's gradient a rank gets: all, or its own, for hidden states that were gathered
            (N / n rows of each rank, one rank after the other); the rest of it is zeros then.
        The others: as in `cross_entropy` and `ops.linear_cross_entropy`.

    Returns, Raises: as `cross_entropy`; ValueError also for rows that cannot be divided by the ranks.

    Gradients: hidden's is summed over the ranks (with "all", the same on each), weight's and bias's are a rank's own.

    On the wire: what `cross_entropy` sends, for each chunk of rows (its 16 bytes once), and if hidden's gradient is
    wanted, M * D numbers in hidden's type in one all-reduce, or with "own" in one all-to-all (a reduce-scatter on an
    accelerator), half of that. Gathering the logits would take N * V.

    Memory beyond results and gradients: one chunk of logits within the budget of `ops.linear_cross_entropy`; M * D
    numbers where some rows have no target, and with "own"; a float32 copy and sum for 16-bit weights.

    Saved for backward: the inputs, one float64 per row, with "mean" and "sum" also the finished gradients. With "none"
    the backward computes the logits again, but sends hidden's gradient only.
    """
    sharded = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    group, local, total = local_parts(group, 0, sharded, {"hidden": hidden, "targets": targets})
    options = (ignore_index, label_smoothing, z_loss, softcap)
    shards = agree(group, local, options, reduction, impl, vocab_start, total if vocab_size is None else vocab_size,
                   hidden_grad)
    if not torch.is_grad_enabled():  # or the gradients would be made for nobody
        local = {name: tensor.detach() for name, tensor in local.items()}
    targets = local["targets"].long()
    scale = None if reduction == "none" else _scale(targets, shards, reduction)
    loss: Tensor = _FromHidden.apply(  # type: ignore[no-untyped-call]
        local["hidden"], local["weight"], local.get("bias"), targets, scale, shards)
    return loss


def _scale(targets: Tensor, shards: Shards, reduction: str) -> Tensor:
    """What the sum of the losses is multiplied by."""
    one = torch.ones((), dtype=shards.wide, device=targets.device)
    return one / (targets != shards.terms.ignore_index).sum() if reduction == "mean" else one


class _FromLogits(torch.autograd.Function):
    """Losses (N,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, shards: Shards) -> Tensor:
        logits = logits if logits.stride(1) == 1 or logits.size(1) <= 1 else logits.contiguous()
        local = local_targets(targets, shards.start, shards.size, shards.terms.ignore_index)
        statistics = shard_statistics(shards.impl, logits, local, shards.terms)  # (3, N)
        rows = _rows_with_target(targets, shards)
        if rows is None:
            losses, lse = _whole_rows(statistics, targets, shards, fingerprint(targets))
        else:  # only theirs are sent
            found = _whole_rows(statistics[:, rows], targets[rows], shards, fingerprint(targets))
            losses, lse = (of.new_zeros(targets.shape).index_copy_(0, rows, of) for of in found)
        ctx.save_for_backward(logits, targets, lse)
        ctx.shards = shards
        return losses.to(shards.wide)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        (logits, targets, lse), shards = ctx.saved_tensors, ctx.shards
        local = local_targets(targets, shards.start, shards.size, shards.terms.ignore_index)
        return shard_gradient(shards.impl, logits, local, lse, grad_losses, shards.terms, shards.total), None, None


class _FromHidden(torch.autograd.Function):
    """scale * sum of the losses with the gradients made from the same logits; without scale the losses (N,) alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor | None,
                shards: Shards) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        factors = scale.expand(targets.shape) if scale is not None and any(needs) else None
        losses, lse, gradients = _chunked(hidden, weight, bias, targets, shards, needs, factors, None)
        ctx.save_for_backward(hidden, weight, bias, targets, scale, lse)
        ctx.shards, ctx.gradients = shards, gradients
        return losses if scale is None else losses.sum() * scale

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, scale, lse = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # handed out once: their receivers may write to them
        if gradients is None:  # "none", or a second backward over a retained graph
            factors = grad if scale is None else (grad * scale).expand(targets.shape)
            needs = ctx.needs_input_grad[:3]
            _, _, gradients = _chunked(hidden, weight, bias, targets, ctx.shards, needs, factors, lse)
        elif not on_host(grad.device) or float(grad) != 1.0:
            gradients = [None if gradient is None else gradient.mul_(grad) for gradient in gradients]
        return (*gradients, None, None, None)


def _chunked(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shards: Shards, needs: Any,
             factors: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor | None] | None]:
    """Losses (N,), whole rows' log-sum-exps (N,) and, given `factors` (N,), the gradients of sum(factors * losses).

    With `lse` known, the losses are left out and nothing is sent for them.
    """
    compute, wide, device = shards.compute, shards.wide, hidden.device
    rows = _rows_with_target(targets, shards)
    count = targets.numel() if rows is None else rows.numel()
    step = shards.rows_per_chunk(count, device)  # by the largest shard: every rank makes the same chunks
    multiplied = weight.to(compute)
    if multiplied.numel() and (1 not in multiplied.stride() or 0 in multiplied.stride()):
        multiplied = multiplied.contiguous()  # once, not in every product
    added = None if bias is None else bias.to(compute)
    workspace = _empty_matrix(shards, min(step, count), shards.size, compute, device)
    by: By = kernels_for(workspace.size(0), multiplied) if shards.impl == "cpp" else "torch"
    known, losses = lse, torch.zeros(targets.shape, dtype=wide, device=device)
    lse = torch.zeros(targets.shape, dtype=torch.float64, device=device) if known is None else known
    grad_hidden = torch.empty((count, hidden.size(1)), dtype=hidden.dtype, device=device) if needs[0] else None
    grad_weight = _empty_matrix(shards, shards.size, weight.size(1), wide, device) if needs[1] else None
    grad_bias = torch.zeros(shards.size, dtype=wide, device=device) if needs[2] else None
    with torch.autocast(device.type, enabled=False):
        for begin in range(0, count, step):
            at = slice(begin, min(begin + step, count)) if rows is None else rows[begin:begin + step]
            h, y = hidden[at].to(compute), targets[at]  # (m, D), (m,)
            z = workspace[:y.size(0)]  # (m, S): logits, then their gradient
            multiply_into(by, z, h, multiplied.t(), added)
            local = local_targets(y, shards.start, shards.size, shards.terms.ignore_index)
            if known is None:
                statistics = shard_statistics(shards.impl, z, local, shards.terms)
                found, lse[at] = _whole_rows(statistics, y, shards, fingerprint(targets) if begin == 0 else None)
                losses[at] = found.to(wide)
            if factors is None:
                continue
            shard_gradient(shards.impl, z, local, lse[at], factors[at], shards.terms, shards.total, in_place=True)
            if grad_hidden is not None:
                grad_hidden[begin:begin + step] = multiply(by, z, multiplied).to(hidden.dtype)
            if grad_weight is not None:
                add_transposed_product(by, grad_weight, z, h, first=begin == 0)
            if grad_bias is not None:
                grad_bias += z.sum(0, dtype=wide)
    if factors is None:
        return losses, lse, None
    if grad_weight is not None and count == 0:
        grad_weight.zero_()
    if grad_hidden is not None:
        summed = _own_rows if shards.hidden_grad == "own" else _summed_over_ranks
        grad_hidden = summed(grad_hidden, rows, targets.numel(), shards)
    return losses, lse, [grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype),
                         None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)]


def _empty_matrix(shards: Shards, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if shards.impl == "cpp":
        return torch.ops.fasttrain.empty_matrix(torch.empty(0, dtype=dtype), rows, columns)  # type: ignore[no-any-return]
    return torch.empty((rows, columns), dtype=dtype, device=device)


def _summed_over_ranks(partial: Tensor, rows: Tensor | None, num_rows: int, shards: Shards) -> Tensor:
    """The gradient of hidden (N, D) from this rank's part of its M rows."""
    if partial.numel():
        dist.all_reduce(partial, group=shards.group)
    if rows is None:
        return partial
    return partial.new_zeros((num_rows, partial.size(1))).index_copy_(0, rows, partial)


def _own_rows(partial: Tensor, rows: Tensor | None, num_rows: int, shards: Shards) -> Tensor:
    """The same, of which only this rank's n-th of the N rows is summed; the others are zeros."""
    each, rank = num_rows // shards.num_ranks, dist.get_rank(shards.group)
    counts = [each] * shards.num_ranks
    if rows is not None:
        counts = torch.bincount(rows // max(each, 1), minlength=shards.num_ranks).tolist()
    own = own_rows_of_sum(partial, counts, shards.group) if partial.numel() else partial
    begin = sum(counts[:rank])
    at = slice(begin, begin + counts[rank])
    grad = partial.zero_() if rows is None else partial.new_zeros((num_rows, partial.size(1)))
    grad[at if rows is None else rows[at]] = own
    return grad


def _rows_with_target(targets: Tensor, shards: Shards) -> Tensor | None:
    """Their indices, or None for all rows: on an accelerator they are not counted, and where every row has one."""
    if targets.device.type != "cpu":
        return None
    counted = targets != shards.terms.ignore_index
    return None if counted.all() else counted.nonzero().squeeze(1)


def _whole_rows(statistics: Tensor, targets: Tensor, shards: Shards, mark: Tensor | None) -> tuple[Tensor, Tensor]:
    """(losses, log-sum-exps), both (m,) float64, from this rank's `shard_statistics` (3, m) and the other ranks'.

    `mark`: a fingerprint of the targets, to be compared with the other ranks' on this occasion.
    """
    terms, size, look = shards.terms, targets.numel(), on_host(targets.device)
    pivot = None if look or 0.0 < terms.softcap <= _LARGEST_EXPONENT else _row_maxima(statistics[0], shards)
    columns = statistics[:3 if terms.label_smoothing else 2].flatten()
    packed = columns.clone() if mark is None else torch.cat((columns, mark))
    packed[:size] = torch.exp(statistics[0] if pivot is None else statistics[0] - pivot)
    dist.all_reduce(packed, group=shards.group)
    total, x_y = packed[:size], packed[size:2 * size]
    wrong = (targets != terms.ignore_index) & ((targets < 0) | (targets >= shards.total))
    if mark is not None:
        wrong = wrong | shards.mismatch(packed[-2:], mark)
    if look and not bool(((total > 1e-290) & (total < 1e290)).all()):  # the same on every rank, as the sums are
        pivot = _row_maxima(statistics[0], shards)
        total = torch.exp(statistics[0] - pivot)
        dist.all_reduce(total, group=shards.group)
    lse = torch.log(total) if pivot is None else torch.log(total) + pivot
    lse = torch.where(wrong, math.nan, lse)
    losses = (1 - terms.label_smoothing) * (lse - x_y).clamp(min=0)
    if terms.label_smoothing:
        losses += terms.label_smoothing * (lse - packed[2 * size:3 * size] / shards.total)
    if terms.z_loss:
        losses += terms.z_loss * lse.square()
    return torch.where(targets == terms.ignore_index, 0.0, losses), lse


def _row_maxima(lse: Tensor, shards: Shards) -> Tensor:
    """The largest of the shards' log-sum-exps of each row, which their sum of exponentials is taken against."""
    maxima = lse.clone()
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=shards.group)
    return maxima
