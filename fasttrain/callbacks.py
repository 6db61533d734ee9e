"""Callbacks observe a run and may ask it to stop. The whole protocol is the loop's pseudocode:

    on_train_start(state, run)
    while not finished:
        an epoch's data are used up            -> on_epoch_end(state, epoch)
        gradients are complete                 -> on_gradients(state)
        update: one optimizer step             -> on_step(state)
        its loss or gradient was not finite    -> on_nonfinite(state)
        due(log)                               -> on_log(state, record)
        due(eval): on_eval_start(state), eval  -> on_eval(state, result)
        due(save): save                        -> on_save(state, path)
        something rare happened                -> on_event(state, kind, details): out_of_memory, rewind, control, ...
    on_train_end(state, status)                   on_exception(state, error) instead, if one ends the run

Write a class with any of these methods (deriving from `Callback` is optional). A hook that is not overridden costs
nothing: the methods are bound once. Deciders run before observers, each in the order given. An observer's exception is
reported with its name and the run goes on; a decider's ends the run. `state.request_stop(reason)` asks for the end
after the current step; requests are OR-ed. `state_dict`/`load_state_dict` travel in every checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .distributed import ALONE, Team
from .state import TrainState
from .utils import Interrupted

HOOKS = ("on_train_start", "on_epoch_end", "on_gradients", "on_step", "on_nonfinite", "on_log", "on_eval_start",
         "on_eval", "on_save", "on_event", "on_train_end", "on_exception")


@dataclass(frozen=True)
class Run:
    """What a callback may want to know besides the state; the same for the whole of `train()`."""

    config: TrainConfig
    directory: Path | None
    """Where checkpoints and metrics go; None: nothing is written."""
    resumed_step: int | None
    """Step of the checkpoint that the run continues, or None."""
    max_steps: int | None
    """Planned number of steps, where it can be known."""
    log: Callable[[str], None]
    """Prints one line without breaking a live display."""
    generate: Callable[..., Any] | None = None
    """generate(prompts, **options) with the model being trained, leaving it undisturbed; None without a tokenizer."""
    report: Callable[[str, Mapping[str, Any]], None] = lambda kind, details: None
    """report(kind, details) fires `on_event` for all callbacks: what should stand in the records of the run."""
    loss_fn: Callable[..., Any] | None = None
    """(model, batch) -> (loss_sum, num_targets), in the run's precision."""
    flops_per_token: float | None = None
    """Forward and backward, where it can be known."""
    peak_flops: tuple[float, str] | None = None
    """(FLOP/s that the device could do, what that is), where it is known."""
    checkpoint: Callable[[], Path | None] = lambda: None
    """The newest checkpoint of the run."""
    team: Team = ALONE
    """The ranks of the run. Deciders run on every rank, observers on rank 0 alone; `directory` is None on others."""


