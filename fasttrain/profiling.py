"""Looking inside a run: norms of gradients and weights by part of the model, and a profiler's trace of a few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .callbacks import Callback, Run
from .shards import is_shard, local
from .state import TrainState
from .utils import unwrap


class Norms(Callback):
    """The 2-norms of weights and of gradients (before clipping) by part of the model.

    Recorded with each log record as the event `norms`: {"weight/PART": ..., "gradient/PART": ...}. PART is the first
    `depth` parts of a parameter's name. Computed only in steps whose record is due: one pass over both.
    """

    observer = True
    collective = True  # each rank has a part of what is spread

    def __init__(self, *, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"Norms: depth is {depth}; it must be at least 1")
        self.depth = depth
        self._run: Run | None = None
        self._squares: dict[str, Tensor] = {}
        self._holders = 0
        """Ranks among which each tensor is spread; 0: every rank has all."""

    def on_train_start(self, state: TrainState, run: Run) -> None:
        self._run = run

    @torch.no_grad()
    def on_gradients(self, state: TrainState) -> None:
        assert self._run is not None
        config, count, self._squares = self._run.config, state.window.num_targets, {}
        assert count is not None
        if "log" in config.every_tokens:  # how many targets there are is not asked of the device for this
            most = state.window.most_targets + (0 if state.pending is None else state.pending.most_targets)
            left = config.every_tokens["log"] - state.counters.tokens_seen % config.every_tokens["log"]
            if most < left:
                return
        elif (state.step + 1) % config.log_every_steps:
            return
        for name, p in unwrap(state.model).named_parameters():
            self._holders = p.device_mesh.size(-1) if is_shard(p) else 0  # type: ignore[attr-defined]
            part = ".".join(name.split(".")[: self.depth])
            self._add(f"weight/{part}", p)
            if p.grad is not None:  # the sum over the window's targets; the update will use their mean
                self._add(f"gradient/{part}", p.grad, count)

    def _add(self, key: str, tensor: Tensor, count: Tensor | float = 1.0) -> None:
        square = (torch.linalg.vector_norm(local(tensor), dtype=torch.float32) / count) ** 2
        self._squares[key] = self._squares[key] + square if key in self._squares else square

    def on_log(self, state: TrainState, record: Mapping[str, Any]) -> None:
        assert self._run is not None
        if self._squares:
            squares, team = [float(square) for square in self._squares.values()], self._run.team
            if self._holders:  # the sum over all ranks counts each copy of the model once
                squares = [square * self._holders / team.world_size for square in team.add(squares)]
            self._run.report("norms", {key: square ** 0.5 for key, square in zip(self._squares, squares)})
        self._squares = {}


class ProfilerTrace(Callback):
    """A torch.profiler trace of `num_steps` steps after step `after_step`, as a file for chrome://tracing or Perfetto,
    and a table of the most expensive operators beside it."""

    observer = True

    def __init__(self, after_step: int = 10, num_steps: int = 3, directory: str | Path | None = None) -> None:
        if after_step < 0 or num_steps < 1:
            raise ValueError(f"ProfilerTrace: after_step is {after_step}, num_steps {num_steps}; the first must not be "
                             "negative, the second at least 1")
        self.after_step, self.num_steps = after_step, num_steps
        self.directory = None if directory is None else Path(directory)
        self._profiler: Any = None
        self._log: Callable[[str], None] = print

    def on_train_start(self, state: TrainState, run: Run) -> None:
        self._log = run.log
        if self.directory is None:
            if run.directory is None:
                raise ValueError("ProfilerTrace has no place to write; pass directory=, or checkpoint_dir= to the "
                                 "Trainer")
            self.directory = run.directory / "profile"
        if state.step == self.after_step:
            self._start()

    def on_step(self, state: TrainState) -> None:
        if state.step == self.after_step:
            self._start()
        elif self._profiler is not None and state.step >= self.after_step + self.num_steps:
            self._finish(state)

    def on_train_end(self, state: TrainState, status: str) -> None:
        if self._profiler is not None:
            self._finish(state)

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profiler.__enter__()

    def _finish(self, state: TrainState) -> None:
        assert self.directory is not None
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        self.directory.mkdir(parents=True, exist_ok=True)
        stem = f"steps-{self.after_step + 1}-{state.step}"
        profiler.export_chrome_trace(str(self.directory / f"{stem}.json"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
        (self.directory / f"{stem}.txt").write_text(table, encoding="utf-8")
        self._log(f"profile of {stem} written to {self.directory}")
