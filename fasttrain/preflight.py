"""Will this run end well? Answered in seconds, before step 1, on the user's own model, data and disk.

The longest of the first batches forward and backward, one evaluation batch, one real checkpoint written and read back,
room on the disk for all that will be kept, limits that end and intervals that fire; and from the times taken, how long
the run will be. Everything is put back afterwards: a run with preflight computes the same bits as one without.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .assembly import check_limits, planned_steps, tokens_per_step
from .batch_stream import iter_is_self, peek_batches
from .batches import most_elements, tensors_of, to_device
from .checkpointing import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .evaluation import EvalResult
from .state import TrainState
from .storage import free_bytes
from .training_loop import Parts
from .utils import device_of, format_bytes, format_duration, read_scalar, undisturbed

_BATCHES_LOOKED_AT = 8
"""How many of the first batches the longest is taken from, where lengths may differ."""


@dataclass(frozen=True)
class PreflightReport:
    """What was found. `warnings` are things that will not stop the run but are probably not meant."""

    loss: float | None
    """Mean loss of the longest of the first training batches; None if the data can be read only once."""
    longest: tuple[int, ...] | None
    """Shape of that batch's largest tensor."""
    step_seconds: float | None
    """Time of one optimizer step's forward and backward passes (the first call is slower than the rest)."""
    eval_seconds: float | None
    """Time of one evaluation: that of one batch times their number; None where that is not known."""
    save_seconds: float | None
    """Time of one checkpoint of the full size, from one that was written; None without a checkpoint_dir."""
    load_seconds: float | None
    """Time of reading one back and verifying it."""
    projected_seconds: float | None
    """Planned steps, evaluations and checkpoints at those times."""
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
        if self.save_seconds is not None and self.load_seconds is not None:
            rows.append(("written and read", f"{format_duration(self.save_seconds)} to save one, "
                                             f"{format_duration(self.load_seconds)} to resume"))
        if self.loss is not None and self.step_seconds is not None:
            shape = "x".join(map(str, self.longest or ()))
            rows.insert(0, ("first batch", f"{shape}, loss {self.loss:.4f}, {format_duration(self.step_seconds)} a "
                                           "step"))
        if self.projected_seconds is not None:
            rows.append(("projected", f"about {format_duration(self.projected_seconds)}, evaluation and saving "
                                      "included"))
        return rows + [("warning", warning) for warning in self.warnings]


def preflight(state: TrainState, config: TrainConfig, parts: Parts, *, checkpoint_dir: Path | None,
              evaluate_one: Callable[[], EvalResult] | None, num_eval_batches: int | None = None) -> PreflightReport:
    """Checks a run that is about to start. `config` has its accumulation resolved.

    Args:
        evaluate_one: scores one validation batch (of each set); None without validation data.
        num_eval_batches: how many such calls an evaluation amounts to, where that is known.

    Raises:
        ValueError: the run cannot end well: no limit, an interval that never fires, no batch, no room on the disk, a
            directory that cannot be written. Errors of the model on the first batch (shapes, a label outside the
            vocabulary) come as they are.
    """
    check_limits(config)
    loader = state.stream.loader
    steps = planned_steps(config, loader, state.team.world_size)
    check_intervals(config, loader, has_val=evaluate_one is not None, has_dir=checkpoint_dir is not None,
                    world_size=state.team.world_size)
    warnings: list[str] = []
    loss, seconds, longest = None, None, None
    if not iter_is_self(loader):
        loss, seconds, longest = try_batch(state, config, parts, loader)
        if not math.isfinite(loss):
            warnings.append(f"the loss of the first training batch is {loss}")
    eval_seconds = None if evaluate_one is None else _timed(evaluate_one) * (num_eval_batches or math.nan)
    size = checkpoint_bytes(state, config)
    copies = (config.keep_last + config.keep_best + 1) if config.keep_last else 1
    free = None if checkpoint_dir is None else _check_disk(checkpoint_dir, size, copies * size)
    saves = config.save_every_steps or "save" in config.every_tokens
    if checkpoint_dir is not None and not config.keep_last and saves:
        warnings.append("keep_last=0 keeps every checkpoint: the room they take is not bounded")
    saving = None if checkpoint_dir is None or not state.team.is_alone else try_checkpoint(state, checkpoint_dir, size)
    save_seconds, load_seconds = saving or (None, None)
    left = None if steps is None or seconds is None else _projected(
        config, max(0, steps - state.step), seconds, eval_seconds or 0.0, save_seconds or 0.0,
        tokens_per_step(config, loader, state.team.world_size) or 0)
    known = eval_seconds if eval_seconds is not None and math.isfinite(eval_seconds) else None
    return PreflightReport(loss, longest, seconds, known, save_seconds, load_seconds, left, size, copies * size, free,
                           tuple(warnings))


