"""Proofs on the user's own model and data: that a resumed run is the same run, and that accumulation is exact.

Both work on the live objects and put everything back, so they can be called before a long run. They compare bits
(resume) or gradients (batch maths) and name the first thing that differs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batch_stream import iter_is_self
from .batches import num_rows, split_rows, tensors_of, to_device
from .callbacks import Hooks
from .checkpointing import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .state import TrainState
from .training_loop import Parts, fit
from .utils import device_of, preserve_rng, seed_all, unwrap


@dataclass(frozen=True)
class Verification:
    """The outcome of a proof; true if it succeeded."""

    ok: bool
    summary: str
    """One sentence: what was compared and what came out."""
    first_difference: str = ""
    """Name of the first thing that differs; empty if nothing does."""

    def __bool__(self) -> bool:
        return self.ok


def verify_resume(state: TrainState, config: TrainConfig, parts: Parts, steps: int) -> Verification:
    """Trains `steps` steps twice from the present state, the second time with a save, a wipe of everything in memory
    and a load half-way, and compares every batch, weight, moment, generator and counter bit for bit.

    Raises:
        ValueError: fewer than 2 steps, or data that can be read only once.
    """
    if steps < 2:
        raise ValueError(f"verify_resume(steps={steps}): at least 2 are needed, one on either side of the save")
    if iter_is_self(state.stream.loader):
        raise ValueError(f"verify_resume needs data that can be read again; {type(state.stream.loader).__name__} is "
                         "used up by reading")
    parts = dataclasses.replace(parts, evaluate=None, save=None, hooks=Hooks())
    before = copy.deepcopy(state.capture())
    seen: list[list[str]] = [[], []]
    try:
        _train(state, config, parts, steps, seen[0])
        straight = copy.deepcopy(state.capture())
        state.restore(before)
        _train(state, config, parts, steps // 2, seen[1])
        with tempfile.TemporaryDirectory() as folder:
            path = save_checkpoint(Path(folder), state.step, state.capture(), metadata={})
            _wipe(state)
            state.restore(load_checkpoint(path))
        _train(state, config, parts, steps - steps // 2, seen[1])
        resumed = copy.deepcopy(state.capture())
    finally:
        state.restore(before)
        state.stop_reason = ""
    for index, (one, other) in enumerate(zip(seen[0], seen[1])):
        if one != other:
            return Verification(False, f"batch {index} after the start differs in the resumed run: the loader does not "
                                       "return to its place", f"batch {index}")
    different = first_difference(straight, resumed)
    if different:
        return Verification(False, f"{different} differs after {steps} steps with a resume in between", different)
    return Verification(True, f"{steps} steps with and without a resume in between: the same {len(seen[0])} batches, "
                              "and weights, optimizer, generators and counters equal bit for bit")


def verify_batch_math(model: nn.Module, loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]], batch: Any, *,
                      autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
                      num_parts: int = 0, tolerance: float = 1e-4) -> Verification:
    """Compares the gradient of one batch with that of the same batch in `num_parts` micro-batches (0: one row each).

    Dropout is off (its noise would differ). A difference above `tolerance`, relative to a parameter's largest
    gradient, is named: such a loss looks across the rows of a batch, or does not return (sum, count).
    """
    batch = to_device(batch, device_of(model))
    rows = num_rows(batch)
    parts = min(num_parts or rows, rows)
    if parts < 2:
        raise ValueError(f"verify_batch_math needs a batch of at least 2 rows to divide; this one has {rows}")
    pieces = split_rows(batch, parts)
    with _undisturbed(model):
        whole, whole_count = _gradient(model, loss_fn, [batch], autocast)
        split, split_count = _gradient(model, loss_fn, pieces, autocast)
    if whole_count != split_count:
        return Verification(False, f"the batch has {whole_count} targets, its {parts} micro-batches {split_count}",
                            "number of targets")
    worst = 0.0
    for name, gradient in whole.items():
        scale = float(gradient.abs().max())
        error = float((gradient - split[name]).abs().max()) / scale if scale else float(split[name].abs().max())
        if not error <= tolerance:
            return Verification(False, f"the gradient of {name!r} differs by {error:.2e} of its largest element "
                                       f"between one batch and {parts} micro-batches (tolerance {tolerance:.0e})", name)
        worst = max(worst, error)
    return Verification(True, f"one batch of {whole_count} targets and {parts} micro-batches give the same gradients: "
                              f"the largest relative difference is {worst:.1e}")


def first_difference(one: Any, other: Any, path: str = "") -> str:
    """Path of the first leaf that is not the same bit for bit, or an empty string."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _bytes_of(one) == _bytes_of(other)
        return "" if same else path
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if list(one) != list(other):
            return f"{path} (keys)"
        pairs: Sequence[tuple[Any, Any, Any]] = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return f"{path} (length)"
        pairs = [(index, a, b) for index, (a, b) in enumerate(zip(one, other))]
    else:
        return "" if one == other or (one != one and other != other) else path
    for key, a, b in pairs:
        different = first_difference(a, b, f"{path}.{key}" if path else str(key))
        if different:
            return different
    return ""


def _train(state: TrainState, config: TrainConfig, parts: Parts, steps: int, seen: list[str]) -> None:
    """`steps` more steps; appends a digest of every batch."""
    def watched(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        digest = hashlib.sha256()
        for tensor in tensors_of(batch):
            digest.update(_bytes_of(tensor))
        seen.append(digest.hexdigest())
        return parts.loss_fn(model, batch)

    # Ended as a signal would end it: a limit would close the log interval, which a killed run does not.
    last = state.step + steps
    limits = dataclasses.replace(config, max_steps=0, max_tokens=0, max_seconds=0.0)
    fit(state, limits, dataclasses.replace(parts, loss_fn=watched, interrupted=lambda: state.step >= last))
    state.stop_reason = ""


def _wipe(state: TrainState) -> None:
    """Makes the memory look like a new process's, so that whatever a checkpoint does not bring back shows.

    Buffers outside the state_dict (rotary tables and the like) stay: a new process has them from the constructor.
    """
    with torch.no_grad():
        for tensor in unwrap(state.model).state_dict().values():
            if isinstance(tensor, Tensor):
                tensor.zero_()
    state.optimizer.state.clear()
    seed_all(987654321)


def _gradient(model: nn.Module, loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]], batches: Sequence[Any],
              autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> tuple[dict[str, Tensor], int]:
    for p in model.parameters():
        p.grad = None
    total = 0
    for batch in batches:
        with autocast():
            loss_sum, num_targets = loss_fn(model, batch)
        loss_sum.backward()  # type: ignore[no-untyped-call]
        total += int(num_targets)
    return {name: p.grad.double() / max(1, total) for name, p in model.named_parameters() if p.grad is not None}, total


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with preserve_rng():
            yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        for module, mode in modes:
            module.training = mode


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
