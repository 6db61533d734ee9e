"""What a loop costs besides the work: a tiny model, 4x16 tokens a step, with clipping, AdamW, progress and metrics.

Microseconds matter here, so the table's milliseconds are small; each contender runs in a process of its own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from bench.bench_training_step import race


@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_loop_overhead(benchmark: Any, model: str) -> None:
    rounds = int(os.environ.get("FASTTRAIN_BENCH_ROUNDS", "3"))
    race("loop overhead, a step of a tiny model", f"{model} 4x16 tokens, {torch.get_num_threads()} threads", rounds,
         ("hand-written", "transformers", "lightning", "fasttrain"), model=model, size="tiny", vocab=64, steps=400,
         skip=100)
    benchmark.pedantic(lambda: None, rounds=1)
