"""Float32 products by PyTorch (MKL) and by the kernels that fasttrain prefers on this processor: a linear layer forward
and backward over a small model's sizes, and each product of a chunk of a linear head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bench.common import compare
from fasttrain import products

pytestmark = pytest.mark.skipif(products.fastest()[0] == "torch", reason=products.fastest()[1])
SHAPES = [(2048, 128, 128), (2048, 512, 512), (2048, 512, 1536), (512, 512, 8192)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N={s[0]} inputs={s[1]} outputs={s[2]}")
def test_products(benchmark: Any, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs)
    ours = copy.deepcopy(plain)
    products.use_fast_products(ours)
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
    report(6 * rows * inputs * outputs, rows_by_name)


@pytest.mark.parametrize("which", ["logits", "gradient of weight", "gradient of hidden"])
def test_products_of_a_linear_head(benchmark: Any, which: str) -> None:
    """A chunk of linear_cross_entropy: 256 rows, V=50304, D=384."""
    n, V, D = 256, 50304, 384
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, D), torch.randn(V, D)
    z, by = hidden @ weight.t(), products.fastest()[0]
    if which == "logits":
        a, b, out = hidden, weight.t(), torch.empty(n, V)
    elif which == "gradient of hidden":
        a, b, out = z, weight, torch.empty(n, D)
    else:
        a, b, out = z.t(), hidden, torch.empty(V, D)

    def step(by: products.By) -> None:
        if which == "gradient of weight":
            products.add_transposed_product(by, out, z, hidden, first=True)
        else:
            products.multiply_into(by, out, a, b)

    step(by)
    want = torch.mm(a, b)
    assert float((out - want).norm() / want.norm()) < 1e-5
    rows_by_name = compare(benchmark, "products of a linear head", f"{which}, n={n} V={V} D={D} float32",
                           lambda: step(by), {"torch.mm": lambda: step("torch")})
    report(2 * n * V * D, rows_by_name)


def report(work: int, rows_by_name: dict[str, Any]) -> None:
    print({name: f"{work / row.p50_ms / 1e6:.0f} GFLOP/s" for name, row in rows_by_name.items()})
