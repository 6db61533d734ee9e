"""Will this run end well? Answered in seconds, before step 1, on the user's own model, data and disk.

One real batch forward and backward, one evaluation batch, room for the checkpoints, limits that end and intervals that
fire. Everything is put back afterwards: a run with preflight computes the same bits as one without.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .assembly import check_limits, planned_steps
from .batch_stream import iter_is_self, peek_batches
from .batches import to_device
from .config import TrainConfig
from .evaluation import EvalResult
from .state import TrainState
from .storage import free_bytes
from .training_loop import Parts
from .utils import device_of, format_bytes, format_duration, preserve_rng, read_scalar


@dataclass(frozen=True)
class PreflightReport:
    """What was found. `warnings` are things that will not stop the run but are probably not meant."""

    loss: float | None
    """Mean loss of the first training batch; None if the data can be read only once."""
    step_seconds: float | None
    """Time of one optimizer step's forward and backward passes (the first call is slower than the rest)."""
    projected_seconds: float | None
    """step_seconds times the planned steps."""
    checkpoint_bytes: int
    """Estimated size of one checkpoint."""
    retained_bytes: int
    """Estimated most room that checkpoints take together, the one being written included."""
    free_bytes: int | None
    """Room in checkpoint_dir's file system; None without one."""
    warnings: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """For `progress.print_report`."""
        rows = [("checkpoint", f"about {format_bytes(self.checkpoint_bytes)}, at most "
                               f"{format_bytes(self.retained_bytes)} kept")]
        if self.loss is not None and self.step_seconds is not None:
            rows.insert(0, ("first batch", f"loss {self.loss:.4f}, {format_duration(self.step_seconds)} a step"))
        if self.projected_seconds is not None:
            rows.append(("projected", f"about {format_duration(self.projected_seconds)} without evaluation and saving"))
        return rows + [("warning", warning) for warning in self.warnings]


def preflight(state: TrainState, config: TrainConfig, parts: Parts, *, checkpoint_dir: Path | None,
              evaluate_one: Callable[[], EvalResult] | None) -> PreflightReport:
    """Checks a run that is about to start. `config` has its accumulation resolved.

    Args:
        evaluate_one: scores one validation batch; None without validation data.

    Raises:
        ValueError: the run cannot end well: no limit, no batch, no room on the disk, a directory that cannot be
            written. Errors of the model on the first batch (shapes, a label outside the vocabulary) come as they are.
    """
    check_limits(config)
    loader = state.stream.loader
    steps = planned_steps(config, loader)
    warnings = list(interval_warnings(config, steps, has_val=evaluate_one is not None,
                                      has_dir=checkpoint_dir is not None))
    loss, seconds = None, None
    if not iter_is_self(loader):
        loss, seconds = try_batch(state, config, parts, loader)
        if not math.isfinite(loss):
            warnings.append(f"the loss of the first training batch is {loss}")
    if evaluate_one is not None:
        evaluate_one()
    size = checkpoint_bytes(state, config)
    copies = (config.keep_last + config.keep_best + 1) if config.keep_last else 1
    free = None if checkpoint_dir is None else _check_disk(checkpoint_dir, size, copies * size)
    if checkpoint_dir is not None and not config.keep_last and config.save_every_steps:
        warnings.append("keep_last=0 keeps every checkpoint: the room they take is not bounded")
    left = None if steps is None or seconds is None else seconds * max(0, steps - state.step)
    return PreflightReport(loss, seconds, left, size, copies * size, free, tuple(warnings))


def interval_warnings(config: TrainConfig, steps: int | None, *, has_val: bool, has_dir: bool) -> Iterable[str]:
    """Intervals that will never fire, in words."""
    if config.eval_every_steps and not has_val:
        yield f"eval_every_steps={config.eval_every_steps} never fires: there is no val_dataloader"
    if config.save_every_steps and not has_dir:
        yield f"save_every_steps={config.save_every_steps} never fires: there is no checkpoint_dir"
    for name in ("log_every_steps", "eval_every_steps", "save_every_steps"):
        every = getattr(config, name)
        if steps is not None and every > steps:
            yield f"{name}={every} never fires: the run has {steps} steps"


def try_batch(state: TrainState, config: TrainConfig, parts: Parts, loader: Iterable[Any]) -> tuple[float, float]:
    """(mean loss of the first batch, seconds of a step's forward and backward), leaving gradients, buffers (a batch
    norm's averages), generators and the data position as they were."""
    model = state.model
    batches = peek_batches(loader, 1)
    if not batches:
        raise ValueError(f"train_dataloader ({type(loader).__name__}) yields no batch; check the dataset's length "
                         "against batch_size and drop_last")
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for p, _ in gradients:
            p.grad = None
        model.train()
        start = time.perf_counter()
        with preserve_rng():
            with parts.autocast():
                loss_sum, num_targets = parts.loss_fn(model, to_device(batches[0], device_of(model)))
            _check_loss(loss_sum, num_targets)
            loss_sum.backward()  # type: ignore[no-untyped-call]
            loss = read_scalar(loss_sum.detach()) / max(1, int(read_scalar(num_targets)))
        return loss, (time.perf_counter() - start) * config.grad_accum_steps
    finally:
        _put_back(gradients, buffers, modes)


def checkpoint_bytes(state: TrainState, config: TrainConfig) -> int:
    """Weights, two moments of the trained ones, their gradients if a window can be open, and the buffers."""
    weights = sum(p.numel() * p.element_size() for p in state.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in state.model.parameters() if p.requires_grad)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in state.model.buffers())
    return weights + buffers + (3 if config.grad_accum_steps > 1 else 2) * trained


def _check_loss(loss_sum: Any, num_targets: Any) -> None:
    scalars = isinstance(loss_sum, Tensor) and loss_sum.dim() == 0 and isinstance(num_targets, Tensor) \
        and num_targets.dim() == 0
    if not scalars:
        raise ValueError(f"loss_fn returned ({type(loss_sum).__name__}, {type(num_targets).__name__}); it must return "
                         "two 0-d tensors: the sum of the losses and the number of targets")
    if not loss_sum.requires_grad:
        raise ValueError("the loss does not depend on any trainable parameter (it has no gradient); check the model's "
                         "forward for .detach() or no_grad, and requires_grad of its parameters")


def _check_disk(directory: Path, one: int, retained: int) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"checkpoint_dir {str(directory)!r} cannot be written ({error}); choose another") from error
    free = free_bytes(directory)
    if retained > free:
        raise ValueError(f"checkpoint_dir {str(directory)!r} has {format_bytes(free)} free, but the run keeps up to "
                         f"{format_bytes(retained)} of checkpoints of {format_bytes(one)} each; lower keep_last or "
                         "keep_best, or choose another disk")
    return free


def _put_back(gradients: list[tuple[nn.Parameter, Tensor | None]], buffers: list[tuple[Tensor, Tensor]],
              modes: list[tuple[nn.Module, bool]]) -> None:
    for p, gradient in gradients:
        p.grad = gradient
    for buffer, value in buffers:
        buffer.copy_(value)
    for module, mode in modes:
        module.training = mode
