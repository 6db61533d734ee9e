"""LossSpike: notices a step whose loss jumps out of what the run has shown so far, and can undo it.

The mean and the spread of the step losses are followed by exponential averages. A loss more than `threshold` spreads
above the mean is a spike: it is told and recorded, ends the run, or is undone: the run goes back to its last good
checkpoint and passes over the batches of the `blame_steps` steps up to the spike. What happens is a pure function of
the losses, so it happens again when the run is repeated, and the batches passed over stand in every later checkpoint.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from .callbacks import Callback, Run
from .state import TrainState


class LossSpike(Callback):
    """See the module's docstring.

    Args:
        policy: "warn" tells and records, "stop" ends the run, "rewind" goes back to the last good checkpoint.
        threshold: how many spreads (exponential mean of the absolute deviations) above the mean a spike begins.
        warmup_steps: steps at the start whose losses only teach what is usual.
        blame_steps: with "rewind", how many of the latest steps' batches are passed over.
        max_rewinds: one spike more ends the run.
    """

    def __init__(self, policy: Literal["warn", "stop", "rewind"] = "warn", *, threshold: float = 8.0,
                 warmup_steps: int = 50, blame_steps: int = 1, max_rewinds: int = 5) -> None:
        if policy not in ("warn", "stop", "rewind") or threshold <= 0 or min(warmup_steps, blame_steps) < 1:
            raise ValueError(f"LossSpike: policy is {policy!r}, threshold {threshold}, warmup_steps {warmup_steps}, "
                             f"blame_steps {blame_steps}; policy must be warn, stop or rewind, the others positive")
        self.policy, self.threshold, self.warmup_steps = policy, threshold, warmup_steps
        self.blame_steps, self.max_rewinds = blame_steps, max_rewinds
        self.mean = self.spread = 0.0
        self.seen = 0
        self._last_judged = -1
        self._run: Run | None = None
        self._positions: deque[tuple[int, tuple[int, int]]] = deque(maxlen=blame_steps + 2)

    def on_train_start(self, state: TrainState, run: Run) -> None:
        self._run = run
        self._positions.clear()
        self._note_position(state)

    def on_event(self, state: TrainState, kind: str, details: Mapping[str, Any]) -> None:
        if kind == "rewind":
            self._positions.clear()
            self._note_position(state)

    def on_step(self, state: TrainState) -> None:
        judged = state.step - (state.pending is not None)  # on a GPU the latest loss is still on its way
        self._note_position(state)
        counters = state.counters
        if judged <= self._last_judged or counters.nonfinite_in_a_row or counters.last_was_empty:
            return
        self._last_judged = judged
        loss = counters.last_loss
        if self.seen >= self.warmup_steps and loss > self.mean + self.threshold * max(self.spread, 1e-3 * self.mean):
            self._act(state, judged, loss)
            return  # a spike does not teach what is usual
        self._learn(loss)

    def _learn(self, loss: float) -> None:
        self.seen += 1
        rate = max(0.02, 1.0 / self.seen)
        self.spread += rate * (abs(loss - self.mean) - self.spread) if self.seen > 1 else 0.0
        self.mean += rate * (loss - self.mean)

    def _act(self, state: TrainState, step: int, loss: float) -> None:
        assert self._run is not None
        what = f"loss {loss:.4g} at step {step} is a spike: the mean is {self.mean:.4g}, the spread {self.spread:.2g}"
        start = next((at for number, at in self._positions if number == step - self.blame_steps),
                     self._positions[0][1])
        end = next(at for number, at in self._positions if number == step)
        self._run.report("loss_spike", {"at_step": step, "loss": loss, "mean": self.mean, "spread": self.spread,
                                        "policy": self.policy, "batches": [list(start), list(end)]})
        if self.policy == "stop" or (self.policy == "rewind" and state.counters.rewinds >= self.max_rewinds):
            more = f", after {state.counters.rewinds} rewinds" if self.policy == "rewind" else ""
            state.request_stop(f"LossSpike: {what}{more}")
        elif self.policy == "rewind":
            self._run.log(f"LossSpike: {what}; going back")
            state.blamed = (start, end)
            state.requests.add("rewind")
        else:
            self._run.log(f"warning: {what}")

    def _note_position(self, state: TrainState) -> None:
        self._positions.append((state.step, (state.stream.epoch, state.stream.batch)))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread, "seen": self.seen, "last_judged": self._last_judged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.spread, self.seen = state["mean"], state["spread"], state["seen"]
        self._last_judged = state["last_judged"]
        self._positions.clear()
        if not math.isfinite(self.mean):
            raise ValueError(f"LossSpike: the saved mean is {self.mean}; it must be finite")
