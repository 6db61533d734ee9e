"""The Triton AdamW where there is no GPU: its machine code and its interpreted tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from triton_gate import DEVICES, H100, run_interpreted

from bench.gate_adamw import compile_norm, compile_update
from fasttrain.kernels import adamw as kernels

TARGETS = list(DEVICES)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
VARIANTS = [("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "int8"), ("bf16", "fp32"), ("bf16", "bf16"), ("bf16", "int8")]


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("param", "moment"), VARIANTS)
def test_the_update_has_no_spills_and_only_wide_accesses(param: str, moment: str, target: str) -> None:
    compiled = compile_update(param, moment, target)
    assert compiled.spills == compiled.local_bytes == compiled.num_float_atomics == 0
    num_wide = 2 * sum(DTYPES[dtype].itemsize for dtype in (param, moment, moment)) + DTYPES[param].itemsize
    num_narrow = 4 if moment == "int8" else 0  # the scales of the codes, one for 256 elements
    assert compiled.wide_share >= 0.95 * num_wide / (num_wide + num_narrow)
    assert compiled.occupancy >= {"fp32": 8, "bf16": 3, "int8": 3}[moment]


@pytest.mark.parametrize(
    "options",
    [
        {"param": "fp32", "moment": "bf16", "ema": True, "zero": True},
        {"param": "bf16", "moment": "int8", "ema": True, "zero": True, "master": True},
        {"param": "bf16", "moment": "fp32", "master": True},
        {"param": "fp32", "moment": "bf16", "aligned": False},
        {"param": "bf16", "moment": "int8", "master": True, "aligned": False},
    ],
    ids=str,
)
def test_its_other_forms_do_not_spill_either(options: dict[str, Any]) -> None:
    compiled = compile_update(target="sm_90", **options)
    assert compiled.spills == compiled.local_bytes == 0


@pytest.mark.parametrize("target", TARGETS)
def test_the_norm_has_no_spills_and_only_wide_accesses(target: str) -> None:
    compiled = compile_norm(target, aligned=True)
    assert compiled.spills == compiled.local_bytes == compiled.num_float_atomics == 0
    assert compiled.wide_share >= 0.95


def test_instructions_leave_memory_the_bottleneck() -> None:
    """Instructions an H100 issues in the time in which it moves a parameter's bytes. Random bits, codes and an exact
    root and division cost what they cost: at ten bytes a parameter they are half as much again."""
    for param, moment in VARIANTS:
        sizes = [DTYPES[dtype].itemsize for dtype in (param, param, moment, moment)]  # p, g, m, v
        num_bytes = sum(sizes) + sum(sizes) - sizes[1]
        budget = num_bytes / H100["memory"] * H100["issue"] * (1.5 if (param, moment) == ("bf16", "int8") else 1.0)
        compiled = compile_update(param, moment, "sm_90")
        assert compiled.instructions_per_element <= budget, (param, moment, compiled, budget)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match=r"CPU tensors.*TRITON_INTERPRET=1"):
        kernels.adamw_norm([torch.ones(3)])


def test_interpreted_tests_pass() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_adamw.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("master", [None, "remainder"])
def test_a_gpu_gives_the_bits_of_the_reference(state_dtype: str, master: str | None) -> None:
    from test_adamw_kernels import assert_same_bits, make, set_gradients

    from fasttrain.ops.adamw import AdamW

    for dtype in (torch.float32, torch.bfloat16):
        optimizers = []
        for impl in ("triton", "reference"):
            parameters = [torch.nn.Parameter(p.detach().cuda()) for p in make(dtype)]
            options: dict[str, Any] = {"state_dtype": state_dtype, "master": master, "impl": impl}
            optimizers.append(AdamW(parameters, lr=0.1, ema_decay=0.9, **options))
        for step in range(3):
            for optimizer in optimizers:
                own = [torch.nn.Parameter(p.detach().cpu()) for p in optimizer._parameters()]
                set_gradients(own, seed=step)
                for p, q in zip(optimizer._parameters(), own):
                    p.grad = q.grad.cuda() if q.grad is not None else None
                optimizer.step(grad_scale=torch.tensor(0.37, device="cuda"))
            assert_same_bits(*optimizers)
