"""One draw per row: PyTorch's sort, topk and multinomial pipelines, fasttrain, and one read of the logits as the floor.

The cost of a filter depends on the row: `peaked` has its mass on a few tokens, as a trained model's rows have, `normal`
keeps some thousands under top-p 0.9, `flat` nearly all. Before any timing the tokens are the reference's.
"""

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
    "top-k 2000": {"top_k": 2000},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "argmax": {"temperature": 0.0},
}
SPREADS = {"peaked": 6.0, "normal": 3.0, "flat": 0.3}
SIZES = [(1, 4096), (1, 32000), (1, 128256), (16, 128256)]
CASES = [(size, name, "normal") for name in FILTERS for size in SIZES if size[1] > FILTERS[name].get("top_k", 0) * 2]
CASES += [((1, 128256), "top-p 0.9", rows) for rows in ("peaked", "flat")]


def pipeline(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """What people write in PyTorch."""

    def draw(logits: Tensor) -> Tensor:  # (B, V)
        if temperature == 0:
            return logits.argmax(1)
        if min_p:
            probabilities = logits.softmax(1)
            probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(1, keepdim=True), 0.0)
            return probabilities.multinomial(1)[:, 0]
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


def label(value: Any) -> str:
    return value if isinstance(value, str) else f"B={value[0]} V={value[1]}"


@pytest.mark.parametrize(("size", "name", "rows"), CASES, ids=label)
def test_sample(benchmark: Any, size: tuple[int, int], name: str, rows: str) -> None:
    B, V = size
    logits = (SPREADS[rows] * torch.randn(B, V, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    options = FILTERS[name]
    check(logits, options)

    def timed(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return run

    peer = pipeline(**options)
    others = {"floor: one read": timed(lambda: logits.amax(1)), "PyTorch pipeline": timed(lambda: peer(logits))}
    if size == (1, 128256) and rows == "normal":
        compiled = torch.compile(peer)
        others["torch.compile of the pipeline"] = timed(lambda: compiled(logits))
        others["reference"] = timed(lambda: ops.sample(logits, seed=1, impl="reference", **options))
    ours = timed(lambda: ops.sample(logits, seed=1, **options))
    title = f"{label(size)}, {DEVICE}" + ("" if rows == "normal" else f", {rows}")
    growth = (f"B={B}, {rows}, {DEVICE}", "tokens, V", V)
    rounds = 60 if B == 1 else 15
    compare(benchmark, f"sample, {name}", title, ours, others, rounds=rounds, growth=growth, warm=5)


def check(logits: Tensor, options: dict[str, Any]) -> None:
    """Tokens and log-probabilities are the reference's, and greedy is PyTorch's argmax."""
    for seed in range(3):
        got = ops.sample(logits, seed=seed, return_logprobs=True, **options)
        want = ops.sample(logits, seed=seed, return_logprobs=True, impl="reference", **options)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    if options.get("temperature") == 0:
        assert torch.equal(got[0], logits.argmax(1))
