"""fsdp and its kin: every parameter, gradient and moment spread over ranks by PyTorch's fully_shard, by blocks.

The root that is sharded is not the model but a module that calls any function with it: whatever the function does (a
loss from the head's weight, an evaluation, a text), what lies outside of the blocks is there for as long as it runs.
A pass holds collective calls, so a rank whose memory runs out in one cannot leave it: it goes through the rest with one
sequence and throws the result away, until the window is over and all ranks do it again in smaller pieces.
Left out: gradients of whole models (replicas.py), and checkpoints (shards.py, shard_files.py).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batches import num_rows, split_rows
from .collectives import GATHER, SCATTER, scatter_sum
from .dealing import blank, is_blank
from .distributed import Team
from .losses import LossFunction, batch_loss
from .meta_init import is_on_meta
from .ops.adamw import AdamW, Shard, global_norm
from .optimizations import repeated_blocks
from .replicas import Spread, Whole, loss_of, share_weights, sum_losses
from .sharded_head import ShardedHead
from .shards import first_element, is_shard, local
from .state import TrainState
from .utils import is_out_of_memory, unwrap


class Shards(Whole):
    """fsdp, fsdp-vocab (whose head stays cut: sharded_head.py) and hsdp.

    Args:
        accumulated: micro-batches of a step; gradients are summed over ranks in the backward of the last.
        autocast: the context of a forward pass.
    """

    def __init__(self, team: Team, model: nn.Module, name: str, accumulated: int,
                 autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        from torch.distributed.fsdp import fully_shard  # takes a second, and one process does without

        self.name, self._team, self._accumulated, self._autocast = name, team, accumulated, autocast
        self._model = model
        inner = unwrap(model)
        if not is_on_meta(inner):
            share_weights(team, inner)
        mesh, self._groups = _mesh(team, name)
        blocks = repeated_blocks(inner)
        self._head = ShardedHead(team, model, mesh) if name == "fsdp-vocab" else None
        for block in blocks:
            fully_shard(block, mesh=mesh)
        kept = None if self._head is None else self._head.parameters
        self._root: Any = fully_shard(_Root(model), mesh=mesh, ignored_params=kept)
        sharded: list[Any] = [self._root, *blocks]
        self._sharded, self._journal = sharded, Journal()
        self._rejoins = name == "fsdp" and hasattr(self._root, "reset_iter_state")  # torch 2.13
        for module in sharded:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other sum
            module.set_custom_all_gather(_Gathering(team, self._journal))
            module.set_custom_reduce_scatter(_Scattering(team, self._journal))
        for block, following in itertools.pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
            following.set_modules_to_backward_prefetch([block])  # type: ignore[operator]
        self._summed = True
        self._gathered: list[Any] = []  # modules that were whole when the pass began
        self._most_targets: int | None = None
        self._state: TrainState | None = None

    def loss(self, inner: LossFunction, *, alone: bool = False) -> LossFunction:
        if self._head is not None and inner is not batch_loss:
            raise ValueError("parallel='fsdp-vocab' computes the next-token loss, and loss_fn is the user's own; use "
                             "parallel='fsdp', or leave loss_fn out")

        def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            window = None if self._state is None else self._state.window
            return self._passed(inner, batch, alone or window is None or window.is_last_pass(self._accumulated))

        self._inner = inner
        return loss

    def begin(self, state: TrainState) -> None:
        self._state = state

    @property
    def rejoin(self) -> Callable[[TrainState, Any, bool], None]:
        return self._rejoin

    def _rejoin(self, state: TrainState, batch: Any, failed: bool) -> None:
        """For a rank without memory: goes through a pass with one sequence of the batch, whose gradients are thrown
        away; after a failed pass, through the same again without the collective calls that it got to.

        Raises:
            OutOfMemoryError: no way back to the others is known (hsdp, fsdp-vocab, torch before 2.13), or one sequence
                is too much.
        """
        if not self._rejoins:
            raise torch.OutOfMemoryError(
                f"out of memory in step {state.step + 1}; under parallel={self.name!r} in torch {torch.__version__} "
                "the ranks cannot do a step again in smaller pieces (parallel='fsdp' with torch 2.13 can); use smaller "
                "batches, shorter sequences or activation_checkpointing='full'. The allocator: "
                f"{state.window.out_of_memory}")
        last, done, gathered = state.window.is_last_pass(self._accumulated), self._journal.done, list(self._gathered)
        if failed:
            self._forget()
            self._journal.leave_out = len(gathered)
            for module in gathered:
                module.unshard()
        one = split_rows(batch, num_rows(batch))[0]
        try:
            with self._autocast():
                loss_sum, _ = self._passed(self._inner, one if is_blank(one) else blank(one), last,
                                           leave_out=done if failed else 0)
            loss_sum.backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(
                f"out of memory in step {state.step + 1}, and one sequence at a time is still too much; use shorter "
                f"sequences or activation_checkpointing='full'. The allocator: {error}") from error

    def again(self, state: TrainState) -> bool:
        window = state.window
        most_targets, short = self._team.add([window.most_targets, float(bool(window.out_of_memory))])
        self._most_targets = int(most_targets)
        if short:
            self._forget()
        return bool(short)

    def _forget(self) -> None:
        """Drops what passes have left in PyTorch's engine: gathered parameters, gradients that were not summed."""
        self._root.reset_iter_state()
        for module in self._sharded:
            for group in _groups_of(module):
                for part in group.fsdp_params:
                    part.unsharded_accumulated_grad = None
                    if hasattr(part, "_unsharded_param"):
                        part._unsharded_param.grad = None

    def reduce(self, state: TrainState) -> None:
        if not self._summed:  # the data ended inside the window: a pass that adds nothing carries the sums
            with self._autocast():
                loss_sum, _ = self._passed(self._inner, blank(state.window.drawn[-1].batch), True)
            loss_sum.backward()  # type: ignore[no-untyped-call]
        known, self._most_targets = self._most_targets, None
        sum_losses(self._team, state.window,
                   int(self._team.add([state.window.most_targets])[0]) if known is None else known)

    def norm(self, grads: list[Tensor]) -> Tensor:
        return self.norm_of_all(global_norm([local(grad) for grad in grads]))

    def norm_of_all(self, norm: Tensor) -> Tensor:
        """() float32: the norm of the whole gradient from that of this rank's rows."""
        squares = norm.double().square()
        for group in self._groups:
            self._team.sum_within(squares, group)
        return squares.sqrt().to(norm.dtype)

    def within(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            with contextlib.nullcontext() if self._head is None else self._head.whole():
                return self._root(lambda _: function(*args, **kwargs))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Of another kind, or an evaluation would try again in pieces and leave the other ranks behind.
            raise RuntimeError(f"memory ran out in {getattr(function, '__name__', 'a function')} under "
                               f"parallel={self.name!r}, where the ranks wait for each other and none can divide its "
                               "batch by itself; use smaller batches or shorter sequences there") from error
        finally:
            self._root.reshard()  # no backward will

    def _passed(self, inner: LossFunction, batch: Any, last: bool, leave_out: int = 0) -> tuple[Tensor, Tensor]:
        root = self._root
        self._gathered = [] if not self._rejoins else [
            module for module in self._sharded if any(group.is_unsharded for group in _groups_of(module))]
        self._journal.done, self._journal.leave_out = 0, leave_out
        root.set_requires_gradient_sync(last)
        root.set_reshard_after_backward(last)  # inner micro-batches keep the parameters gathered
        root.set_is_last_backward(last)
        self._summed = last
        head = self._head
        sums: tuple[Tensor, Tensor] = root(
            lambda model: loss_of(inner, model, batch) if head is None else head.loss(model, batch))
        return sums


def _groups_of(module: Any) -> list[Any]:
    """What PyTorch's engine knows of the parameters of a sharded module."""
    return list(module._get_fsdp_state()._fsdp_param_groups)


class Journal:
    """How far a pass is in its collective calls."""

    def __init__(self) -> None:
        self.done = 0
        """Calls that this pass has made."""
        self.leave_out = 0
        """So many of the next calls are not made: the others have them behind them. Their results are zeros."""

    def skips(self) -> bool:
        """Whether the call that comes now is one of them."""
        left_out = self.leave_out > 0
        self.leave_out -= left_out
        return left_out


class _Gathering:
    """PyTorch's all-gather of a block's parameters: counted, and a rank that does not come is named."""

    def __init__(self, team: Team, journal: Journal) -> None:
        self._team, self._journal = team, journal

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _allocated(size, dtype, device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        if self._journal.skips():
            output_tensor.zero_()
            return None
        self._team.bytes += output_tensor.nbytes
        with self._team.calling("gathering parameters"):
            work = GATHER(output_tensor, input_tensor, group=group, async_op=async_op)
        self._journal.done += 1
        return work


class _Scattering:
    """The same for the sum of a block's gradients, of which each rank gets its rows."""

    def __init__(self, team: Team, journal: Journal) -> None:
        self._team, self._journal = team, journal

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _allocated(size, dtype, device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any,
                 async_op: bool = False) -> Any:
        if self._journal.skips():
            output_tensor.zero_()
            return None
        self._team.bytes += input_tensor.nbytes
        work = None
        with self._team.calling("summing gradients"):
            if input_tensor.is_cpu and op == dist.ReduceOp.SUM:
                scatter_sum(output_tensor, input_tensor, group)
            else:
                work = SCATTER(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        self._journal.done += 1
        return work


def _allocated(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(*size, dtype=dtype, device=device)


class _Root(nn.Module):
    """What fully_shard takes for the root: parameters outside of the blocks are gathered for as long as `function`
    runs, so it may use them in any way (a loss from the head's weight)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.model)


def prepare_optimizer(optimizer: Any, spread: Spread) -> None:
    """Tells our AdamW which part of each parameter it updates, so that rounding, compression and the norm are those of
    the whole."""
    if not isinstance(spread, Shards) or not isinstance(optimizer, AdamW):
        return
    optimizer.norm_of_all = spread.norm_of_all
    for group in optimizer.param_groups:
        for p in group["params"]:
            if is_shard(p):
                rows = p.size(0) if p.dim() else 1
                per_rank = -(-rows // p.device_mesh.size(-1)) * math.prod(p.shape[1:])
                optimizer.shards[p] = Shard(first_element(p), p.numel(), per_rank % 256 == 0)


def _mesh(team: Team, name: str) -> tuple[Any, list[Any]]:
    """(the device mesh, the groups over which the parts of one whole are spread)."""
    from torch.distributed.device_mesh import init_device_mesh

    if name != "hsdp":
        mesh = init_device_mesh(team.device.type, (team.world_size,))
        return mesh, [mesh.get_group()]
    size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if team.world_size % size or size == 1:
        raise ValueError(f"parallel='hsdp' shards within a machine, and torchrun says LOCAL_WORLD_SIZE={size} of "
                         f"{team.world_size}; it must divide it and be over 1: use parallel='fsdp'")
    mesh = init_device_mesh(team.device.type, (team.world_size // size, size), mesh_dim_names=("copies", "parts"))
    return mesh, [mesh["parts"].get_group()]
