"""One draw per row: PyTorch's sort, topk and multinomial pipelines, fasttrain, and one read of the logits as floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import compare
from fasttrain import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILTERS: dict[str, dict[str, Any]] = {
    "no truncation": {},
    "top-k 50 top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"top_p": 0.9},
    "argmax": {"temperature": 0.0},
}


def pipeline(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Callable[[Tensor], Tensor]:
    """What people write in PyTorch."""
    def draw(logits: Tensor) -> Tensor:  # (B, V)
        if temperature == 0:
            return logits.argmax(1)
        if top_k:
            values, ids = logits.topk(top_k)  # (B, k), sorted
        elif top_p < 1:
            values, ids = logits.sort(descending=True)
        else:
            return logits.softmax(1).multinomial(1)[:, 0]
        probabilities = values.softmax(1)
        if top_p < 1:
            probabilities = probabilities.masked_fill(probabilities.cumsum(1) - probabilities >= top_p, 0.0)
        return ids.gather(1, probabilities.multinomial(1))[:, 0]

    return draw


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [(1, 128256), (16, 128256), (1, 4096)], ids=lambda s: f"B={s[0]} V={s[1]}")
def test_sample(benchmark: Any, size: tuple[int, int], name: str) -> None:
    B, V = size
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, V, generator=generator)).to(DEVICE)
    options = FILTERS[name]
    check(logits, options)

    def timed(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return run

    others = {
        "floor: one read": timed(lambda: logits.amax(1)),
        "PyTorch pipeline": timed(lambda: pipeline(**options)(logits)),
    }
    ours = timed(lambda: ops.sample(logits, seed=1, **options))
    compare(benchmark, f"sample, {name}", f"B={B} V={V}, {DEVICE}", ours, others)


def check(logits: Tensor, options: dict[str, Any]) -> None:
    """Every token drawn is one that the filters keep, and greedy is the argmax."""
    token = ops.sample(logits, seed=0, **options)
    if options.get("temperature") == 0:
        assert torch.equal(token, logits.argmax(1))
        return
    probabilities = logits.softmax(1)
    rank = (probabilities > probabilities.gather(1, token[:, None])).sum(1)
    assert (rank < options.get("top_k", logits.size(1))).all()
