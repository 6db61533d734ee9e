"""Linear head + cross-entropy, forward and backward: eager PyTorch, its own chunked op, fasttrain, and as the floor the
three matrix products alone, into memory that is already there.

Gradient filtering is measured on random weights and, with `--model FOLDER_OR_GGUF` (say SmolLM2-135M), on the head of
that model and the hidden states of real tokens: the source of the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.bench_generate import tokenizer_of
from bench.common import compare
from bench.generate_contender import load_model
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
    compiled = torch.compile(eager)
    others["torch.compile"] = lambda: step(compiled)
    if share_ignored == 0.0:
        others["floor: three products"] = floor(hidden, weight)
    # torch 2.13; with its defaults a minute a call above, and no faster where labels are ignored
    if hasattr(F, "linear_cross_entropy") and V < 100_000 and share_ignored == 0.0:
        others["F.linear_cross_entropy"] = lambda: step(torch_chunked)
    policy = allocator if DEVICE == "cpu" else DEVICE
    label = f"N={N} V={V} D={D} {str(DTYPE).removeprefix('torch.')}, {share_ignored:.0%} ignored, {policy}"
    compare(
        benchmark,
        "linear cross-entropy forward + backward",
        label,
        lambda: step(ops.linear_cross_entropy),
        others,
        rounds=3,
        prepare=clear,
        warm=1,  # the first huge pages after another contender's freed ones cost 150 to 250 ms in the kernel
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


THRESHOLDS = (2**-16, 2**-14, 2**-12)


@pytest.mark.skipif(DEVICE != "cpu", reason="sized for a CPU")
@pytest.mark.parametrize("source", ["trained model", "random weights"])
def test_gradient_filtering(benchmark: Any, source: str, request: pytest.FixtureRequest) -> None:
    path = request.config.getoption("--model")
    if source == "trained model" and path is None:
        pytest.skip("no --model")
    hidden, weight, targets = real_tokens(path, 1024) if source == "trained model" else random_head(1024, 49152, 576)
    policy = tune_cpu_memory()

    def step(eps: float | None) -> list[Tensor]:
        hidden.grad = weight.grad = None
        loss, skipped = ops.linear_cross_entropy(hidden, weight, targets, filter_eps=eps, return_skipped_mass=True)
        loss.backward()
        return [skipped.detach(), hidden.grad, weight.grad]  # type: ignore[list-item]

    _, *exact = step(None)
    labels = {}
    for eps in THRESHOLDS:
        mass, *filtered = step(eps)
        errors = [(got - want).norm() for got, want in zip(filtered, exact)]
        sizes = [weight.detach().norm(dim=1).max(), hidden.detach().norm(dim=1).max()]
        assert all(error <= mass * size for error, size in zip(errors, sizes))
        relative = [float(error / want.norm()) for error, want in zip(errors, exact)]
        bounds = [float(mass * size / want.norm()) for size, want in zip(sizes, exact)]
        found = zip(("hidden", "weight"), relative, bounds)
        labels[eps] = f"filter_eps=2**{int(torch.tensor(eps).log2())}: skips {float(mass):.4f} of the mass; error " + (
            ", ".join(f"{error:.2%} of grad_{name} (bound {bound:.0%})" for name, error, bound in found)
        )
    others = {label: lambda eps=eps: step(eps) for eps, label in labels.items()}
    size = f"N=1024 V={weight.size(0)} D={weight.size(1)} float32, {source}"
    compare(benchmark, "gradient filtering of linear cross-entropy", size, lambda: step(None), others, rounds=7)
    policy.restore()


def random_head(N: int, V: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that spread by 3, so that no class is much likelier than the others in all rows."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D)))
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden.requires_grad_(), (weight * 3 / D**0.5).requires_grad_(), targets


def real_tokens(path: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states before the head, the head, and the next tokens, of the standard library's source."""
    import argparse as text  # any module that is long enough

    ids = torch.tensor(tokenizer_of(path)(Path(text.__file__).read_text())["input_ids"][: count + 1])
    model = load_model(path)
    with torch.no_grad():
        hidden = model.model(ids[:-1].view(2, -1)).last_hidden_state.flatten(0, 1)  # two texts of half the length
    weight = model.get_output_embeddings().weight.detach()
    return hidden.clone().requires_grad_(), weight.clone().requires_grad_(), ids[1:]
