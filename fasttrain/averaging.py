"""EMA: an exponential moving average of the weights, scored and sampled in their place.

    e = decay e + (1 - decay) p   after every real update, from e = p at the start

Works with any optimizer (`AdamW(ema_decay=...)` keeps one inside its own pass instead). The average is part of the
checkpoint; evaluation and generation see it, training and the checkpoint's `model` do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .callbacks import Callback, Run
from .ops.adamw import AdamW
from .shards import exchange, is_shard, local, part_like
from .state import TrainState
from .utils import unwrap


class EMA(Callback):
    """Keeps an average of the trainable parameters.

    Args:
        decay: weight of the old average, in [0, 1).
        every_steps: average only every so many steps, with decay ** every_steps; cheaper, nearly the same.
    """

    def __init__(self, decay: float = 0.999, *, every_steps: int = 1) -> None:
        if not 0.0 <= decay < 1.0 or every_steps < 1:
            raise ValueError(f"EMA: decay is {decay}, every_steps {every_steps}; decay must lie in [0, 1), every_steps "
                             "be at least 1")
        self.decay, self.every_steps = decay, every_steps
        self.averages: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}

    @torch.no_grad()
    def on_train_start(self, state: TrainState, run: Run) -> None:
        self._parameters = {name: p for name, p in unwrap(state.model).named_parameters() if p.requires_grad}
        for name, p in self._parameters.items():
            saved = self.averages.get(name)
            if saved is not None and saved.shape != p.shape:
                raise ValueError(f"EMA: the saved average of {name!r} is {tuple(saved.shape)}, the parameter "
                                 f"{tuple(p.shape)}")
            self.averages[name] = p.detach().clone() if saved is None else _like(saved.to(p.dtype), p)

    @torch.no_grad()
    def on_step(self, state: TrainState) -> None:
        if state.step % self.every_steps:
            return
        averages: list[Tensor] = [local(average) for average in self.averages.values()]
        parameters: list[Tensor] = [local(p) for p in self._parameters.values()]
        weight = 1.0 - self.decay**self.every_steps
        optimizer = state.optimizer
        if state.pending is None:  # the verdict on this step is known: a refused one is no update
            counters = state.counters
            if not (counters.nonfinite_in_a_row or counters.last_was_empty):
                torch._foreach_lerp_(averages, parameters, weight)
        elif isinstance(optimizer, AdamW) and optimizer.last_found_inf is not None:  # the same, without waiting for it
            steps = torch._foreach_add(parameters, averages, alpha=-1)
            torch._foreach_mul_(steps, weight * (1.0 - optimizer.last_found_inf))
            torch._foreach_add_(averages, steps)
        else:
            torch._foreach_lerp_(averages, parameters, weight)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the parameters hold their averages; afterwards their own values again."""
        pairs = [(p, self.averages[name]) for name, p in self._parameters.items()]
        spread = [pair for pair in pairs if is_shard(pair[0])]
        whole = [pair for pair in pairs if not is_shard(pair[0])]
        own = [p.data for p, _ in whole]
        for p, average in whole:
            p.data = average
        for p, average in spread:
            exchange(p, average)
        try:
            yield
        finally:
            for (p, _), data in zip(whole, own):
                p.data = data
            for p, average in spread:
                exchange(p, average)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": dict(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = {name: value.clone() for name, value in state["averages"].items()}
        for name, value in saved.items():  # in the middle of a run (a rewind): on the parameter's device
            own = self.averages.get(name)
            self.averages[name] = value if own is None else _like(value, own)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A saved average, which may be spread already, as it lies with the parameter."""
    return value if is_shard(value) else part_like(value, parameter)


@contextlib.contextmanager
def averaged_weights(callbacks: Sequence[Any]) -> Iterator[None]:
    """The model with the averages of every callback that keeps some (has `swapped()`) in place of its weights."""
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if hasattr(callback, "swapped"):
                stack.enter_context(callback.swapped())
        yield
