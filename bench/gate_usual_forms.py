"""What GPU samplers usually run: one noise for every token. A yardstick for the gate, in its plainest form."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tests.triton_gate import Compiled, compile_for

BLOCK = 2048


@triton.jit
def gumbel_kernel(logits, best, best_at, seed, temperature, V, BLOCK: tl.constexpr):
    """Grid (B, blocks). The largest of logit / temperature + Gumbel noise in a block, and where."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    noisy = x / temperature - tl.log(-tl.log(tl.maximum(tl.rand(seed, at), 1e-9)))
    largest, index = tl.max(noisy, 0, return_indices=True)
    tl.store(best + row * tl.num_programs(1) + block, largest)
    tl.store(best_at + row * tl.num_programs(1) + block, block * BLOCK + index)


def compile_gumbel(dtype: str, target: str, aligned: bool) -> Compiled:
    signature = {
        "logits": f"*{dtype}",
        "best": "*fp32",
        "best_at": "*i32",
        "seed": "i32",
        "temperature": "fp32",
        "V": "i32",
    }
    return compile_for(
        gumbel_kernel,
        signature,
        {"BLOCK": BLOCK},
        target,
        element_size={"fp32": 4, "bf16": 2}[dtype],
        num_warps=4,
        aligned=aligned,
    )


def run_gumbel(B: int, V: int, dtype: Any) -> None:
    logits = torch.randn(B, V).to(dtype)
    blocks = triton.cdiv(V, BLOCK)
    best, best_at = torch.empty(B, blocks), torch.empty(B, blocks, dtype=torch.int32)
    gumbel_kernel[(B, blocks)](logits, best, best_at, 1, 1.0, V, BLOCK=BLOCK)
