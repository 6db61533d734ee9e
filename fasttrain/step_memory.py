"""What a micro-batch allocates, found by running the real model on fake tensors: shapes alone, no memory, no GPU.

Every storage that forward and backward create is counted from its birth to its death, as Python's and autograd's own
references decide it, so recomputation, views, casts by autocast and the fused loss are what they are in the real model
and no formula has to know them. Parameters exist before and are not counted, nor are the gradients that an earlier
micro-batch has made; those that this one makes are there when they are made, which is after the activations' peak. What
the fused loss takes inside itself no trace can see: the caller says it. Left out: other kernels' own memory, and
fragmentation.

Legend: B sequences, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .ops import linear_cross_entropy
from .optimizations import _activation_checkpointing, repeated_blocks
from .sharded_memory import OUTSIDE, Event, Moment


class StepMemory(NamedTuple):
    """Bytes of one forward and backward."""

    held: int
    """Alive at the end of the forward: activations, logits if any, autocast's copies of weights."""
    casts: int
    """Of these, autocast's copies of weights."""
    peak: int
    """Most alive at any moment of forward and backward, less what the gradients take at the end."""
    kept: int
    """Alive after the backward beside the gradients; 0 unless something leaks."""


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that are created while it is active, by weak references to them."""

    def __init__(self, known: set[int], weights: set[int], workspace: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.moments: list[Moment] = []
        """From each event that was noted to the next."""
        self._known, self._weights, self._workspace = known, weights, workspace
        self._alive: dict[int, tuple[int, bool]] = {}

    @property
    def casts(self) -> int:
        """Bytes now alive that are copies of a weight in another type."""
        return sum(size for size, cast in self._alive.values() if cast)

    def note(self, event: Event, unit: int) -> None:
        """A moment begins."""
        self.moments.append(Moment(event, unit, self.live, self.live))

    def _look(self, beside: int = 0) -> None:
        self.peak = max(self.peak, self.live + beside)
        if self.moments and self.live + beside > self.moments[-1].most:
            self.moments[-1] = self.moments[-1]._replace(most=self.live + beside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), cast)
        if "linear_cross_entropy" in func.name():
            self._look(self._workspace)
        return result

    def _see(self, storage: Any, cast: bool) -> None:
        key = storage._cdata
        if key in self._alive or key in self._known:
            return
        self._alive[key] = storage.nbytes(), cast
        self.live += storage.nbytes()
        self._look()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._alive.pop(key)[0]


def trace_step(build: Callable[[], nn.Module], batch_size: int, seq_len: int, *, recompute: str = "none",
               autocast: torch.dtype | None = None, fused_loss: bool = True, workspace: int = 0,
               first: bool = False, fake: bool = True) -> StepMemory:
    """Runs one micro-batch of `build()`, a causal language model, and counts.

    Args:
        recompute: `activation_checkpointing` of TrainConfig.
        autocast: type of the products, or None for the weights' own.
        fused_loss: from hidden states, without logits; else through (B * T, V) logits and PyTorch's cross-entropy.
        workspace: bytes that the fused loss allocates inside itself, beside all that is alive then.
        first: the gradients are this micro-batch's to make; False: they exist, and it adds to them.
        fake: on fake tensors; False runs it for real, on the CPU.
    """
    with _fake_tensors() if fake else contextlib.nullcontext():
        model = _recomputing(build(), recompute)
        for parameter in model.parameters():
            parameter.grad = None if first else torch.zeros_like(parameter)
        ids = torch.zeros((batch_size, seq_len), dtype=torch.int64)
        with _counting(model, ids, workspace) as counted:
            loss = _forward(model, ids, autocast, fused_loss)
            held, casts = counted.live, counted.casts
            with _upstream_of_one():
                loss.backward()  # type: ignore[no-untyped-call]
            del loss
        made = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None) if first else 0
        return StepMemory(held, casts, counted.peak - made, counted.live - made)


def trace_moments(build: Callable[[], nn.Module], batch_size: int, seq_len: int, *, recompute: str = "none",
                  autocast: torch.dtype | None = None, fused_loss: bool = True, workspace: int = 0,
                  micro_batches: int = 1, head_ranks: int = 1) -> list[Moment]:
    """Runs a step of `build()` as fully_shard runs it by blocks, and counts from each of its events to the next.

    Args:
        micro_batches: of the step; the gradients are whole until the last one's backward has summed and dropped them.
        head_ranks: fsdp-vocab: so many ranks score the tokens of all of them, each against its part of the classes.
        The others: as in `trace_step`.
    """
    with _fake_tensors():
        model = _recomputing(build(), recompute)
        outside = {id(p): p for p in model.parameters()}
        if head_ranks > 1:
            head = model.get_output_embeddings()  # type: ignore[operator]
            for parameter in head.parameters(recurse=False):
                del outside[id(parameter)]
            size, width = head.weight.shape
            head.weight = nn.Parameter(head.weight.new_empty((-(-size // head_ranks), width)))
        blocks = repeated_blocks(model)
        for parameter in (p for block in blocks for p in block.parameters()):
            outside.pop(id(parameter), None)
        ids = torch.zeros((batch_size, seq_len), dtype=torch.int64)
        with _counting(model, ids, workspace) as counted:
            left = micro_batches
            for unit, block in enumerate(blocks):
                _follow(block, unit, counted, lambda: left == 1)
            for left in range(micro_batches, 0, -1):
                counted.note("forward", OUTSIDE)
                loss = _forward(model, ids, autocast, fused_loss, head_ranks)
                counted.note("scored", OUTSIDE)
                with _upstream_of_one():
                    loss.backward()  # type: ignore[no-untyped-call]
                if left > 1:
                    counted.note("added", OUTSIDE)
                else:
                    _sum(outside.values(), OUTSIDE, counted)
                del loss
        moments: list[Moment] = counted.moments
        return moments


def _follow(block: nn.Module, unit: int, counted: Allocations, is_last: Callable[[], bool]) -> None:
    """Notes the block's events, and drops its gradients as their sum over ranks does."""

    def ended(_: Tensor) -> None:
        if is_last():
            _sum(block.parameters(), unit, counted)
        else:
            counted.note("added", unit)

    def begins(_: nn.Module, args: Any, kwargs: Any) -> None:
        counted.note("forward", unit)
        stream: Any = _differentiable((args, kwargs))
        stream.register_hook(ended)  # before its node's own hook, which is another block's

    def ends(_: nn.Module, args: Any, output: Any) -> None:
        counted.note("forwarded", unit)
        node: Any = _differentiable(output).grad_fn
        node.register_prehook(lambda grads: counted.note("backward", unit))

    block.register_forward_pre_hook(begins, with_kwargs=True)
    block.register_forward_hook(ends)


