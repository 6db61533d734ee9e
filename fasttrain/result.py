"""What a run hands back when it ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    status: str
    """completed, stopped (a callback or a non-finite step asked for it) or interrupted (a signal)."""
    step: int
    """Optimizer steps taken, of this and all earlier sessions."""
    tokens_seen: int
    """Target tokens trained on."""
    train_loss: float
    """Mean training loss of the latest log interval, nats per target; NaN before the first."""
    val_loss: float | None
    """Latest validation loss, or None without validation data."""
    best_val_loss: float | None
    """Lowest validation loss."""
    checkpoint: Path | None
    """Newest checkpoint of this run."""
    nonfinite_steps: int
    """Steps whose update was skipped because loss or gradient were not finite."""
    seconds: float
    """Wall-clock time of this session."""
    time_by_phase: dict[str, float]
    """Where it went, in seconds: startup, data, forward_backward, optimizer, eval, save, log, other; adds up."""
    reason: str
    """Why it ended, in words."""
    exit_code: int
    """For sys.exit: 0, or 128 + the number of the signal that interrupted it (130, 143)."""
