"""What a changed config means for a run that is resumed: each field is taken, kept, or refused, by the rule below.

The number of ranks is no field and may change at every resume: the samples go on in their order, and the generators of
ranks from 1 on (dropout) then start anew from (seed, step, rank); as many ranks as wrote the checkpoint take theirs. A
step that was left open is finished with whole turns of the new ranks.

taken: the new value holds from the next step on. kept: the checkpoint's value holds, whatever the config says now.
refused: the run does not start, because what is stored cannot become what is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import TrainConfig, to_dict

_LIMITS = ("max_steps", "max_epochs", "max_tokens", "max_seconds", "max_nonfinite_in_a_row", "max_save_failures")
_INTERVALS = ("log_every_steps", "eval_every_steps", "eval_at_start", "eval_max_batches", "save_every_steps",
              "every_tokens", "keep_last", "keep_best", "keep_every_steps", "nonfinite", "preflight")
_BATCH = ("grad_accum_steps", "global_batch_size", "global_batch_tokens")
_SCHEDULE = ("lr", "min_lr", "warmup_steps", "schedule", "decay_ratio")
_MATHS = ("max_grad_norm", "weight_decay", "betas", "precision", "compile", "optimize", "activation_checkpointing",
          "deterministic", "parallel")

RULES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(_LIMITS, ("taken", "limits count from the run's first step")),
    **dict.fromkeys(_INTERVALS, ("taken", "it changes no weight")),
    **dict.fromkeys(_BATCH, ("taken", "the order of the samples stays")),
    **dict.fromkeys(_SCHEDULE, ("taken", "the next step has the new schedule's rate at its place")),
    **dict.fromkeys(_MATHS, ("taken", "from the next step on")),
    "seed": ("kept", "data order, dropout and rounding go on from the checkpoint's generators"),
    "optimizer_state_dtype": ("refused", "the moments in the checkpoint are of the old type; set it back, or start a "
                                         "run of its own from the weights with Trainer.load_checkpoint"),
}
"""Field of TrainConfig -> (taken | kept | refused, why)."""

_OF_THE_OPTIMIZER = ("lr", "weight_decay", "betas", "optimizer_state_dtype")


def compare_configs(saved: Mapping[str, Any], config: TrainConfig, *, own_optimizer: bool = False) -> list[str]:
    """'lr: 0.001 -> 0.0005 (taken: ...)' for every field that differs from the checkpoint's.

    Args:
        saved: the config in the checkpoint's metadata; fields that it lacks were not known then.
        own_optimizer: the user passed an optimizer, so the fields that would build one have no effect.

    Raises:
        ValueError: a field whose change is refused.
    """
    lines = []
    for name, value in to_dict(config).items():
        if name not in saved or saved[name] == value:
            continue
        rule, why = RULES[name]
        if own_optimizer and name in _OF_THE_OPTIMIZER:
            rule, why = "kept", "the optimizer was passed to the Trainer"
        if rule == "refused":
            raise ValueError(f"TrainConfig.{name} is {value!r}, and the checkpoint was trained with {saved[name]!r}: "
                             f"{why}")
        lines.append(f"{name}: {saved[name]!r} -> {value!r} ({rule}: {why})")
    return lines