class Callback:
    """Base with every hook empty. `observer = True` promises that the run does not depend on it."""

    observer = False
    collective = False
    """An observer that runs on every rank all the same, because it asks all of them for something (generation)."""

    def on_train_start(self, state: TrainState, run: Run) -> None:
        """Once, before the first step, after a checkpoint was restored."""

    def on_epoch_end(self, state: TrainState, epoch: int) -> None:
        """When the first batch after the end of `epoch` (from 0) was asked for."""

    def on_gradients(self, state: TrainState) -> None:
        """Before each update. `.grad` holds the sum over the window's targets, not yet divided by
        `state.window.num_targets`, unscaled only without a gradient scaler, not yet clipped."""

    def on_step(self, state: TrainState) -> None:
        """After each optimizer step. On a GPU, counters other than `step` lag one step behind here."""

    def on_nonfinite(self, state: TrainState) -> None:
        """After a step whose update was skipped because its loss or gradient was not finite."""

    def on_log(self, state: TrainState, record: Mapping[str, Any]) -> None:
        """With every log record: loss, lr, grad_norm, tokens, seconds, memory_bytes, ... as plain numbers."""

    def on_eval_start(self, state: TrainState) -> None:
        """Before an evaluation."""

    def on_eval(self, state: TrainState, result: Any) -> None:
        """After an evaluation, with its EvalResult; the place to decide about stopping."""

    def on_save(self, state: TrainState, path: Path) -> None:
        """After a checkpoint is durable."""

    def on_event(self, state: TrainState, kind: str, details: Mapping[str, Any]) -> None:
        """When something rare happened: out_of_memory, loss_spike, rewind, control, nonfinite_capsule."""

    def on_train_end(self, state: TrainState, status: str) -> None:
        """Once, when the loop ended: status is completed, stopped or interrupted."""

    def on_exception(self, state: TrainState, error: BaseException) -> None:
        """When an exception (KeyboardInterrupt too) ends the run; it is raised again afterwards."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


class Hooks:
    """The overridden hooks of some callbacks, bound once."""

    def __init__(self, callbacks: Sequence[Any] = (), *, log: Callable[[str], None] = print) -> None:
        for callback in callbacks:
            if isinstance(callback, type) or not any(hasattr(callback, name) for name in HOOKS):
                raise ValueError(f"callbacks holds {callback!r}; it must be an object with at least one of "
                                 f"{', '.join(HOOKS)} (an instance, not the class)")
        ordered = sorted(callbacks, key=lambda callback: bool(getattr(callback, "observer", False)))
        self._log = log
        self._bound = {name: [(callback, getattr(callback, name)) for callback in ordered if _overrides(callback, name)]
                       for name in HOOKS}

    def fire(self, hook: str, state: TrainState, *arguments: Any) -> None:
        for callback, method in self._bound[hook]:
            try:
                method(state, *arguments)
            except Exception as error:
                where = f"{type(callback).__name__}.{hook}"
                if not getattr(callback, "observer", False):
                    raise RuntimeError(f"callback {where} failed at step {state.step}: {error}") from error
                self._log(f"warning: {where} failed at step {state.step} ({type(error).__name__}: {error}); "
                          "the run goes on")


def _overrides(callback: Any, name: str) -> bool:
    method = getattr(callback, name, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(Callback, name)


class EarlyStopping(Callback):
    """Stops when the validation loss has not improved by `min_delta` in `patience` evaluations in a row."""

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(f"EarlyStopping: patience is {patience} and min_delta {min_delta}; patience must be at "
                             "least 1, min_delta not negative")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.bad_evaluations = math.inf, 0

    def on_eval(self, state: TrainState, result: Any) -> None:
        if result.loss < self.best - self.min_delta:
            self.best, self.bad_evaluations = result.loss, 0
            return
        self.bad_evaluations += 1
        if self.bad_evaluations >= self.patience:
            state.request_stop(f"EarlyStopping: {self.patience} evaluations without a loss below {self.best:.4f}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad_evaluations": self.bad_evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.bad_evaluations = state["best"], state["bad_evaluations"]


class JsonlLogger(Callback):
    """One JSON object a line in `metrics.jsonl`: kind is train, eval, nonfinite, save, resume, end, or an event's.

    Append-only, with one exception: a run that resumes at (or rewinds to) step s first drops the records after s (the
    steps that will be trained again) and any half-written line, by renaming a new file over the old one. A run that
    starts afresh moves an older file to `metrics.previous.jsonl`. Non-finite numbers are the strings "nan", "inf",
    "-inf", because JSON has none.
    """

    observer = True

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else None

    def on_train_start(self, state: TrainState, run: Run) -> None:
        if self.path is None and run.directory is not None:
            self.path = run.directory / "metrics.jsonl"
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if run.resumed_step is None:
                os.replace(self.path, self.path.with_suffix(".previous.jsonl"))
            else:
                drop_records_after(self.path, run.resumed_step)
        if run.resumed_step is not None:
            self._write(state, "resume", {})

    def on_log(self, state: TrainState, record: Mapping[str, Any]) -> None:
        self._write(state, "train", record)

    def on_eval(self, state: TrainState, result: Any) -> None:
        self._write(state, "eval", figures_of(result))

    def on_nonfinite(self, state: TrainState) -> None:
        counters = state.counters
        self._write(state, "nonfinite", {"loss": counters.last_loss, "grad_norm": counters.last_grad_norm,
                                         "nonfinite_steps": counters.nonfinite_steps})

    def on_save(self, state: TrainState, path: Path) -> None:
        self._write(state, "save", {"checkpoint": path.name})

    def on_event(self, state: TrainState, kind: str, details: Mapping[str, Any]) -> None:
        if kind == "rewind" and self.path is not None and self.path.exists():
            drop_records_after(self.path, state.step)
        self._write(state, kind, details)

    def on_train_end(self, state: TrainState, status: str) -> None:
        self._write(state, "end", {"status": status, "reason": state.stop_reason})

    def _write(self, state: TrainState, kind: str, values: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        record = {"step": state.step, "kind": kind, **{key: _json_number(value) for key, value in values.items()}}
        # Opened for each record: one write of one line, whole or absent in the file, and no handle to leak.
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def figures_of(result: Any) -> dict[str, Any]:
    """An EvalResult as flat figures: those of named sets as `name/loss`, ..."""
    figures = {key: value for key, value in vars(result).items() if key != "sets"}
    for name, part in getattr(result, "sets", {}).items():
        figures.update({f"{name}/{key}": value for key, value in figures_of(part).items()})
    return figures


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a half-written last line is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def drop_records_after(path: Path, step: int) -> None:
    """Atomically rewrites the file with the records up to and including `step`."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class SampleText(Callback):
    """Generates from fixed prompts at every evaluation (or every `every_steps`, or every `every_tokens` target tokens),
    prints the text and appends it to `samples.jsonl`. Training is not disturbed: the same weights come out with or
    without it."""

    observer = True
    collective = True

    def __init__(self, prompts: str | Sequence[str], *, every_steps: int = 0, every_tokens: int = 0,
                 **options: Any) -> None:
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self.prompts or min(every_steps, every_tokens) < 0 or (every_steps and every_tokens):
            raise ValueError(f"SampleText: prompts is {prompts!r}, every_steps {every_steps}, every_tokens "
                             f"{every_tokens}; it needs at least one prompt and at most one of the two, not negative "
                             "(none: at every evaluation)")
        self.every_steps, self.every_tokens, self.options = every_steps, every_tokens, options
        self._run: Run | None = None

    def on_train_start(self, state: TrainState, run: Run) -> None:
        self._run = run
        samples = None if run.directory is None else run.directory / "samples.jsonl"
        if samples is not None and samples.exists():
            drop_records_after(samples, -1 if run.resumed_step is None else run.resumed_step)
        if run.generate is None:
            run.log("warning: SampleText has no tokenizer and stays silent; pass tokenizer= to the Trainer")

    def on_step(self, state: TrainState) -> None:
        if (self.every_steps and state.step % self.every_steps == 0) or (
                self.every_tokens and state.passed_multiple(self.every_tokens)):
            self._sample(state)

    def on_eval(self, state: TrainState, result: Any) -> None:
        if not (self.every_steps or self.every_tokens):
            self._sample(state)

    def on_event(self, state: TrainState, kind: str, details: Mapping[str, Any]) -> None:
        samples = None if self._run is None or self._run.directory is None else self._run.directory / "samples.jsonl"
        if kind == "rewind" and samples is not None and samples.exists():
            drop_records_after(samples, state.step)

    def _sample(self, state: TrainState) -> None:
        run = self._run
        if run is None or run.generate is None:
            return
        try:
            texts = run.generate(self.prompts, **self.options)
        except Interrupted:  # a signal: the run ends now, and half a sample is none
            return
        for prompt, text in zip(self.prompts, texts):
            run.log(f"sample at step {state.step}: {prompt}{text}")
            if run.directory is not None:
                record = {"step": state.step, "prompt": prompt, "text": text}
                with open(run.directory / "samples.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
