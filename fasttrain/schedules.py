"""Learning-rate schedules as pure functions of the step: lr(step) = lr * factor(step).

A linear warm-up from 0, then cosine, linear or constant down to `min_lr`. Any torch scheduler can be passed to the
Trainer instead; this module holds only what the configuration can name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import TrainConfig


def lr_factor(step: int, *, schedule: str, warmup_steps: int, max_steps: int, floor: float) -> float:
    """Multiplier of the peak learning rate for the update with 0-based index `step`.

    The warm-up gives (step + 1) / warmup_steps, so the first update already learns; the last update, max_steps - 1,
    gets exactly `floor` (min_lr / lr) under cosine and linear, and every later one too.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return floor + (1.0 - floor) * shape


def build_scheduler(optimizer: Optimizer, config: TrainConfig, max_steps: int) -> LambdaLR:
    """LambdaLR over `lr_factor`; each parameter group keeps its own peak."""
    shaped = config.schedule != "constant"
    if shaped and max_steps < 1:
        raise ValueError(f"TrainConfig.schedule is {config.schedule!r}, whose shape needs the number of steps, which "
                         "cannot be derived; set max_steps, or max_epochs with a loader that has a length, or use "
                         "schedule='constant'")
    if shaped and config.warmup_steps >= max_steps:
        raise ValueError(f"TrainConfig.warmup_steps is {config.warmup_steps}; it must be below the run's "
                         f"{max_steps} steps")

    def shape_for(peak: float) -> Callable[[int], float]:
        floor = min(1.0, config.min_lr / peak) if peak > 0 else 0.0
        return lambda step: lr_factor(step, schedule=config.schedule, warmup_steps=config.warmup_steps,
                                      max_steps=max_steps, floor=floor)

    return LambdaLR(optimizer, [shape_for(float(group["lr"])) for group in optimizer.param_groups])
