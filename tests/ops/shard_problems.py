"""Rows cut into shards in one process: what the tests of every implementation of `_shard_rows` share.

The truth is the reference cross-entropy of whole rows in float64; the error allowed is what it makes in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttrain.ops._shard_rows import local_targets, shard_gradient, shard_statistics
from fasttrain.ops.cross_entropy import Terms, cross_entropy_reference

TERMS = [
    Terms(-100, 0.0, 0.0, 0.0),
    Terms(-100, 0.2, 1e-3, 3.0),
    Terms(2, 1.0, 0.0, 0.0),
    Terms(-100, 0.0, 1e-2, 0.0),
]
CUTS: list[tuple[int, ...]] = [(1,), (1, 1), (3, 0, 4), (70, 33), (2050, 1, 2100)]
"""Sizes of the shards of a row."""


def problem(cut: tuple[int, ...], dtype: torch.dtype, terms: Terms, num_rows: int = 13) -> tuple[Tensor, Tensor]:
    """logits (N, V), targets (N,): on every shard, on their edges, and every fifth row without one."""
    classes = sum(cut)
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(num_rows, classes, generator=generator) * 4
    targets = torch.randint(0, classes, (num_rows,), generator=generator)
    edges = [edge for end in torch.tensor(cut).cumsum(0).tolist() for edge in (end - 1, end) if 0 <= edge < classes]
    targets[: len(edges)] = torch.tensor(edges)
    targets[4::5] = terms.ignore_index
    return logits.to(dtype), targets


def whole_gradient(logits: Tensor, targets: Tensor, scale: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Losses and the gradient by the logits, of the reference on whole rows."""
    leaf = logits.detach().requires_grad_()
    losses = cross_entropy_reference(leaf, targets, terms, "none")
    (gradient,) = torch.autograd.grad((losses * scale.to(losses.dtype)).sum(), leaf)
    return losses.detach(), gradient


def by_shards(impl: str, logits: Tensor, targets: Tensor, scale: Tensor, terms: Terms, cut: tuple[int, ...],
              in_place: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same from the shards of `cut`."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    parts: list[Any] = []
    start = 0
    for size in cut:
        part = logits[:, start : start + size].clone()
        parts.append((part, local_targets(targets, start, size, terms.ignore_index)))
        start += size
    statistics = torch.stack([shard_statistics(impl, part, local, terms) for part, local in parts])
    lse = torch.logsumexp(statistics[:, 0], 0)
    x_y, sums = statistics[:, 1].sum(0), statistics[:, 2].sum(0)
    smoothing = terms.label_smoothing
    losses = (1 - smoothing) * (lse - x_y) + smoothing * (lse - sums / start) + terms.z_loss * lse.square()
    losses = torch.where(targets == terms.ignore_index, 0.0, losses)
    gradients = []
    for part, local in parts:
        gradient = shard_gradient(impl, part, local, lse, scale.to(wide), terms, start, in_place=in_place)
        assert gradient.dtype == logits.dtype and (gradient is part) == in_place
        gradients.append(gradient)
    return losses, torch.cat(gradients, 1)


def assert_shards_give_whole_rows(impl: str, cut: tuple[int, ...], dtype: torch.dtype, terms: Terms,
                                  in_place: bool) -> None:  # fmt: skip
    logits, targets = problem(cut, dtype, terms)
    scale = torch.linspace(-1, 2, targets.numel())
    got = by_shards(impl, logits, targets, scale, terms, cut, in_place)
    plain = whole_gradient(logits, targets, scale, terms)
    truth = whole_gradient(logits.double(), targets, scale.double(), terms)
    for ours, theirs, exact, dtype_of in zip(got, plain, truth, (torch.float32, logits.dtype)):
        unit = torch.finfo(dtype_of).eps / 2 if logits.dtype != torch.float64 else 4e-15
        allowed = 4 * (theirs.double() - exact).abs().max() + 8 * unit * exact.abs().max() + 1e-7 * float(unit > 1e-14)
        error = (ours.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3g} against {allowed:.3g} allowed"
    assert not got[0][4::5].any() and not got[1][4::5].any()
