"""The multi-tensor AdamW ops: schemas, which parameters the kernels take, and the one call for all of them.

The kernels walk raw memory, so a parameter qualifies by type and layout and the reference serves the rest. What a step
needs of each parameter travels as lists of tensors, parallel to each other; numbers of the groups as a small table.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backend import TRITON_INTERPRETED
from ._adamw_moments import BLOCK, REMAINDER, SCALES


class Terms(NamedTuple):
    """One parameter group's numbers. `sign` is -1 to maximize; `ema_weight` 1 - ema_decay."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    sign: float = 1.0
    ema_weight: float = 0.0


class Member(NamedTuple):
    """A parameter with a gradient, and what a step needs to know about it."""

    p: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: int
    number: int  # among all parameters of the optimizer
    offset: int  # index of its first element in the whole parameter: not 0 for a later shard


_EMPTY: dict[torch.device, Tensor] = {}


def takes(member: Member) -> bool:
    """Whether the kernels can walk this parameter: float32 or bfloat16, everything contiguous and of the right type."""
    p, grad, state = member.p, member.grad, member.state
    types = (torch.uint8,) if SCALES in state else (torch.float32, torch.bfloat16)
    return (p.dtype in (torch.float32, torch.bfloat16) and grad.dtype == p.dtype and member.offset % BLOCK == 0
            and p.is_contiguous() and grad.is_contiguous() and state["exp_avg"].is_contiguous()
            and state["exp_avg_sq"].is_contiguous() and state["exp_avg"].dtype in types
            and (REMAINDER not in state or state[REMAINDER].is_contiguous())
            and ("ema" not in state or (state["ema"].is_contiguous() and state["ema"].dtype == p.dtype)))


def kernel_norm(namespace: str, grads: list[Tensor]) -> Tensor:
    """() float32: the 2-norm of contiguous float32 or bfloat16 tensors together."""
    return cast(Tensor, getattr(torch.ops, namespace).adamw_norm(grads))


class Lists(NamedTuple):
    """Parallel lists of what a step needs of each parameter; an empty list or tensor where there is none."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    scales: list[Tensor]
    steps: list[Tensor]
    emas: list[Tensor]
    remainders: list[Tensor]
    places: Tensor
    """(tensors, 3) int64: group, number among all parameters, offset in the whole parameter."""


def lists_of(members: list[Member]) -> Lists:
    device = members[0].p.device
    if device not in _EMPTY:
        _EMPTY[device] = torch.empty(0, device=device)
    empty = _EMPTY[device]
    states = [member.state for member in members]
    mastered = any(REMAINDER in state for state in states)
    return Lists([member.p for member in members], [member.grad for member in members],
                 [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states],
                 [state.get(SCALES, empty) for state in states], [state["step"] for state in states],
                 [state["ema"] for state in states] if "ema" in states[0] else [],
                 [state.get(REMAINDER, empty) for state in states] if mastered else [],
                 torch.from_numpy(_table(tuple([member[3:] for member in members]))))


def kernel_update(namespace: str, members: list[Member], terms: list[Terms], multiplier: Tensor | float | None,
                  skip: Tensor | None, seed: int, zero_grads: bool) -> None:
    """One update of every member that `takes` accepts, all on one device."""
    device = members[0].p.device
    if isinstance(multiplier, (int, float)):
        multiplier = torch.full((), multiplier, dtype=torch.float32, device=device)
    *lists, places = lists_of(members)
    getattr(torch.ops, namespace).adamw_update(
        *lists, torch.from_numpy(_table(tuple(terms))), places,
        None if multiplier is None else multiplier.to(device, torch.float32),
        None if skip is None else skip.to(device, torch.float32), seed, zero_grads)


@functools.lru_cache(maxsize=64)
def _table(rows: tuple[tuple[float, ...], ...]) -> NDArray[Any]:
    """float64 of `Terms`, int64 of places; the same rows come step after step. An array, because a tensor made while
    something traces would outlive it."""
    return np.array(rows, dtype=np.float64 if isinstance(rows[0], Terms) else np.int64)


def _register(namespace: str, triton_device: str) -> Any:
    """The two ops in one namespace: schema, shapes for tracing, and the Triton launchers for one device."""
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("adamw_norm(Tensor[] grads) -> Tensor")
    library.define("adamw_update(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
                   "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] scales, Tensor(f!)[] steps, Tensor(g!)[] emas, "
                   "Tensor(h!)[] remainders, Tensor terms, Tensor places, Tensor? multiplier, Tensor? skip, int seed, "
                   "bool zero_grads) -> ()")
    torch.library.register_fake(f"{namespace}::adamw_norm", lambda grads: grads[0].new_empty((), dtype=torch.float32),
                                lib=library)
    torch.library.register_fake(f"{namespace}::adamw_update", lambda *arguments: None, lib=library)
    for name in ("adamw_norm", "adamw_update"):
        library.impl(name, _launcher(name), triton_device)
    return library


def _register_plans() -> Any:
    """The two ops of csrc/adamw_plan.h: not for tracing; a gradient that is no plain CPU tensor is not bound."""
    library: Any = torch.library.Library("fasttrain", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("adamw_plan(int plan, Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] scales, "
                   "Tensor[] steps, Tensor[] emas, Tensor[] remainders, Tensor places) -> ()")
    library.define("adamw_bind(int plan, Tensor[] grads) -> bool")
    library.impl("adamw_bind", lambda plan, grads: False, "CompositeExplicitAutograd")
    for name in ("adamw_plan", "adamw_bind"):
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return library


def _launcher(name: str) -> Any:
    def launch(*arguments: Any) -> Any:
        from ..kernels import adamw as kernels  # triton is imported by the first call that needs it

        return getattr(kernels, name)(*arguments)

    return launch


# The CPU kernels of namespace `fasttrain` are the extension's.
_LIBRARIES = [_register("fasttrain", triton_device="CUDA"), _register_plans()]
if TRITON_INTERPRETED:
    _LIBRARIES.append(_register("fasttrain_interpreted", triton_device="CPU"))
