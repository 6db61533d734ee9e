"""The parameters of ops.sample: what a caller may pass, checked, and what the specification computes from it.

Each is a number or a tensor (B,) with one for each row. Looking at a tensor's values waits for its device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

ONE = 1 << 40
"""Mass of the likeliest token."""


class RowParameters(NamedTuple):
    """What `sample` was asked for, per row and in the form the specification uses; all (B,)."""

    scale: Tensor  # float32, c of step 1
    top_k: Tensor  # int64, 0: off
    top_p: Tensor  # float64, 1: off
    min_mass: Tensor  # int64, 0: off
    seed: Tensor  # int64
    position: Tensor  # int64


def row_parameters(batch: int, device: torch.device, given: dict[str, Any]) -> RowParameters:
    """Checks the parameters and makes (B,) tensors of them, expanded and not copied where one number is for all."""

    def row(name: str, low: float, high: float, rule: str, *, whole: bool = False) -> Tensor:
        value = given[name]
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.size(0) != batch):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; it must be a number or ({batch},), one per row of logits"
            )
        if tensor.is_complex() or tensor.dtype == torch.bool or (whole and tensor.is_floating_point()):
            raise ValueError(f"{name} is {value!r}; it must be a {'whole ' if whole else ''}number")
        tensor = tensor.long() if whole else tensor.float().double()
        bad = ~((tensor >= low) & (tensor <= high))
        if bool(bad.any()):
            raise ValueError(f"{name} is {tensor[bad].flatten()[0].item()!r}; it must {rule}")
        return tensor.to(device)

    temperature = row("temperature", 0.0, 3.4028234663852886e38, "be finite and not negative (0 takes the likeliest)")
    top_k = row("top_k", 0, 2**63 - 1, "not be negative (0 keeps all)", whole=True)
    top_p = row("top_p", 0.0, 1.0, "lie in [0, 1] (1 keeps all)")
    min_p = row("min_p", 0.0, 1.0, "lie in [0, 1] (0 keeps all)")
    seed = row("seed", 0, 2**63 - 1, "not be negative", whole=True)
    position = row("position", 0, 2**63 - 1, "not be negative", whole=True)
    if not isinstance(given["temperature"], Tensor) and given["temperature"] > 0 and not bool(temperature.any()):
        raise ValueError(f"temperature is {given['temperature']!r}, which is 0 in float32; pass 0 if that is meant")
    greedy = temperature == 0.0
    scale = (math.log2(math.e) / torch.where(greedy, 1.0, temperature)).clamp(2.0**-64, 2.0**64).float()
    min_mass = (min_p * float(ONE)).ceil().long()
    rows = (scale, torch.where(greedy, 1, top_k), top_p, min_mass, seed, position)
    return RowParameters(*(tensor.expand(batch) for tensor in rows))
