"""Clip, step and zero of 30 M parameters in 30 large tensors and 300 small ones: PyTorch, fasttrain.AdamW, the floor.

The floor is the traffic of the update itself, 28 bytes a parameter: four tensors read, three written. Its speed is the
bandwidth that the other contenders' traffic is compared with, printed as bytes a parameter and share of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.common import compare
from fasttrain import AdamW

BYTES = {
    "floor: traffic": 28.0,
    "fasttrain": 36.0,
    "fasttrain, bfloat16 moments": 28.0,
    "fasttrain, int8 moments": 24.0 + 4 * 4 / 256,
}
"""A parameter's: gradient for the norm; p, g, m, v in; p, m, v and a zero out; for int8 also two scales a block."""

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


def compiled_step(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """PyTorch's clip and its unfused update in one graph."""
    optimizer = torch.optim.AdamW(params, lr=1e-3, foreach=True)

    @torch.compile
    def update() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    def step() -> None:
        update()
        optimizer.zero_grad(set_to_none=False)
        finish()

    return step


def our_step(params: list[torch.nn.Parameter], state_dtype: str = "float32", impl: str = "auto") -> Callable[[], None]:
    optimizer = AdamW(params, lr=1e-3, max_grad_norm=1.0, state_dtype=state_dtype, impl=impl)

    def step() -> None:
        optimizer.step(zero_grads=True)
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


@pytest.mark.parametrize("num_large", [1, 3, 10, 30], ids=lambda n: f"{n}M parameters")
def test_adamw(benchmark: Any, num_large: int) -> None:
    """Every call leaves zeros in the gradients; no time depends on their values, so they are not filled again."""
    check()
    sets = [parameters(num_large) for _ in range(7)]
    others = {
        "floor: traffic": traffic(sets[0]),
        "torch fused + clip": torch_step(sets[1], fused=True),
        "torch foreach + clip": torch_step(sets[2], foreach=True),
        "fasttrain, bfloat16 moments": our_step(sets[3], "bfloat16"),
        "fasttrain, int8 moments": our_step(sets[4], "int8"),
        "reference": our_step(sets[5], impl="reference"),
        "torch.compile + clip": compiled_step(sets[6]),
    }
    size = f"{num_large} M parameters + 300 small tensors, {DEVICE}"
    numel = sum(p.numel() for p in sets[0])
    growth = (DEVICE, "parameters", numel)
    rows = compare(benchmark, "clip + AdamW + zero", size, our_step(sets[0]), others, growth=growth)
    floor = rows["floor: traffic"].p50_ms
    for name, num_bytes in BYTES.items():
        milliseconds = rows[name].p50_ms
        share = num_bytes / BYTES["floor: traffic"] * floor / milliseconds
        print(
            f"{name}: {num_bytes:.1f} bytes a parameter, {num_bytes * numel / milliseconds / 1e6:.1f} GB/s, "
            f"{share:.0%} of the floor's bandwidth, {rows['torch fused + clip'].p50_ms / milliseconds:.2f}x torch fused"
        )


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
