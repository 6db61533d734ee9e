"""A linear layer forward and backward in float32: PyTorch's own products and oneDNN's, over a small model's sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bench.common import compare
from fasttrain import products

SHAPES = [(2048, 128, 128), (2048, 512, 512), (2048, 512, 1536), (512, 512, 8192)]


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="MKL is as fast")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N={s[0]} inputs={s[1]} outputs={s[2]}")
def test_products(benchmark: Any, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs)
    ours = copy.deepcopy(plain)
    products.use_onednn(ours)
    x = torch.randn(rows, inputs, requires_grad=True)
    upstream = torch.randn(rows, outputs)

    def step(layer: nn.Linear) -> None:
        layer(x).backward(upstream)

    def clear() -> None:
        for tensor in (x, *plain.parameters(), *ours.parameters()):
            tensor.grad = None

    results = []
    for layer in (plain, ours):
        clear()
        step(layer)
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    for want, got in zip(*results):
        assert float((got - want).norm() / want.norm()) < 1e-5  # type: ignore[operator, union-attr]
    rows_by_name = compare(benchmark, "linear layer forward + backward", f"N={rows} {inputs} -> {outputs} float32, cpu",
                           lambda: step(ours), {"nn.Linear": lambda: step(plain)}, prepare=clear)
    work = 6 * rows * inputs * outputs
    print({name: f"{work / row.p50_ms / 1e6:.0f} GFLOP/s" for name, row in rows_by_name.items()})
