"""Linear head + cross-entropy, forward and backward: eager PyTorch, its own chunked op, fasttrain, and as the floor the
three matrix products alone, into memory that is already there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import compare
from fasttrain import ops
from fasttrain.optimizations import tune_cpu_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIZES = (
    [(1024, 4096, 384), (1024, 50304, 384), (512, 128256, 576)]
    if DEVICE == "cpu"
    else [(8192, 50304, 768), (8192, 128256, 4096)]
)


@pytest.fixture(params=["default allocator", "kept memory"], scope="module")
def allocator(request: pytest.FixtureRequest) -> Iterator[str]:
    """Page faults are a large part of PyTorch's time, so both policies. In this order: undoing is not exact."""
    if request.param == "default allocator":
        yield request.param
        return
    if DEVICE != "cpu":
        pytest.skip("a CPU matter")
    policy = tune_cpu_memory()
    yield request.param
    policy.restore()


@pytest.mark.parametrize("share_ignored", [0.0, 0.5], ids=["all targets", "half ignored"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N={s[0]} V={s[1]} D={s[2]}")
def test_linear_cross_entropy(benchmark: Any, allocator: str, size: tuple[int, int, int], share_ignored: float) -> None:
    N, V, D = size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(DEVICE, DTYPE).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 3 / D**0.5).to(DEVICE, DTYPE).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator).to(DEVICE)
    targets[torch.randperm(N, generator=generator)[: int(N * share_ignored)].to(DEVICE)] = -100

    def step(op: Any) -> Tensor:
        loss: Tensor = op(hidden, weight, targets)
        loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return loss

    def clear() -> None:
        hidden.grad = weight.grad = None

    check(hidden, weight, targets, step, clear)
    others = {"eager": lambda: step(eager)}
    if DEVICE != "cpu" or V < 100_000:
        compiled = torch.compile(eager)
        others["torch.compile"] = lambda: step(compiled)
    if share_ignored == 0.0:
        others["floor: three products"] = floor(hidden, weight)
    if hasattr(F, "linear_cross_entropy") and V < 100_000:  # torch 2.13; with its defaults a minute a call above
        others["F.linear_cross_entropy"] = lambda: step(torch_chunked)
    policy = allocator if DEVICE == "cpu" else DEVICE
    label = f"N={N} V={V} D={D} {str(DTYPE).removeprefix('torch.')}, {share_ignored:.0%} ignored, {policy}"
    compare(
        benchmark,
        "linear cross-entropy forward + backward",
        label,
        lambda: step(ops.linear_cross_entropy),
        others,
        rounds=5,
        prepare=clear,
        growth=(f"{share_ignored:.0%} ignored, {policy}", "multiply-adds of a product, N x V x D", N * V * D),
    )


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, targets, options=nn.LinearCrossEntropyOptions())


def floor(hidden: Tensor, weight: Tensor) -> Any:
    """The products of the whole problem at once, all outputs preallocated."""
    h, w = hidden.detach(), weight.detach()
    logits, grad_hidden, grad_weight = h @ w.t(), torch.empty_like(h), torch.empty_like(w)

    def products() -> None:
        torch.mm(h, w.t(), out=logits)
        torch.mm(logits, w, out=grad_hidden)
        torch.mm(logits.t(), h, out=grad_weight)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return products


def check(hidden: Tensor, weight: Tensor, targets: Tensor, step: Any, clear: Any) -> None:
    """Our result against PyTorch's on the same bits, before anything is timed."""
    results = []
    for op in (ops.linear_cross_entropy, eager):
        clear()
        results.append([step(op).detach(), hidden.grad, weight.grad])
    allowed = {torch.float32: 1e-4, torch.bfloat16: 0.05}[DTYPE]
    for got, want in zip(*results):
        error = float((got - want).norm() / want.norm())
        assert error <= allowed
