"""The Triton AdamW run by Triton's interpreter on CPU tensors: bit for bit the reference, bytes, bounds, races.

Not collected by name: `test_adamw_triton.py` runs this file in a process with TRITON_INTERPRET=1. By hand:
`TRITON_INTERPRET=1 pytest tests/ops/interpreted_adamw.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_adamw_kernels import assert_same_bits, bits, make, set_gradients
from torch import Tensor, nn
from triton_gate import count_bytes

from fasttrain.kernels import adamw as kernels
from fasttrain.ops.adamw import AdamW, Shard

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = ((), (3,), (16, 16), (0,), (4096,), (33, 129), (2048,))


def reachable(parameters: Sequence[Tensor], optimizer: AdamW) -> dict[str, list[Tensor]]:
    names = {"params": list(parameters), "grads": [p.grad for p in parameters if p.grad is not None]}
    for key in ("exp_avg", "exp_avg_sq", "ema", "step", "moment_scales", "remainder"):
        names[key] = [state[key] for state in optimizer.state.values() if key in state]
    return names


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("master", [None, "remainder"])
def test_triton_is_the_reference_bit_for_bit(
    dtype: torch.dtype, state_dtype: str, ema_decay: float | None, master: str | None
) -> None:
    if master and dtype != torch.bfloat16:
        return  # as without
    optimizers = []
    for impl in ("triton", "reference"):
        parameters = make(dtype, SHAPES)
        groups = [
            {"params": parameters[:4], "weight_decay": 0.3, "lr": 0.01},
            {"params": parameters[4:], "maximize": True},
        ]
        optimizers.append(
            AdamW(
                groups,
                lr=0.1,
                betas=(0.8, 0.99),
                ema_decay=ema_decay,
                state_dtype=state_dtype,
                master=master,
                impl=impl,  # type: ignore[arg-type]
            )
        )
        optimizers[-1].rounding_seed = (7 << 32) + 5
    for step in range(3):
        for optimizer in optimizers:
            set_gradients(list(optimizer._parameters()), seed=step)
            optimizer.step(grad_scale=0.37)
        assert_same_bits(*optimizers)


@pytest.mark.parametrize(
    ("dtype", "options", "zero_grads", "floor"),
    [
        (torch.float32, {}, False, 28),
        (torch.float32, {"state_dtype": "bfloat16"}, False, 20),
        (torch.float32, {"state_dtype": "int8"}, False, 16 + 4 / 64),
        (torch.float32, {}, True, 32),
        (torch.float32, {"ema_decay": 0.9}, False, 36),
        (torch.bfloat16, {}, False, 22),
        (torch.bfloat16, {"master": "remainder"}, False, 26),
        (torch.bfloat16, {"state_dtype": "bfloat16"}, False, 14),
        (torch.bfloat16, {"state_dtype": "int8"}, False, 10 + 4 / 64),
        (torch.bfloat16, {"state_dtype": "int8", "master": "remainder"}, False, 14 + 4 / 64),
    ],
    ids=str,
)
def test_a_step_moves_the_bytes_of_the_table_and_no_more(
    dtype: torch.dtype, options: dict[str, Any], zero_grads: bool, floor: float
) -> None:
    parameters = make(dtype, shapes=((192, 256), (4096,), (4096, 8)))
    optimizer = AdamW(parameters, impl="triton", **options)
    set_gradients(parameters, 0)
    optimizer.step()
    set_gradients(parameters, 1)
    grads = [p.grad for p in parameters if p.grad is not None]
    numel = sum(p.numel() for p in parameters)
    with count_bytes(reachable(parameters, optimizer)) as traffic:
        optimizer.step(zero_grads=zero_grads)
    assert traffic.launches == ["_update_kernel"]  # one launch for all
    assert floor * numel <= traffic.total <= 1.02 * floor * numel
    with count_bytes({"grads": grads}) as traffic:
        kernels.adamw_norm(grads)
    assert traffic.launches == ["_norm_kernel"]
    assert dtype.itemsize * numel <= traffic.total <= 1.02 * dtype.itemsize * numel


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_a_skipped_step_touches_nothing_but_the_gradients_it_is_to_zero(skip: float) -> None:
    parameters = make(shapes=((48, 64), (100,)))
    optimizer = AdamW(parameters, impl="triton", max_grad_norm=1.0)
    set_gradients(parameters, 0)
    optimizer.step()
    before = [bits(p).clone() for p in parameters]
    set_gradients(parameters, 1)
    assert parameters[0].grad is not None
    if skip:
        parameters[0].grad[3, 3] = float("inf")
    names = reachable(parameters, optimizer)
    from fasttrain import utils

    utils._HOST_DEVICES = ()  # as on a GPU, where the host does not look
    try:
        with count_bytes(names) as traffic:
            optimizer.step(zero_grads=True)
    finally:
        utils._HOST_DEVICES = ("cpu",)
    assert optimizer.last_found_inf == skip
    assert not any(p.grad.any() for p in parameters)  # type: ignore[union-attr]
    assert all(torch.equal(bits(p), old) == bool(skip) for p, old in zip(parameters, before))
    assert float(optimizer.state[parameters[1]]["step"]) == 2 - skip
    assert (traffic.loaded["params"] == 0) == bool(skip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_that_of_everything_together(dtype: torch.dtype) -> None:
    grads = [torch.randn(shape).to(dtype) for shape in ((5000,), (7,), (), (64, 64))] + [torch.randn(33)]
    want = torch.cat([grad.double().flatten() for grad in grads]).norm().float()
    with count_bytes({"grads": grads}):
        got = kernels.adamw_norm(grads)
    torch.testing.assert_close(got, want, rtol=3e-7, atol=0)
    assert torch.equal(got, kernels.adamw_norm(grads))
    assert not kernels.adamw_norm([*grads, torch.tensor([float("nan")])]).isfinite()


def test_odd_tensors_go_in_a_launch_of_their_own() -> None:
    parameters = make(shapes=((4096,), (33,)))
    optimizer = AdamW(parameters, impl="triton")
    set_gradients(parameters, 0)
    optimizer.step()
    with count_bytes(reachable(parameters, optimizer)) as traffic:
        optimizer.step()
    assert traffic.launches == ["_update_kernel", "_update_kernel"]


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_a_shard_is_rounded_as_part_of_the_whole(state_dtype: str) -> None:
    whole = make(shapes=((5000,),))
    part = nn.Parameter(whole[0].detach()[2560:].clone())
    optimizers = [AdamW([p], state_dtype=state_dtype, impl="triton") for p in (whole[0], part)]
    optimizers[1].shards[part] = Shard(2560, 5000)
    set_gradients(whole, 0)
    assert whole[0].grad is not None
    part.grad = whole[0].grad[2560:].clone()
    for optimizer in optimizers:
        optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizers[1].state[part][key], optimizers[0].state[whole[0]][key][2560:])
