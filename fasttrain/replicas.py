"""What a training step needs of several processes, and ddp: the same model on every rank, its gradients summed once.

Gradients are those of *summed* losses, added over ranks and never averaged: a step divides once by the number of
targets of all ranks, so N ranks compute what one does in N micro-batches. They travel during the last micro-batch's
backward (gradient_buckets.py). DDP's wrapper is not used: it divides by the number of ranks, takes the head whose
weight goes into the loss for unused, and cannot do a backward again that ran out of memory half-way.
Left out: parameters that are spread (sharding.py), and the choice (parallel.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .dealing import BLANK, is_blank
from .distributed import Team
from .gradient_buckets import GradientBuckets
from .losses import LossFunction
from .ops.adamw import global_norm
from .state import TrainState, Window
from .utils import unwrap


class Spread(Protocol):
    """What differs between one process and several."""

    name: str
    """none, ddp, fsdp, fsdp-vocab or hsdp."""

    def loss(self, inner: LossFunction, *, alone: bool = False) -> LossFunction:
        """The loss of a micro-batch; `alone`: outside of a step, for a trial."""

    def begin(self, state: TrainState) -> None:
        """From now on steps are those of `state`, whose window says which micro-batch is a step's last."""

    @property
    def rejoin(self) -> Callable[[TrainState, Any, bool], None] | None:
        """As in training_loop.Parts."""

    def again(self, state: TrainState) -> bool:
        """As in training_loop.Parts; called before `reduce`, on all ranks."""

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

    @property
    def rejoin(self) -> Callable[[TrainState, Any, bool], None] | None:
        """A rank does its window again by itself."""
        return None

    def again(self, state: TrainState) -> bool:
        """No other rank has to."""
        return False

    def reduce(self, state: TrainState) -> None:
        """Nobody else has a part."""

    def norm(self, grads: list[Tensor]) -> Tensor:
        return global_norm(grads)

    def within(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Replicas(Whole):
    """ddp: the same model on every rank, from rank 0's weights.

    Args:
        accumulated: micro-batches of a step; gradients are sent in the backward of the last.
        overlap: False: sent after it.
    """

    name = "ddp"

    def __init__(self, team: Team, model: nn.Module, accumulated: int, overlap: bool = True) -> None:
        self._team, self._accumulated = team, accumulated
        share_weights(team, model)
        self._buckets = GradientBuckets(team, unwrap(model).parameters(), overlap)
        self._state: TrainState | None = None

    def loss(self, inner: LossFunction, *, alone: bool = False) -> LossFunction:
        def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            self._buckets.unwatch()
            sums, state = loss_of(inner, model, batch), self._state
            if not alone and state is not None and state.window.is_last_pass(self._accumulated):
                self._buckets.watch(state.counters.num_pieces)
            return sums

        return loss

    def begin(self, state: TrainState) -> None:
        self._state = state

    def reduce(self, state: TrainState) -> None:
        window, buckets = state.window, self._buckets
        most_targets, *counts = self._team.add([window.most_targets, *buckets.used()])
        buckets.send_rest(counts)
        sum_losses(self._team, window, int(most_targets))
        buckets.receive(counts)


def share_weights(team: Team, model: nn.Module) -> None:
    """Every rank gets rank 0's parameters and buffers: they may have been drawn from other seeds."""
    team.copy_tensors([tensor.detach() for tensor in (*model.parameters(), *model.buffers())])


def loss_of(inner: LossFunction, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    if not is_blank(batch):
        return inner(model, batch)
    loss_sum, num_targets = inner(model, batch[BLANK])
    return loss_sum * 0.0, num_targets * 0


def sum_losses(team: Team, window: Window, most_targets: int) -> None:
    """Loss and targets over all ranks, without a wait for the device. `most_targets`: the ranks' upper bounds' sum."""
    loss_sum, num_targets = window.loss_sum, window.num_targets
    assert loss_sum is not None and num_targets is not None
    sums = torch.stack([loss_sum.double(), num_targets.double()])
    team.sum_tensors([sums], "summing losses")
    window.loss_sum, window.num_targets = sums[0].to(loss_sum.dtype), sums[1].to(num_targets.dtype)
    window.most_targets = most_targets
