"""The sum of a model's gradients over ranks, on its way while the backward still runs.

Gradients lie in buckets in the order in which they arrive, and every rank sends the same buckets in the same order.
*When* is each rank's own affair: in a hook of the last backward, as soon as a bucket's gradients are there, or after
it. So a rank whose batch leaves parameters out, or whose memory runs out and that does its window again, does the same
as the others, only later; what it has sent is final, for it holds all that the window adds there.
The calls are PyTorch's (post-accumulate hooks, asynchronous all-reduces). Left out: which backward is the last
(replicas.py), and parameters that are spread (sharding.py). A model compiled as a whole has its gradients at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distributed import Team

LARGEST_BUCKET = 25 * 2**20
"""Bytes of a bucket, about: enough for the network's full rate. A small model's is an eighth of its gradients, so that
there is something to send before the end."""
SMALLEST_BUCKET = 2**20

_ALIGNMENT = 64  # elements: every gradient begins on a cache line of its bucket
_PLACE = "summing gradients"


@dataclass
class Bucket:
    """Parameters whose gradients travel as one tensor, and its journey in this step."""

    parameters: list[Tensor]
    missing: int = 0
    """Gradients that the watched backward has yet to bring."""
    views: Sequence[Tensor] = ()
    """Of the sum, one for each parameter; empty until it is sent."""
    used: Sequence[bool] = ()
    """Which of them had a gradient on this rank when it was sent."""
    work: Any = None


class GradientBuckets:
    """The buckets of one model on one rank. A step calls `watch`, `used`, `send_rest` and `receive`, in this order.

    Args:
        parameters: the model's; those that require a gradient take part, and which do may change between steps.
        overlap: send during the backward. False: all of it afterwards, to the same sums.
    """

    def __init__(self, team: Team, parameters: Iterable[Tensor], overlap: bool = True) -> None:
        self._team, self._every, self._overlap = team, list(parameters), overlap
        self._trainable: list[Tensor] = []
        self._hooked: set[Tensor] = set()
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[Tensor, Bucket] = {}
        self._arrived: dict[Tensor, None] = {}  # in their order
        self._sent = 0
        self._attempt = 0
        self._watching = False

    def unwatch(self) -> None:
        """Gradients from now on are not the window's last."""
        self._watching = False

    def watch(self, attempt: int) -> None:
        """The backward that follows is the window's last: what it completes may be sent. `attempt`: another number for
        each time that the same window is computed.

        Raises:
            RuntimeError: an earlier step failed after some of its gradients were sent.
        """
        if self._sent and attempt == self._attempt:
            raise RuntimeError("an earlier step failed on this rank after some of its gradients had been sent, so the "
                               "ranks no longer fit together; start the processes again to continue from the newest "
                               "checkpoint")
        self._note_trainable()
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._attempt, self._arrived, self._watching = attempt, {}, True

    def used(self) -> list[float]:
        """1.0 for each trainable parameter that has a gradient on this rank, else 0.0; in the model's order.

        Raises:
            ValueError: a sparse gradient.
        """
        self._watching = False
        self._note_trainable()
        if any(p.grad is not None and p.grad.is_sparse for p in self._trainable):
            raise ValueError("a parameter has a sparse gradient; use dense ones (Embedding(sparse=False))")
        sent = {p: used for bucket in self._buckets[:self._sent] for p, used in zip(bucket.parameters, bucket.used)}
        return [float(sent.get(p, p.grad is not None)) for p in self._trainable]

    def send_rest(self, counts: Sequence[float]) -> None:
        """Sends what the hooks have not. `counts`: of `used`, the sums over all ranks; what nobody used is not sent."""
        if not self._buckets:
            self._lay_out(counts)
        count_of = dict(zip(self._trainable, counts))
        for bucket in self._buckets[self._sent:]:
            if any(count_of[p] for p in bucket.parameters):
                self._send(bucket)
            self._sent += 1

    def receive(self, counts: Sequence[float]) -> None:
        """Every `.grad` becomes its sum over all ranks; it stays None where no rank had one."""
        count_of = dict(zip(self._trainable, counts))
        for bucket in self._buckets:
            if bucket.work is not None:
                self._team.finish(bucket.work, _PLACE)
            for p, view in zip(bucket.parameters, bucket.views):
                p.grad = view if count_of[p] else None
            bucket.views, bucket.used, bucket.work = (), (), None
        self._sent = 0

    def _note_trainable(self) -> None:
        trainable = [p for p in self._every if p.requires_grad]
        if list(map(id, trainable)) == list(map(id, self._trainable)):
            return
        self._trainable, self._buckets, self._bucket_of = trainable, [], {}
        for p in trainable:
            if p not in self._hooked:
                self._hooked.add(p)
                p.register_post_accumulate_grad_hook(self._arrive)  # type: ignore[no-untyped-call]

    def _arrive(self, p: Tensor) -> None:
        """The hook: this backward has added to p.grad."""
        if not self._watching:
            return
        bucket = self._bucket_of.get(p)
        if p in self._arrived:  # reentrant checkpoints: a gradient may come in parts, so none is known to be whole
            if bucket is not None and bucket.views:
                raise RuntimeError(f"a parameter of shape {tuple(p.shape)} got another gradient in this backward after "
                                   "the first had been sent; use activation checkpointing with use_reentrant=False")
            self._overlap = False
            return
        self._arrived[p] = None
        if bucket is None or p.grad is None or p.grad.is_sparse:
            return
        bucket.missing -= 1
        while self._overlap and self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._send(self._buckets[self._sent])
            self._sent += 1

    def _send(self, bucket: Bucket) -> None:
        used = [p.grad is not None for p in bucket.parameters]
        flat, views = _flattened(bucket.parameters)
        bucket.work = self._team.start_sum(flat, _PLACE)
        bucket.views, bucket.used = views, used
        for p in bucket.parameters:
            p.grad = None  # what the sum is made of; on the way nobody may add to it

    def _lay_out(self, counts: Sequence[float]) -> None:
        """Buckets in the order in which the first step's gradients came on rank 0; what was not used comes last."""
        place = {p: index for index, p in enumerate(self._trainable)}
        first = self._team.share(torch.tensor([place[p] for p in self._arrived], dtype=torch.int64)).tolist()
        rest = set(place.values()) - set(first)
        order = [*first, *sorted(rest, key=lambda index: (not counts[index], -index))]
        total = sum(p.nbytes for p in self._trainable)
        limit = min(max(total // 8, SMALLEST_BUCKET), LARGEST_BUCKET)
        kind: Any = None
        room = 0
        for index in order:
            p = self._trainable[index]
            its_kind = p.dtype, p.device, bool(counts[index])
            if its_kind != kind or p.nbytes > room:
                kind, room = its_kind, limit
                self._buckets.append(Bucket([]))
            self._buckets[-1].parameters.append(p)
            room -= p.nbytes
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}


def _flattened(parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(one tensor with all gradients, zeros where there is none; its view for each). A single gradient that is
    contiguous is taken as it is."""
    grads = [p.grad for p in parameters]
    if len(grads) == 1 and grads[0] is not None and grads[0].is_contiguous():
        return grads[0].view(-1), [grads[0]]
    unit = 1 if len(grads) == 1 else _ALIGNMENT
    sizes = [-(-p.numel() // unit) * unit for p in parameters]
    flat = parameters[0].detach().new_empty(sum(sizes))
    parts = flat.split(sizes)  # type: ignore[no-untyped-call]
    views = [part[:p.numel()].view(p.shape) for p, part in zip(parameters, parts)]
    filled = [(view, grad) for view, grad in zip(views, grads) if grad is not None]
    if filled:
        torch._foreach_copy_([view for view, _ in filled], [grad for _, grad in filled])
    for p, part, grad in zip(parameters, parts, grads):
        part[p.numel() if grad is not None else 0:].zero_()
    return flat, views
