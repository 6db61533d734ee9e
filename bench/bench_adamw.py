"""Clip, step and zero of 30 M parameters in 30 large tensors and 300 small ones: PyTorch, fasttrain.AdamW, the floor.

The floor is the traffic of the update itself, 28 bytes a parameter: four tensors read, three written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import compare
from fasttrain import AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(num_large: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 1000)] * num_large + [(576,)] * 300
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
    return made


def torch_step(params: list[torch.nn.Parameter], **options: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(params, lr=1e-3, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        finish()

    return step


def our_step(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    optimizer = AdamW(params, lr=1e-3, max_grad_norm=1.0)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        finish()

    return step


def finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def traffic(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """7 passes over the parameters' size: 3 copies (a read and a write each) and one more read."""
    flat = torch.cat([p.detach().flatten() for p in params])
    copies = [torch.empty_like(flat) for _ in range(3)]

    def move() -> None:
        for copy in copies:
            copy.copy_(flat)
        flat.sum()
        finish()

    return move


@pytest.mark.parametrize("num_large", [3, 30], ids=lambda n: f"{n}M parameters")
def test_adamw(benchmark: Any, num_large: int) -> None:
    check()
    ours = parameters(num_large)
    grads: list[Tensor] = [p.grad.clone() for p in ours if p.grad is not None]
    sets = [ours, parameters(num_large), parameters(num_large)]

    def refill() -> None:
        for params in sets:
            torch._foreach_copy_([p.grad for p in params], grads)

    others = {
        "floor: traffic": traffic(ours),
        "torch fused + clip": torch_step(sets[1], fused=True),
        "torch foreach + clip": torch_step(sets[2], foreach=True),
    }
    size = f"{num_large} M parameters + 300 small tensors, {DEVICE}"
    compare(benchmark, "clip + AdamW + zero", size, our_step(ours), others, prepare=refill)


def check() -> None:
    """Three steps against PyTorch."""
    ours, theirs = parameters(1), parameters(1)
    our, their = our_step(ours), torch_step(theirs, foreach=True)
    for seed in range(3):
        for params in (ours, theirs):
            generator = torch.Generator().manual_seed(seed)
            for p in params:
                p.grad.copy_(torch.randn(p.shape, generator=generator))  # type: ignore[union-attr]
        our()
        their()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
