"""How much arithmetic a token needs, and how much of it the device could do: the two halves of a utilisation figure.

Where the device's rate is not known (a GPU that is not in the table) there is no figure, rather than a wrong one. On a
CPU the rate is measured: a float32 matrix product of moderate size, the best of a tenth of a second.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import nn

from .utils import unwrap

# Dense bfloat16/float16 rates from the vendors' data sheets, in FLOP/s.
_GPU_RATES = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "T4": 65e12}
_PROBE_SECONDS = 0.1


def flops_per_token(model: nn.Module, seq_len: int | None) -> float | None:
    """Forward and backward, per token: what the model says itself (`flops_per_token(seq_len)`), else 6 for each weight
    of a matrix that multiplies, embeddings that are only looked up left out, attention's products too (a lower bound).
    None for a model without such a matrix."""
    inner = unwrap(model)
    own = getattr(inner, "flops_per_token", None)
    if callable(own) and seq_len:
        return float(own(seq_len))
    head: Any = getattr(inner, "get_output_embeddings", lambda: None)()
    looked_up = {id(module.weight) for module in inner.modules() if isinstance(module, nn.Embedding)}
    looked_up -= {id(getattr(head, "weight", None))}
    weights = sum(p.numel() for p in inner.parameters() if p.dim() >= 2 and id(p) not in looked_up)
    return 6.0 * weights if weights else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str] | None:
    """(FLOP/s, what that is) of the device in this format; None where it is not known."""
    if device.type == "cpu":
        return (sgemm_flops(), "of sgemm") if dtype == torch.float32 else None
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for part, rate in _GPU_RATES.items():
            if part in name:
                return rate, "MFU"
    return None


@functools.lru_cache(maxsize=4)
def _measured(threads: int) -> float:
    size = 768
    a, b = torch.ones(size, size), torch.ones(size, size)
    best, stop = float("inf"), time.perf_counter() + _PROBE_SECONDS
    while True:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > stop:
            return 2.0 * size**3 / best


def sgemm_flops() -> float:
    """FLOP/s of a float32 matrix product with the present number of threads; measured once."""
    return _measured(torch.get_num_threads())