def try_checkpoint(state: TrainState, checkpoint_dir: Path, full_bytes: int) -> tuple[float, float]:
    """(seconds to write a checkpoint of `full_bytes`, seconds to read and verify it), from a real one of what there is
    now (before the first step the optimizer has no state yet), which is removed again."""
    for orphan in checkpoint_dir.glob(".preflight-*"):  # of a killed process: the directory is ours alone
        shutil.rmtree(orphan, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=checkpoint_dir) as folder:
        start = time.perf_counter()
        path = save_checkpoint(Path(folder), state.step, state.capture(), metadata={})
        written = time.perf_counter()
        load_checkpoint(path)
        read = time.perf_counter()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    scale = max(1.0, full_bytes / max(size, 1 << 20))  # below a megabyte the time is not that of bytes
    return (written - start) * scale, (read - written) * scale


def _projected(config: TrainConfig, steps: int, step: float, evaluation: float, save: float, tokens: int) -> float:
    """Seconds of `steps` steps of `tokens` with their evaluations and checkpoints (each once more at the end)."""
    def times(what: str) -> int:
        every = getattr(config, f"{what}_every_steps")
        if what in config.every_tokens:
            return steps * tokens // config.every_tokens[what] + 1
        return steps // every + 1 if every else 1

    evaluations, saves = times("eval"), times("save")
    return steps * step + saves * save + (evaluations * evaluation if math.isfinite(evaluation) else 0.0)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def check_intervals(config: TrainConfig, loader: Iterable[Any], *, has_val: bool, has_dir: bool,
                    world_size: int = 1) -> None:
    """Refuses an interval that would never fire: what was asked for would silently not happen. A default that is longer
    than the run is no mistake of anybody's; a limit in tokens only bounds the steps from below."""
    steps = planned_steps(dataclasses.replace(config, max_tokens=0), loader, world_size)
    tokens = _most_tokens(config, loader, steps, world_size)
    needs = {"eval_every_steps": ("a val_dataloader", has_val), "save_every_steps": ("a checkpoint_dir", has_dir),
             "keep_every_steps": ("a checkpoint_dir", has_dir), "log_every_steps": ("", True)}
    defaults = {entry.name: entry.default for entry in dataclasses.fields(TrainConfig)}
    for name, (need, there) in needs.items():
        every, most, unit = getattr(config, name), steps, "steps"
        what = name.removesuffix("_every_steps")
        if what in config.every_tokens:
            every, most, unit, name = config.every_tokens[what], tokens, "tokens", f"every_tokens[{what!r}]"
        elif every == defaults[name]:
            continue
        if not there:
            raise ValueError(f"{name}={every} never fires: there is no {need[2:]}; pass {need} to the Trainer, or "
                             f"leave {name} out")
        if most is not None and every > most:
            raise ValueError(f"{name}={every} never fires: the run has {most} {unit}; choose at most that, or leave it "
                             "out (the end of a run is logged, evaluated and saved anyway)")


def _most_tokens(config: TrainConfig, loader: Iterable[Any], steps: int | None, world_size: int) -> int | None:
    """Target tokens after which the run has ended, where that is known: of full steps, or the limit."""
    each = tokens_per_step(config, loader, world_size)
    bounds = [steps * each] if steps and each else []
    return min([*bounds, *([config.max_tokens] if config.max_tokens else [])], default=None)


def try_batch(state: TrainState, config: TrainConfig, parts: Parts,
              loader: Iterable[Any]) -> tuple[float, float, tuple[int, ...]]:
    """(mean loss of the longest of the first batches, seconds of a step's forward and backward, that batch's shape),
    leaving gradients, buffers (a batch norm's averages), generators and the data position as they were."""
    model = state.model
    fixed = getattr(getattr(loader, "dataset", None), "seq_len", None) is not None
    batches = peek_batches(loader, 1 if fixed else _BATCHES_LOOKED_AT)
    if not batches:
        raise ValueError(f"train_dataloader ({type(loader).__name__}) yields no batch; check the dataset's length "
                         "against batch_size and drop_last")
    batch = max(batches, key=most_elements)
    largest = max(tensors_of(batch), key=Tensor.numel, default=None)
    with undisturbed(model):
        model.train()
        start = time.perf_counter()
        with parts.autocast():
            loss_sum, num_targets = parts.loss_fn(model, to_device(batch, device_of(model)))
        _check_loss(loss_sum, num_targets)
        loss_sum.backward()  # type: ignore[no-untyped-call]
        loss = read_scalar(loss_sum.detach()) / max(1, int(read_scalar(num_targets)))
        seconds = (time.perf_counter() - start) * config.grad_accum_steps
    return loss, seconds, () if largest is None else tuple(largest.shape)


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
