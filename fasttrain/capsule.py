"""Capsules: what made a step non-finite, written beside the run so that it can be looked at and computed again.

A capsule is a checkpoint directory `nonfinite/step-...` of three trees: `model` (the weights before the refused
update), `batches` (the step's micro-batches as the loss saw them) and `generators` (the random states before each). Its
metadata name where the data came from and the first module whose output was not finite. `replay_capsule` loads it into
a model and computes the step again, to the same bits on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .callbacks import Callback, Run
from .checkpointing import load_checkpoint, save_checkpoint
from .losses import batch_loss
from .state import Drawn, TrainState, load_model
from .utils import device_of, set_draw_state, undisturbed, unwrap


@dataclass(frozen=True)
class Finding:
    """Where a step stopped being finite."""

    micro_batch: int | None
    """Index of the first micro-batch whose loss or gradient is not finite; None: all are finite."""
    loss: float
    """Its loss sum (the last micro-batch's if all are finite)."""
    module: str
    """First module, in the order in which outputs are complete, whose output is not finite; empty: none is."""
    gradients: tuple[str, ...]
    """Parameters whose gradient is not finite, the first few."""
    weights: tuple[str, ...]
    """Parameters that were not finite before the step, the first few."""

    def __str__(self) -> str:
        if self.micro_batch is None:
            return "computed again, every micro-batch is finite: their sum, or something that does not repeat"
        where = f"the output of {self.module!r}" if self.module else \
            f"the gradient of {self.gradients[0]!r}" if self.gradients else "the loss, after finite modules"
        weights = f"; weights already not finite: {', '.join(self.weights)}" if self.weights else ""
        return f"micro-batch {self.micro_batch}: first in {where}{weights}"


class NonfiniteRecorder(Callback):
    """Writes a capsule for each of the first `max_capsules` non-finite steps of a run."""

    observer = True

    def __init__(self, *, max_capsules: int = 3) -> None:
        if max_capsules < 1:
            raise ValueError(f"NonfiniteRecorder: max_capsules is {max_capsules}; it must be at least 1")
        self.max_capsules, self.written = max_capsules, 0
        self._run: Run | None = None

    def on_train_start(self, state: TrainState, run: Run) -> None:
        self._run = run

    def on_nonfinite(self, state: TrainState) -> None:
        run = self._run
        overflow = state.scaler is not None  # float16 overflows are how the scaler finds its scale
        if run is None or run.directory is None or overflow or self.written >= self.max_capsules:
            return
        self.written += 1
        finding = find_nonfinite(state.model, run.loss_fn or batch_loss, state.judged)
        trees = {
            "model": unwrap(state.model).state_dict(),
            "batches": [drawn.batch for drawn in state.judged],
            "generators": [list(drawn.generators) for drawn in state.judged],
        }
        newest = run.checkpoint()
        details: dict[str, Any] = {
            "finding": str(finding), **asdict(finding), "epoch": state.stream.epoch,
            "batches_up_to": state.stream.batch, "num_micro_batches": len(state.judged),
            "grad_norm": repr(state.counters.last_grad_norm), "loss": repr(finding.loss),
            "newest_checkpoint": None if newest is None else newest.name,
        }
        details.update({key: list(details[key]) for key in ("gradients", "weights")})
        path = save_checkpoint(run.directory / "nonfinite", state.step, trees, metadata=details)
        run.log(f"non-finite step {state.step}: {finding}; capsule in {path}")
        run.report("nonfinite_capsule", {"capsule": str(path.relative_to(run.directory)), "finding": str(finding)})

    def state_dict(self) -> dict[str, Any]:
        return {"written": self.written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.written = state["written"]


def replay_capsule(path: str | Path, model: nn.Module,
                   loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] = batch_loss) -> Finding:
    """Computes a capsule's step again. `model` gets the capsule's weights and keeps them; nothing else of it changes.

    Raises:
        ValueError: the capsule is damaged, or belongs to another model.
    """
    trees = load_checkpoint(Path(path))
    load_model(unwrap(model), trees["model"])
    generators = [(states[0], states[1]) for states in trees["generators"]]
    return find_nonfinite(model, loss_fn, [Drawn(*each) for each in zip(trees["batches"], generators)])


def find_nonfinite(model: nn.Module, loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
                   drawn: Sequence[Drawn]) -> Finding:
    """Computes micro-batches again, each from its own random state, until one is not finite. Leaves no trace."""
    weights = _not_finite((name, p) for name, p in model.named_parameters())
    device, loss = device_of(model), float("nan")
    with undisturbed(model):
        for index, each in enumerate(drawn):
            set_draw_state(each.generators, device)
            for p in model.parameters():
                p.grad = None
            with _watching_outputs(unwrap(model)) as first:
                loss_sum, _ = loss_fn(model, each.batch)
            loss = float(loss_sum.detach())
            loss_sum.backward()  # type: ignore[no-untyped-call]
            gradients = _not_finite((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
            if first or gradients or not torch.isfinite(loss_sum):
                return Finding(index, loss, first[0] if first else "", gradients, weights)
    return Finding(None, loss, "", (), weights)


def _not_finite(named: Any, most: int = 5) -> tuple[str, ...]:
    found = []
    for name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):
            found.append(name)
            if len(found) == most:
                break
    return tuple(found)


@contextlib.contextmanager
def _watching_outputs(model: nn.Module) -> Iterator[list[str]]:
    first: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            if not first and any(not bool(torch.isfinite(t).all()) for t in _floating(output)):
                first.append(name or type(module).__name__)
        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield first
    finally:
        for handle in handles:
            handle.remove()


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floating(value)
