"""One update from a window's gradient sums: the division by the number of targets, the verdict, clipping, the step.

With our AdamW nothing waits for the device: the verdict is a tensor that the step obeys. Any other optimizer of torch's
gets the same step for one wait. Left out: when there is one (training_loop.py), and what is booked about it (settle).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .ops.adamw import AdamW
from .state import Pending, TrainState
from .utils import on_host, read_scalar


def apply_update(state: TrainState, max_grad_norm: float, norm_of: Callable[[list[Tensor]], Tensor]) -> None:
    """Turns the window's gradient sums into one update, unless loss or gradient are not finite.

    Args:
        max_grad_norm: the global norm is clipped to this; 0: not (our AdamW has its own).
        norm_of: the 2-norm of all gradients, for optimizers that do not compute it themselves.

    Raises:
        ValueError: no parameter of the optimizer has a gradient, or one has a sparse gradient.
    """
    window, optimizer = state.window, state.optimizer
    assert window.loss_sum is not None and window.num_targets is not None
    per_target, refused = _judge(window.loss_sum, window.num_targets)
    if isinstance(optimizer, AdamW) and state.scaler is None:
        optimizer.step(grad_scale=per_target, found_inf=refused)
        norm, skipped = optimizer.grad_norm, optimizer.last_found_inf
    else:
        norm, skipped = _update_with_foreign_optimizer(state, max_grad_norm, norm_of, per_target, refused)
    optimizer.zero_grad(set_to_none=True)
    if norm is None or skipped is None:
        raise ValueError("no parameter that the optimizer holds received a gradient; check that the loss depends on "
                         "the model's trainable parameters and that the optimizer was given them")
    state.pending = Pending.of(window.loss_sum, window.num_targets, norm, skipped, most_targets=window.most_targets,
                               drawn=window.drawn)
    window.clear()
    state.counters.step += 1


def _judge(loss_sum: Tensor, num_targets: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(1 / number of targets, not 0 if the loss alone forbids an update), without waiting for the device.

    A window without a target has nothing to say either: a zero gradient would still decay weights and moments.
    """
    if on_host(loss_sum.device):
        loss, count = read_scalar(loss_sum), read_scalar(num_targets)
        return 1.0 / max(1.0, count), float(not math.isfinite(loss) or count == 0)
    refused = (~torch.isfinite(loss_sum)) | (num_targets == 0)
    return num_targets.clamp(min=1).to(torch.float32).reciprocal(), refused.to(torch.float32)


def _update_with_foreign_optimizer(state: TrainState, max_grad_norm: float,
                                   norm_of: Callable[[list[Tensor]], Tensor], per_target: Tensor | float,
                                   refused: Tensor | float) -> tuple[Tensor | None, Tensor | None]:
    """The same for any torch optimizer: they cannot be told to skip on the device, so the verdict is read here, one
    wait per step (free on the CPU)."""
    optimizer, scaler = state.optimizer, state.scaler
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return None, None
    if any(grad.is_sparse for grad in grads):
        raise ValueError("a parameter has a sparse gradient; use dense ones (Embedding(sparse=False))")
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = norm_of(grads) * per_target
    length = read_scalar(norm)
    skip = not math.isfinite(length) or bool(read_scalar(refused))
    if not skip:
        clip = min(1.0, max_grad_norm / (length + 1e-6)) if max_grad_norm else 1.0
        torch._foreach_mul_(grads, per_target * clip)
        if scaler is not None:
            scaler.step(optimizer)
        else:
            optimizer.step()
    if scaler is not None:
        scaler.update()
    return norm, torch.full((), float(skip), device=norm.device)
