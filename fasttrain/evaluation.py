"""Exact evaluation: the sum of all target losses over the number of targets, the same for any batch size.

Nothing is kept but four sums on the device, so memory does not grow with the data. The model, the global random
generators and the loader's position are left as they were: an evaluation in the middle of a training run changes no
bit of it. Deliberately left out: generation metrics and task benchmarks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .losses import IGNORE, LossFunction, call_model, flat_logits, split_batch
from .ops import cross_entropy
from .utils import Interrupted, device_of, preserve_rng, seed_all


@dataclass(frozen=True)
class EvalResult:
    """What a model scores on a data set."""

    loss: float
    """Mean negative log-likelihood of a target, nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """loss / ln 2 / bytes per token; None where the data does not say how many bytes a token stands for."""
    accuracy: float | None
    """Share of targets that are the model's first choice; None if the model returns no logits."""
    num_targets: int
    """Targets counted."""


_END: Any = object()


class EvaluationInterrupted(Interrupted):
    """A signal came during an evaluation; there is no result."""


def evaluate(model: nn.Module, dataloader: Iterable[Any], *, loss_fn: LossFunction | None = None, max_batches: int = 0,
             device: torch.device | str | None = None,
             autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
             bytes_per_token: float | None = None, interrupted: Callable[[], bool] | None = None,
             waiting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext) -> EvalResult:
    """Scores `model` on every batch of `dataloader` (the first `max_batches` if positive).

    Args:
        loss_fn: (model, batch) -> (loss_sum, num_targets) as in training; None: next-token cross-entropy.
        device: where the batches go (default: where the model is).
        autocast: a function that returns the context for the forward pass.
        bytes_per_token: for bits_per_byte (default: `dataloader.dataset.bytes_per_token`, if there is one).
        interrupted: asked after each batch; true raises EvaluationInterrupted.
        waiting: a context around each wait for a batch, such as `Interruption.breakable`.

    A loader with `from_start()` is read from there, one with `set_epoch` from epoch 0, and one that shuffles draws
    from a fixed seed, so two evaluations see the same batches.

    Raises:
        ValueError: no batch, or no target in any.
    """
    place = torch.device(device) if device is not None else device_of(model)
    context = autocast if autocast is not None else contextlib.nullcontext
    sums = _Sums(place)
    with preserve_rng(), _eval_mode(model), _position_kept(dataloader), torch.no_grad():
        seed_all(0)
        batches = 0
        with _from_start(dataloader) as source:
            iterator = iter(source)
            while True:
                with waiting():
                    batch = next(iterator, _END)
                if batch is _END:
                    break
                with context():
                    sums.add(model, to_device(batch, place), loss_fn)
                batches += 1
                if batches == max_batches:
                    break
                if interrupted is not None and interrupted():
                    raise EvaluationInterrupted
        if not batches:
            raise ValueError(f"the evaluation data ({type(dataloader).__name__}) yields no batch; check its length "
                             "against batch_size and drop_last")
    if bytes_per_token is None:
        bytes_per_token = getattr(getattr(dataloader, "dataset", None), "bytes_per_token", None)
    return sums.result(bytes_per_token)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`, without waiting for the copy; containers keep their kind."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, dict) or hasattr(batch, "items"):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch


class _Sums:
    """Running sums, on the device and in float64 so that the order of batches does not show in the result."""

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.targets = torch.zeros((), dtype=torch.int64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.has_accuracy = True

    def add(self, model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> None:
        if loss_fn is not None:
            loss_sum, num_targets = loss_fn(model, batch)
            self.loss += loss_sum
            self.targets += num_targets
            self.has_accuracy = False
            return
        parts = split_batch(batch)
        targets = parts.targets.reshape(-1)  # (N,)
        logits, loss = call_model(model, parts)
        num_targets = (targets != IGNORE).sum()
        self.targets += num_targets
        if loss is not None:
            self.loss += torch.where(num_targets > 0, loss.to(self.loss.dtype) * num_targets, 0.0)
        if loss is None or isinstance(logits, Tensor):
            flat = flat_logits(logits, targets)  # (N, V)
            self.correct += (flat.argmax(dim=1) == targets).sum()  # an IGNORE target never equals a class id
            if loss is None:
                losses = cross_entropy(flat, targets, ignore_index=IGNORE, reduction="none")
                self.loss += losses.to(self.loss.dtype).sum()
        else:
            self.has_accuracy = False

    def result(self, bytes_per_token: float | None) -> EvalResult:
        num_targets = int(self.targets)  # the one device read of an evaluation
        if num_targets == 0:
            raise ValueError(f"the evaluation data holds no target (every label is {IGNORE})")
        loss = float(self.loss) / num_targets
        return EvalResult(
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan,
            bits_per_byte=loss / math.log(2) / bytes_per_token if bytes_per_token else None,
            accuracy=int(self.correct) / num_targets if self.has_accuracy else None,
            num_targets=num_targets,
        )


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Each module's own flag is restored: a part that the user froze in eval mode stays there."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _from_start(dataloader: Any) -> Iterator[Iterable[Any]]:
    if hasattr(dataloader, "from_start"):
        batches = dataloader.from_start()
    else:
        if hasattr(dataloader, "set_epoch"):
            dataloader.set_epoch(0)
        batches = iter(dataloader)
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:  # a generator left early: whatever it runs in the background ends now
            close()


@contextlib.contextmanager
def _position_kept(dataloader: Any) -> Iterator[None]:
    knows = hasattr(dataloader, "state_dict") and hasattr(dataloader, "load_state_dict")
    position = dataloader.state_dict() if knows else None
    try:
        yield
    finally:
        if knows:
            dataloader.load_state_dict(position)
