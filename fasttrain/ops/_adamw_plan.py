"""The compiled CPU kernels' hold on an optimizer's tensors from one step to the next.

A step of hundreds of small tensors costs more in lists, lookups and arguments than in arithmetic. Here the extension
keeps the tensors, and a step only hands over the gradients. Nothing is taken on trust: Python compares every object of
the optimizer with the ones that are held, by identity, and the extension reads every address, type and layout anew, so
whatever a caller has changed meanwhile, the plan is found not to hold and the step runs without it and makes another.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..backend import extension
from ._adamw_kernels import Member, lists_of


class Plan(NamedTuple):
    """What a step is compared with."""

    native: Any  # AdamWPlan of csrc/adamw_plan.h
    group_sizes: list[int]
    params: list[Tensor]
    with_grad: list[bool]  # for each of `params`
    keys: list[Tensor]  # of the optimizer's state, in its order
    names: list[str]  # in its entries, one after the other
    values: list[Tensor]


def make_plan(groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]], members: list[Member]) -> Plan | None:
    """A plan for the steps after this one, whose `members` are all that has a gradient and all the kernels'; None for
    tensors that only stand for others."""
    params = parameters_of(groups)
    plain = (Tensor, torch.nn.Parameter)
    if being_traced() or not all(type(p) in plain and type(p.grad) in (Tensor, type(None)) for p in params):
        return None
    native = cast(Any, extension()).AdamWPlan()
    own, _, *others = lists_of(members)  # all but the gradients
    torch.ops.fasttrain.adamw_plan(native.id, own, *others)
    entries = list(state.values())
    return Plan(native, [len(group["params"]) for group in groups], params, [p.grad is not None for p in params],
                list(state), list(chain.from_iterable(entries)),
                list(chain.from_iterable(map(dict.values, entries))))


def bound(plan: Plan, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> list[Tensor] | None:
    """Binds the gradients of this step, which the caller keeps until it is over; None if the plan does not hold."""
    params, entries = parameters_of(groups), list(state.values())
    if not (not being_traced() and [len(group["params"]) for group in groups] == plan.group_sizes
            and _same(params, plan.params) and _same(state, plan.keys)
            and list(chain.from_iterable(entries)) == plan.names
            and _same(chain.from_iterable(map(dict.values, entries)), plan.values)):
        return None
    grads = [p.grad for p in params]
    if [grad is not None for grad in grads] != plan.with_grad:
        return None
    given = cast("list[Tensor]", grads if all(plan.with_grad) else [grad for grad in grads if grad is not None])
    return given if torch.ops.fasttrain.adamw_bind(plan.native.id, given) else None


def parameters_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in groups))


def being_traced() -> bool:
    """Whether somebody records or replaces the ops that run, and would miss those that are none."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _same(these: Iterable[Any], those: list[Any]) -> bool:
    """Whether they are the very same objects in the same order."""
    these = list(these)
    return len(these) == len(those) and all(map(operator.is_, these, those))