def _differentiable(tree: Any) -> Tensor:
    """The first tensor with a gradient: a block's stream of hidden states."""
    return next(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad)


def _sum(parameters: Iterable[nn.Parameter], unit: int, counted: Allocations) -> None:
    counted.note("summing", unit)
    for parameter in parameters:
        parameter.grad = None
    counted.note("summed", unit)


def _fake_tensors() -> contextlib.AbstractContextManager[Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second of imports that only this needs

    return FakeTensorMode()


def _recomputing(model: nn.Module, recompute: str) -> nn.Module:
    if recompute != "none":
        _activation_checkpointing(model, recompute)
    return model


def _counting(model: nn.Module, ids: Tensor, workspace: int) -> Allocations:
    """Of all but what is there before: weights, gradients and ids."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    known = {tensor.untyped_storage()._cdata for tensor in (ids, *(p.grad for p in model.parameters()))
             if tensor is not None}
    return Allocations(known | weights, weights, workspace)


def _forward(model: nn.Module, ids: Tensor, autocast: torch.dtype | None, fused_loss: bool,
             head_ranks: int = 1) -> Tensor:
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        return _loss(model, ids, fused_loss, head_ranks)


@contextlib.contextmanager
def _upstream_of_one() -> Iterator[None]:
    """The fused loss looks whether its upstream gradient is 1, as it is here; a fake tensor has no number to read."""
    module = sys.modules[linear_cross_entropy.__module__]
    read = module.read_scalar
    module.read_scalar = lambda value: 1.0  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.read_scalar = read  # type: ignore[attr-defined]


def _loss(model: nn.Module, ids: Tensor, fused: bool, head_ranks: int = 1) -> Tensor:
    """The sum of the next-token losses, as `losses.batch_loss` computes it (with `head_ranks`, as
    `sharded_head.ShardedHead.loss` does); labels are the ids themselves."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    hidden = _hidden(model, ids).flatten(0, 1)  # (B * T, D)
    if head_ranks > 1:
        hidden = _Gathered.apply(F.pad(hidden, (0, 0, 0, 0)), head_ranks)  # type: ignore[no-untyped-call]
        return linear_cross_entropy(hidden, head.weight, ids.flatten().repeat(head_ranks), reduction="sum")
    if fused:
        return linear_cross_entropy(hidden, head.weight, ids.flatten(), reduction="sum")
    logits = F.linear(hidden, head.weight)
    return F.cross_entropy(logits.float(), ids.flatten(), reduction="sum")


class _Gathered(torch.autograd.Function):
    """(N, D) -> (n N, D), with nothing sent."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, num_ranks: int) -> Tensor:
        ctx.num_ranks = num_ranks
        return mine.new_zeros((num_ranks * mine.size(0), mine.size(1)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].chunk(ctx.num_ranks)[0], None


def _hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T, D): of our GPT by return_hidden, of a Hugging Face model by its base_model."""
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        return base(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
    return model(ids, return_hidden=True)  # type: ignore[no-any-return]
