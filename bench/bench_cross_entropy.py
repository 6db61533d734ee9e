"""Cross-entropy, forward and backward: PyTorch, torch.compile, fasttrain, and one copy of the logits as the floor."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.common import compare
from fasttrain import ops
from fasttrain.optimizations import tune_cpu_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(256, 4096), (1024, 50304), (512, 128256)]


@pytest.fixture(params=["default allocator", "kept memory"])
def allocator(request: pytest.FixtureRequest) -> Iterator[str]:
    """Page faults are most of PyTorch's time, so both policies are shown, in this order: undoing is not exact."""
    if request.param == "default allocator":
        yield request.param
        return
    if DEVICE != "cpu":
        pytest.skip("a CPU matter")
    policy = tune_cpu_memory()
    yield request.param
    policy.restore()


@pytest.mark.parametrize("allocator", ["default allocator", "kept memory"], indirect=True, scope="module")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N={s[0]} V={s[1]}")
def test_cross_entropy(benchmark: Any, allocator: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    N, V = size
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(N, V, generator=generator)).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator).to(DEVICE)
    sink = torch.empty_like(logits)

    def step(op: Any) -> torch.Tensor:
        loss = op(logits, targets)
        loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return loss

    def floor() -> None:
        sink.copy_(logits.detach())  # read once, write once

    def clear() -> None:
        logits.grad = None

    check(logits, targets, step, clear)
    others = {"floor: copy": floor, "F.cross_entropy": lambda: step(F.cross_entropy)}
    compiled = torch.compile(F.cross_entropy)
    others["torch.compile"] = lambda: step(compiled)
    others["reference"] = lambda: step(functools.partial(ops.cross_entropy, impl="reference"))
    kind = f"{str(dtype).removeprefix('torch.')}, {allocator if DEVICE == 'cpu' else DEVICE}"
    compare(
        benchmark,
        "cross_entropy forward + backward",
        f"N={N} V={V} {kind}",
        lambda: step(ops.cross_entropy),
        others,
        prepare=clear,
        growth=(kind, "logits, N x V", N * V),
    )


def check(logits: torch.Tensor, targets: torch.Tensor, step: Any, clear: Any) -> None:
    """Our result against float32 PyTorch on the same bits, before anything is timed."""
    clear()
    loss = step(ops.cross_entropy).detach()
    gradient = logits.grad
    leaf = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(leaf, targets)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient, leaf.grad.to(logits.dtype), rtol=2e-2 if logits.dtype == torch.bfloat16 else 1e-4, atol=1e-8
    )
