"""AdamW's held tensors: steps run by them, and whatever a caller changes between two steps, the next obeys it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_adamw_kernels import assert_same_bits, bits, make, needs_cpp, set_gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.ops import adamw
from fasttrain.ops.adamw import AdamW

pytestmark = [needs_cpp, pytest.mark.usefixtures("poisoned_memory")]
SHAPES = ((3,), (3,), (257,), (70, 100), (3, 0), (4096,), ())


def fresh(state_dtype: str = "int8", **options: Any) -> AdamW:
    optimizer = AdamW(make(shapes=SHAPES), lr=0.1, max_grad_norm=1.0, state_dtype=state_dtype, **options)
    for seed in range(2):
        set_gradients(list(optimizer._parameters()), seed)
        optimizer.step()
    assert optimizer._plan is not None
    return optimizer


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_a_second_step_needs_no_lists_and_gives_the_same_bits(
    state_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, listed = fresh(state_dtype, ema_decay=0.9), fresh(state_dtype, ema_decay=0.9)
    calls: list[None] = []
    update = adamw.kernel_update
    monkeypatch.setattr(adamw, "kernel_update", lambda *arguments: [calls.append(None), update(*arguments)])
    for seed, options in enumerate(({}, {"grad_scale": 0.3}, {"zero_grads": True}, {"found_inf": 1.0}, {})):
        for optimizer in (held, listed):
            set_gradients(list(optimizer._parameters()), 5 + seed)
            if optimizer is listed:
                optimizer._plan = None
            before = len(calls)
            optimizer.step(**options)
            assert len(calls) - before == (optimizer is listed and "found_inf" not in options)
        assert_same_bits(held, listed)
        assert torch.equal(bits(held.grad_norm), bits(listed.grad_norm))  # type: ignore[arg-type]
        assert torch.equal(held.last_found_inf, listed.last_found_inf)  # type: ignore[arg-type]
        for p, q in zip(held._parameters(), listed._parameters()):
            assert options.get("zero_grads") is None or not (p.grad.any() or q.grad.any())  # type: ignore[union-attr]


def moved(o: AdamW, p: Tensor) -> None:
    p.data = p.data * 2


def transposed(o: AdamW, p: Tensor) -> None:
    p.data = p.data.t()
    p.grad = p.grad.t()  # type: ignore[union-attr]
    for key in ("exp_avg", "exp_avg_sq", "ema"):
        o.state[p][key] = o.state[p][key].t()


def narrower(o: AdamW, p: Tensor) -> None:
    p.grad = None
    p.data = p.data.bfloat16()
    p.grad = torch.ones_like(p)


def scattered_gradient(o: AdamW, p: Tensor) -> None:
    p.grad = torch.stack([p.grad, p.grad], dim=-1)[..., 0]  # type: ignore[list-item]


def no_gradient(o: AdamW, p: Tensor) -> None:
    p.grad = None


def new_entry(o: AdamW, p: Tensor) -> None:
    o.state[p]["exp_avg_sq"] = o.state[p]["exp_avg_sq"] + 1


def moved_entry(o: AdamW, p: Tensor) -> None:
    o.state[p]["exp_avg_sq"].data = o.state[p]["exp_avg_sq"] + 1


def exchanged_entries(o: AdamW, p: Tensor) -> None:
    state = o.state[p]
    o.state[p] = {"step": state["step"], **{k: v for k, v in state.items() if k != "step"}}
    o.state[p]["exp_avg"], o.state[p]["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


def counted(o: AdamW, p: Tensor) -> None:
    o.state[p]["step"].fill_(50.0)


def forgotten(o: AdamW, p: Tensor) -> None:
    del o.state[p]


def another_parameter(o: AdamW, p: Tensor) -> None:
    other = nn.Parameter(torch.ones(300))
    other.grad = torch.ones(300)
    o.add_param_group({"params": [other], "lr": 0.3})


def taken_out(o: AdamW, p: Tensor) -> None:
    o.param_groups[0]["params"] = [q for q in o.param_groups[0]["params"] if q is not p]


def replaced(o: AdamW, p: Tensor) -> None:
    other = nn.Parameter(p.detach() + 1)
    other.grad = p.grad
    o.param_groups[0]["params"][3] = other


def regrouped(o: AdamW, p: Tensor) -> None:
    *params, last = o.param_groups[0]["params"]
    o.param_groups.append({**o.param_groups[0], "params": [last], "lr": 0.5})
    o.param_groups[0]["params"] = params


def renamed(o: AdamW, p: Tensor) -> None:
    other = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}
    o.state[p] = {other.get(key, key): value for key, value in o.state[p].items()}


def exchanged_states(o: AdamW, p: Tensor) -> None:
    keys, entries = list(o.state), list(o.state.values())
    keys[0], keys[1] = keys[1], keys[0]
    o.state.clear()
    o.state.update(zip(keys, entries))


def other_options(o: AdamW, p: Tensor) -> None:
    o.param_groups[0].update(lr=0.01, betas=(0.5, 0.5), maximize=True)
    o.rounding_seed, o.max_grad_norm = 77, None


def reloaded(o: AdamW, p: Tensor) -> None:
    saved = copy.deepcopy(o.state_dict())
    saved["state"][3]["exp_avg"] += 1.0
    o.load_state_dict(saved)


def averages_swapped(o: AdamW, p: Tensor) -> None:
    with o.ema_swapped():
        p.data.mul_(0.5)


CHANGES = [moved, transposed, narrower, scattered_gradient, no_gradient, new_entry, moved_entry, exchanged_entries,
           counted, forgotten, another_parameter, taken_out, replaced, regrouped, renamed,
           exchanged_states, other_options, reloaded, averages_swapped]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_two_steps_counts_in_the_next(change: Callable[[AdamW, Tensor], None]) -> None:
    results = []
    for forget in (True, False):
        optimizer = fresh(ema_decay=0.9)
        for seed in (3, 4):
            set_gradients(list(optimizer._parameters()), seed)
            if seed == 3:
                change(optimizer, list(optimizer._parameters())[3])
            if forget:
                optimizer._plan = None
            optimizer.step()
        results.append(optimizer)
    assert_same_bits(*results)


def test_gradients_are_not_kept_and_neither_is_a_plan_whose_optimizer_is_gone() -> None:
    optimizer = fresh()
    grad = weakref.ref(next(optimizer._parameters()).grad)  # type: ignore[arg-type]
    state = weakref.ref(optimizer.state[next(optimizer._parameters())]["exp_avg"])
    optimizer.zero_grad()
    assert grad() is None
    assert optimizer._plan is not None
    number = optimizer._plan.native.id
    with pytest.raises(RuntimeError, match="bind gradients first"):
        optimizer._plan.native.norm()
    del optimizer
    gc.collect()
    assert state() is None
    with pytest.raises(RuntimeError, match=f"no plan {number}"):
        torch.ops.fasttrain.adamw_bind(number, [torch.ones(3)])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
                         ids=["copied", "pickled"])  # fmt: skip
def test_a_copy_of_an_optimizer_goes_on_with_the_same_bits_and_options(duplicate: Callable[[AdamW], AdamW]) -> None:
    optimizer = fresh(ema_decay=0.9)
    other = duplicate(optimizer)
    for each in (optimizer, other):
        for seed in (3, 4):
            set_gradients(list(each._parameters()), seed)
            each.step()
    assert_same_bits(optimizer, other)
    assert other.max_grad_norm == 1.0 and not set(map(id, optimizer._parameters())) & set(map(id, other._parameters()))


def test_a_loaded_state_leaves_what_ranks_have_agreed_on() -> None:
    optimizer = fresh()
    shards, norm_of_all = {p: adamw.Shard(256, 4 * p.numel()) for p in optimizer._parameters()}, torch.neg
    optimizer.shards, optimizer.norm_of_all = shards, norm_of_all
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.shards is shards and optimizer.norm_of_all is norm_of_all


def test_who_records_ops_sees_the_update() -> None:
    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    optimizer = fresh()
    set_gradients(list(optimizer._parameters()), 3)
    with Recorded():
        optimizer.step()
    assert "fasttrain::adamw_norm" in names and "fasttrain::adamw_update" in names
    assert optimizer._plan is None
