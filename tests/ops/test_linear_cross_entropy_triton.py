"""The Triton linear cross-entropy where there is no GPU: its machine code, and its interpreted tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from triton_gate import DEVICES, run_interpreted

from bench.gate_linear_cross_entropy import compile_tile
from fasttrain.kernels import linear_cross_entropy as kernels


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Machine code is made anew for every test run, and kept nowhere else."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize("target", list(DEVICES))
@pytest.mark.parametrize(("dtype", "terms"), [("bf16", False), ("bf16", True), ("fp16", False), ("fp32", True)])
def test_machine_code_has_no_spills_and_no_float_atomics(dtype: str, terms: bool, target: str) -> None:
    compiled = compile_tile(dtype, target, smoothed=terms, softcapped=terms, with_bias=terms)
    assert compiled.spills == 0 and compiled.local_bytes == 0 and compiled.num_float_atomics == 0
    assert compiled.occupancy >= (4 if dtype == "fp32" else 1)


def test_interpreted_tests_pass() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_linear_cross_entropy.py"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_tensors_are_refused_outside_the_interpreter(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"CPU tensor.*TRITON_INTERPRET=1"):
        kernels.linear_cross_entropy_forward(
            torch.zeros(2, 4, dtype=dtype),
            torch.zeros(9, 4, dtype=dtype),
            None,
            torch.zeros(2, dtype=torch.int64),
            ignore_index=-100,
            label_smoothing=0.0,
            z_loss=0.0,
            softcap=0.0,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_gpu_agrees_with_the_reference(reduction: Any, dtype: torch.dtype) -> None:
    from fasttrain import ops

    for N, D, V in ((1000, 64, 50257), (5000, 768, 50304), (300, 2048, 128256)):
        tensors = [
            torch.randn(N, D, device="cuda").to(dtype),
            (torch.randn(V, D, device="cuda") * 3 / D**0.5).to(dtype),
        ]
        targets = torch.randint(0, V, (N,), device="cuda")
        targets[::5] = -100
        results = []
        for impl, kind in (("triton", dtype), ("reference", torch.float64)):
            hidden, weight = (tensor.to(kind).requires_grad_() for tensor in tensors)
            loss = ops.linear_cross_entropy(
                hidden, weight, targets, reduction=reduction, impl=impl, label_smoothing=0.1, z_loss=1e-4
            )
            (loss * 0.37).sum().backward()
            results.append([loss.detach(), hidden.grad, weight.grad])
        for got, want in zip(*results):
            assert got is not None and want is not None
            error = (got.double() - want).norm() / want.norm()
            assert error <= 4 * torch.finfo(dtype).eps + 1e-4
