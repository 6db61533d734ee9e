"""Random rows and parameters for ops.sample, and what every implementation must do with them."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from fasttrain import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


TOLERANCE = {"triton": 1e-4}
"""Of log-probabilities: where Triton estimates masses and no token depends on them. Elsewhere they are the reference's
in every bit."""


def assert_equal_to_the_reference(impl: str, x: Tensor, **options: Any) -> None:
    """`impl` returns the reference's tokens, and its log-probabilities as nearly as promised."""
    want = ops.sample(x, impl="reference", return_logprobs=True, **options)
    got = ops.sample(x, impl=impl, return_logprobs=True, **options)
    wrong = ((want[0] != got[0]) | ~((want[1] - got[1]).abs() <= TOLERANCE.get(impl, 0.0))).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0])
        alone = {name: value[row].item() if isinstance(value, Tensor) else value for name, value in options.items()}
        raise AssertionError(
            f"{len(wrong)} of {len(x)} rows differ; row {row} of V={x.size(1)} {x.dtype} {alone}: "
            f"{got[0][row]} {got[1][row]}, the reference {want[0][row]} {want[1][row]}"
        )


def random_problem(chance: random.Random, longest: int) -> tuple[Tensor, dict[str, Any]]:
    """Rows with ties, masks, extreme spreads and offsets, under parameters that are numbers or one for each row."""
    generator = torch.Generator().manual_seed(chance.getrandbits(40))
    sizes = [1, 2, 3, 16, 17, 31, 100, 255, 256, 257, 511, 513, 1000, 4096, 5003, 20000, chance.randint(1, 3000)]
    V = chance.choice([size for size in sizes if size <= longest])
    B = chance.randint(1, max(1, min(64, 20_000 // V)))
    x = torch.randn(B, V, generator=generator) * chance.choice([0.0, 1e-30, 0.01, 0.3, 1.0, 3.0, 10.0, 40.0, 1e4, 1e30])
    if chance.random() < 0.3:
        x = x.round(decimals=chance.choice([0, 1]))
    if chance.random() < 0.3:
        x[torch.rand(B, V, generator=generator) < chance.choice([0.1, 0.5, 0.99])] = -math.inf
    if chance.random() < 0.2:
        x = x + chance.choice([1e3, -1e6, 1e30])
    x = x.to(chance.choice([torch.float32, *DTYPES]))
    x = x.clamp(max=torch.finfo(x.dtype).max)
    x = torch.where(x.isinf().all(1, keepdim=True), 0.0, x).to(x.dtype)
    if chance.random() < 0.2:
        x = x.t().contiguous().t() if chance.random() < 0.5 else x[:1].expand(B, V)

    def parameter(*choices: Any) -> Any:
        one = chance.random() < 0.6
        return chance.choice(choices) if one else torch.tensor([chance.choice(choices) for _ in range(B)])

    return x, {
        "temperature": parameter(1.0, 1.0, 0.7, 0.0, 1e-6, 1e-30, 2.0, 50.0, 1e30),
        "top_k": parameter(0, 0, 1, 2, 5, 50, V // 2, max(V - 1, 0), V, 10**9, chance.randint(0, V)),
        "top_p": parameter(1.0, 1.0, 0.9, 0.5, 0.3, 0.0, 0.999, 0.9999999, chance.random()),
        "min_p": parameter(0.0, 0.0, 0.05, 1.0, 1e-7, 1e-12, chance.random()),
        "seed": parameter(*(chance.getrandbits(63) for _ in range(8))),
        "position": parameter(0, 5, chance.getrandbits(63)),
    }


def compare_random_rows(impl: str, seed: int, num_rows: int, longest: int = 20_000) -> None:
    chance, seen = random.Random(seed), 0
    while seen < num_rows:
        x, options = random_problem(chance, longest)
        assert_equal_to_the_reference(impl, x, **options)
        seen += len(x)
