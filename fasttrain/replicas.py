"""What a training step needs of several processes, and ddp: the same model on every rank, its gradients summed once.

Gradients are those of *summed* losses, added over ranks and never averaged: a step divides once by the number of
targets of all ranks, so N ranks compute what one does in N micro-batches. DDP's wrapper is not used: it divides by the
number of ranks, has to know the last micro-batch before its backward, and fails where a rank has no batch or a
parameter no gradient. Left out: parameters that are spread (sharding.py), and the choice (parallel.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .dealing import BLANK, is_blank
from .distributed import Team
from .losses import LossFunction
from .ops.adamw import global_norm
from .state import TrainState, Window
from .utils import unwrap

BUCKET_BYTES = 32 * 2**20
"""Gradients are summed in pieces of about this size: large enough for the network's full rate."""

_ALIGNMENT = 64  # elements: every gradient begins on a cache line of its bucket


class Spread(Protocol):
    """What differs between one process and several."""

    name: str
    """none, ddp, fsdp or hsdp."""

    def loss(self, inner: LossFunction, *, alone: bool = False) -> LossFunction:
        """The loss of a micro-batch; `alone`: outside of a step, for a trial."""

    def begin(self, state: TrainState) -> None:
        """From now on steps are those of `state`, whose window says which micro-batch is a step's last."""

    def reduce(self, state: TrainState) -> None:
        """Makes the window's loss, targets and gradients those of all ranks, before the update."""

    def norm(self, grads: list[Tensor]) -> Tensor:
        """() float32: the 2-norm of the whole gradient."""

    def within(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs), called where the model's parameters can be read; every rank calls it."""


class Whole:
    """One process with one model: every function is the plain one."""

    name = "none"

    def loss(self, inner: LossFunction, *, alone: bool = False) -> LossFunction:
        return inner

    def begin(self, state: TrainState) -> None:
        """Nothing depends on it."""

    def reduce(self, state: TrainState) -> None:
        """Nobody else has a part."""

    def norm(self, grads: list[Tensor]) -> Tensor:
        return global_norm(grads)

    def within(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Replicas(Whole):
    """ddp: the same model on every rank, from rank 0's weights."""

    name = "ddp"

    def __init__(self, team: Team, model: nn.Module) -> None:
        self._team = team
        share_weights(team, model)

    def loss(self, inner: LossFunction, *, alone: bool = False) -> LossFunction:
        return lambda model, batch: loss_of(inner, model, batch)

    def reduce(self, state: TrainState) -> None:
        parameters = [p for p in unwrap(state.model).parameters() if p.requires_grad]
        sum_window(self._team, state.window)
        counts = self._team.add([float(p.grad is not None) for p in parameters])
        used = [p for p, count in zip(parameters, counts) if count]
        for p in used:
            if p.grad is None:  # another rank's batch reached it, ours did not
                p.grad = torch.zeros_like(p)
            if p.grad.is_sparse:
                raise ValueError("a parameter has a sparse gradient; use dense ones (Embedding(sparse=False))")
        sum_gradients(self._team, used)


def sum_gradients(team: Team, parameters: Sequence[Tensor]) -> None:
    """Every `.grad` becomes its sum over all ranks; afterwards those of a bucket are views of one tensor."""
    buckets: list[list[Tensor]] = []
    kind, room = None, 0
    for p in parameters:
        grad = p.grad
        assert grad is not None
        if grad.dtype != kind or grad.nbytes > room:
            kind, room = grad.dtype, BUCKET_BYTES
            buckets.append([])
        buckets[-1].append(p)
        room -= grad.nbytes
    flats = [_flattened(bucket) for bucket in buckets]
    team.sum_tensors(flats, "summing gradients")


def _flattened(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of which the parameters' gradients are views from now on; a single one that is contiguous is taken as
    it is."""
    grads: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
    if len(grads) == 1 and grads[0].is_contiguous():
        return grads[0]
    sizes = [-(-grad.numel() // _ALIGNMENT) * _ALIGNMENT for grad in grads]
    flat, start = grads[0].new_zeros(sum(sizes)), 0
    for p, grad, size in zip(parameters, grads, sizes):
        view = flat[start:start + grad.numel()].view(grad.shape)
        view.copy_(grad)
        p.grad, start = view, start + size
    return flat


def share_weights(team: Team, model: nn.Module) -> None:
    """Every rank gets rank 0's parameters and buffers: they may have been drawn from other seeds."""
    team.copy_tensors([tensor.detach() for tensor in (*model.parameters(), *model.buffers())])


def loss_of(inner: LossFunction, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    if not is_blank(batch):
        return inner(model, batch)
    loss_sum, num_targets = inner(model, batch[BLANK])
    return loss_sum * 0.0, num_targets * 0


def sum_window(team: Team, window: Window) -> None:
    """Loss and targets over all ranks, without a wait for the device; and how many targets there can be at most."""
    loss_sum, num_targets = window.loss_sum, window.num_targets
    assert loss_sum is not None and num_targets is not None
    sums = torch.stack([loss_sum.double(), num_targets.double()])
    team.sum_tensors([sums], "summing losses")
    window.loss_sum, window.num_targets = sums[0].to(loss_sum.dtype), sums[1].to(num_targets.dtype)
    window.most_targets = int(team.add([window.most_targets])[0])
