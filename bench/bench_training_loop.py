"""What a loop costs besides the work: a tiny model, 4x16 tokens a step, with clipping, AdamW, progress and metrics.

Microseconds matter here, so the table's milliseconds are small; each contender runs in a process of its own. A second
group of rows has the overhead alone: the step without the time of a bare forward and backward pass.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch

from bench.bench_training_step import race
from bench.common import ROWS


@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_loop_overhead(benchmark: Any, model: str) -> None:
    rounds = int(os.environ.get("FASTTRAIN_BENCH_ROUNDS", "3"))
    label = f"{model} 4x16 tokens, {torch.get_num_threads()} threads"
    rows = race("loop, a step of a tiny model", label, rounds,
                ("bare", "hand-written", "transformers", "lightning", "fasttrain"), model=model, size="tiny", vocab=64,
                steps=400, skip=100)
    bare = rows.pop("bare").p50_ms
    ours = rows["fasttrain"].p50_ms - bare
    for key, row in rows.items():
        overhead = row.p50_ms - bare
        ROWS.append(dataclasses.replace(
            row, benchmark="loop overhead, that step without forward and backward", size=label, p50_ms=overhead,
            p20_ms=row.p20_ms - bare, p80_ms=row.p80_ms - bare, times_ours=overhead / ours))
        print(f"{key}: overhead {1e3 * overhead:.0f} us a step, {overhead / ours:.2f}x fasttrain's")
    benchmark.pedantic(lambda: None, rounds=1)
