"""One call of `Trainer.train()`: its callbacks and its saver, and the parts that they give to the loop.

It lives as long as the call. Rank 0 writes files and shows progress; observers run there alone, unless they say that
they take part on every rank (`collective = True`), and deciders run everywhere. Left out: the loop (training_loop.py),
and what outlives the call (trainer.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import assembly
from .agreement import Agreement
from .callbacks import Hooks, JsonlLogger, Run
from .capsule import NonfiniteRecorder
from .config import TrainConfig
from .distributed import Team
from .evaluation import EvalResult
from .memory_bound import MemoryBound
from .progress import Progress
from .rank_pace import RankPace
from .replicas import Spread
from .saver import CheckpointSaver
from .shard_files import trees_of_rank
from .state import TrainState
from .training_loop import Parts, fit, limit_reached
from .utils import Interruption, PhaseClock


@dataclass
class Session:
    """See the module's docstring. `config` has its accumulation resolved; `plain_config` is the user's."""

    state: TrainState
    config: TrainConfig
    plain_config: TrainConfig
    parts: Parts
    team: Team
    spread: Spread
    root: Path | None
    callbacks: Sequence[Any]
    progress: Progress
    interruption: Interruption
    clock: PhaseClock
    evaluate: Callable[[Callable[[], bool]], EvalResult] | None
    metadata: Callable[[TrainState], dict[str, Any]]
    checkpoint: Path | None
    """The newest checkpoint of the run."""

    def __post_init__(self) -> None:
        team, own = self.team, []
        self.saver = None if self.root is None else CheckpointSaver(
            self.root, self.plain_config, log=self.progress.log, team=team)
        for kind in (JsonlLogger, NonfiniteRecorder, MemoryBound):
            # The recorder computes the step again, which takes all ranks where the weights are spread.
            if not (kind is NonfiniteRecorder and self.spread.name not in ("none", "ddp")) and \
                    not any(isinstance(callback, kind) for callback in self.callbacks):
                own.append(kind())
        every = [*self.callbacks, *own, *([self.saver] if self.saver else []), self.progress]
        taking_part = [callback for callback in every if team.leads or not getattr(callback, "observer", False)
                       or getattr(callback, "collective", False)]
        self.hooks = Hooks(taking_part, log=self.progress.log)
        self.agreement = Agreement(team, self.interruption, self.clock)
        self.pace = RankPace(team)

    def run(self, describe: Callable[[Callable[[str, Mapping[str, Any]], None]], Run]) -> str:
        """Trains, and returns how it ended. `describe(report)` says what callbacks are told at the start."""
        state, saver, hooks, team = self.state, self.saver, self.hooks, self.team
        run = describe(lambda kind, details: hooks.fire("on_event", state, kind, details))
        hooks.fire("on_train_start", state, run)
        try:
            if saver is not None:
                saver.on_saved = self._saved
            if not team.is_alone:
                self.agreement.agree(state)
            with team.guarding("training"):
                status = fit(state, self.config, self._parts())
            if saver is not None:
                saver.collect(wait=True)
            team.barrier("the end of the run")
            self.agreement.close()
        except BaseException as error:
            if saver is not None and not isinstance(error, KeyboardInterrupt):  # a second signal leaves at once
                saver.finish_quietly()
            hooks.fire("on_exception", state, error)
            raise
        hooks.fire("on_train_end", state, status)
        return status

    def _parts(self) -> Parts:
        evaluate, team, interruption = self.evaluate, self.team, self.interruption
        alone = team.is_alone
        asked: Callable[[], bool] = interruption.__bool__ if alone else self.agreement.poll
        parts = dataclasses.replace(
            self.parts, hooks=self.hooks, clock=self.clock,
            evaluate=None if evaluate is None else lambda: evaluate(asked),
            save=None if self.root is None else self._save,
            interrupted=interruption.__bool__ if alone else self.agreement.__bool__,
            rewind=None if self.root is None else self._rewind)
        return parts if alone else dataclasses.replace(
            parts, agree=self.agreement.agree, reduce=self._reduce, norm=self.spread.norm,
            rejoin=self.spread.rejoin, again=self.spread.again,
            figures=self.pace.figures)

    def _reduce(self, state: TrainState) -> None:
        self.clock.mark("forward_backward")
        assert state.window.num_targets is not None
        self.pace.count(state.window.num_targets)  # this rank's; afterwards it is that of all
        self.spread.reduce(state)
        self.clock.mark("communication")

    def _save(self) -> None:
        state, saver = self.state, self.saver
        assert saver is not None
        last = bool(self.interruption or state.stop_reason or state.stream.end_reason) or limit_reached(
            state, self.config, self.clock)  # nothing trains on meanwhile: no copy is needed
        saver.save(state.step, trees_of_rank(state.capture(), self.team), self.metadata(state), wait=last)

    def _saved(self, path: Path) -> None:
        self.checkpoint = path
        if self.team.leads:  # the others notice at other steps
            self.hooks.fire("on_save", self.state, path)

    def _rewind(self) -> None:
        state, root = self.state, self.root
        assert root is not None
        if self.saver is not None:
            self.saver.collect(wait=True)
        step = state.step
        self.checkpoint = assembly.rewind(state, root, self.team) or self.checkpoint
        if state.step < step:
            passed_over = [list(entry) for entry in state.stream.skipped]
            details = {"from_step": step, "checkpoint": getattr(self.checkpoint, "name", None),
                       "passed_over": passed_over}
            self.hooks.fire("on_event", state, "rewind", details)
