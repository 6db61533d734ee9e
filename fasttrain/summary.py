"""What is said of a run before its first step and after its last: rows of name and value, and the TrainResult."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import assembly
from .amp import AmpPolicy
from .config import TrainConfig
from .optimizations import Optimization
from .preflight import PreflightReport
from .progress import time_report
from .result import TrainResult
from .state import TrainState
from .utils import device_of, format_duration


def startup_rows(state: TrainState, config: TrainConfig, amp: AmpPolicy, resumed_from: Path | None,
                 optimizations: Sequence[Optimization], checked: PreflightReport | None) -> list[tuple[str, str]]:
    """What will run, in which precision, on what, and why. `config` has its accumulation resolved."""
    loader = state.stream.loader
    ranks = state.team.world_size
    steps, tokens = assembly.planned_steps(config, loader, ranks), assembly.tokens_per_step(config, loader, ranks)
    return [
        ("device", str(device_of(state.model))),
        ("precision", f"{str(amp.dtype).removeprefix('torch.')}: {amp.reason}"),
        ("parameters", assembly.describe_parameters(state.model)),
        ("step", f"{config.grad_accum_steps} micro-batches" + (f" on each of {ranks} ranks" if ranks > 1 else "")
         + (f", {tokens:,} tokens" if tokens else "")),
        ("steps", f"{steps:,}" if steps else "until the data, max_tokens or max_seconds end the run"),
        ("optimizer", type(state.optimizer).__name__),
        ("resumed from", str(resumed_from or "nothing: a fresh run")),
        *((item.name, f"{'on' if item.on else 'off'}: {item.reason}") for item in optimizations),
        *(checked.rows() if checked is not None else ()),
    ]


def result_of(state: TrainState, status: str, reason: str, checkpoint: Path | None,
              seconds_by_phase: Mapping[str, float], exit_code: int) -> TrainResult:
    """The run's outcome in numbers."""
    counters = state.counters
    evaluated = counters.last_eval_step >= 0
    return TrainResult(
        status=status, step=state.step, tokens_seen=counters.tokens_seen, train_loss=counters.train_loss,
        val_loss=counters.last_val_loss if evaluated else None,
        best_val_loss=counters.best_val_loss if evaluated else None, checkpoint=checkpoint,
        nonfinite_steps=counters.nonfinite_steps, seconds=sum(seconds_by_phase.values()),
        time_by_phase=dict(seconds_by_phase), reason=reason,
        exit_code=exit_code)


def end_rows(result: TrainResult, signal_served: str = "") -> list[tuple[str, str]]:
    """Where the time went, in shares that add up, with a verdict; and where the checkpoint lies."""
    served = [("signal", signal_served)] if signal_served else []
    return [*served, ("time", format_duration(result.seconds)), *time_report(result.time_by_phase),
            ("checkpoint", str(result.checkpoint or "none"))]
