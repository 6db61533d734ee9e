"""Learning-rate schedules as pure functions of the step: lr(step) = lr * factor(step).

A linear warm-up from 0, then constant, or down to `min_lr` by a cosine, a line, late (wsd) or as 1/sqrt(step). Any
torch scheduler can be passed to the Trainer instead; this module holds only what the configuration can name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainConfig

_SHAPED = ("cosine", "linear", "wsd")
"""These end at a known step."""


def lr_factor(step: int, *, schedule: str, warmup_steps: int, max_steps: int, floor: float,
              decay_ratio: float = 0.2) -> float:
    """Multiplier of the peak learning rate for the update with 0-based index `step`.

    The warm-up gives (step + 1) / warmup_steps, so the first update already learns. Then, with `floor` = min_lr / lr:
    constant stays 1; cosine and linear fall to `floor` at the last update, max_steps - 1; wsd stays 1 and falls
    linearly to `floor` over the last decay_ratio * max_steps updates; inverse_sqrt is sqrt(w / (step + 1)), w being
    warmup_steps or 1, and not below `floor`. Every later update gets what the last one got.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":
        return max(floor, math.sqrt(max(1, warmup_steps) / (step + 1)))
    start = warmup_steps
    if schedule == "wsd":
        start = max(warmup_steps, max_steps - 1 - math.ceil(decay_ratio * max_steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, max_steps - 1 - start)))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return floor + (1.0 - floor) * shape


def build_scheduler(optimizer: Optimizer, config: TrainConfig, max_steps: int) -> LambdaLR:
    """LambdaLR over `lr_factor`; each parameter group keeps its own peak."""
    named = f"TrainConfig.schedule is {config.schedule!r}, whose shape" if config.schedule in _SHAPED else \
        f"TrainConfig.warmup_steps is {config.warmup_steps}, a share, which" if 0 < config.warmup_steps < 1 else ""
    if named and max_steps < 1:
        raise ValueError(f"{named} needs the number of steps, which cannot be derived; set max_steps, or max_epochs "
                         "with a loader that has a length, or use schedule='constant' or 'inverse_sqrt' with "
                         "warmup_steps")
    warmup_steps = math.ceil(config.warmup_steps * (max_steps if config.warmup_steps < 1 else 1))
    if config.schedule in _SHAPED and warmup_steps >= max_steps:
        raise ValueError(f"TrainConfig.warmup_steps is {warmup_steps}; it must be below the run's {max_steps} steps")

    def shape_for(peak: float) -> Callable[[int], float]:
        floor = min(1.0, config.min_lr / peak) if peak > 0 else 0.0
        return lambda step: lr_factor(step, schedule=config.schedule, warmup_steps=warmup_steps, max_steps=max_steps,
                                      floor=floor, decay_ratio=config.decay_ratio)

    return LambdaLR(optimizer, [shape_for(float(group["lr"])) for group in optimizer.param_groups])
