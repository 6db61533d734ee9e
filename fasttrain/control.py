"""ControlFile: steering a run from outside while it runs, by writing lines into a file.

    echo save >> runs/mine/control        echo "lr 0.5" >> runs/mine/control

Commands, one a line: `save`, `evaluate`, `sample PROMPT`, `stop`, `lr FACTOR` (multiplies the learning rate and the
rest of its schedule). They are carried out after the step under way, in order; the file is emptied by renaming it away
first, so that no line is lost or done twice. Every action is told, recorded in the metrics and kept in the checkpoint.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from .callbacks import Callback, Run
from .distributed import Team
from .state import TrainState

_COMMANDS = "save, evaluate, sample PROMPT, stop, lr FACTOR"


class ControlFile(Callback):
    """See the module's docstring.

    Args:
        path: the file (default: `control` in the run's directory).
        poll_seconds: how often to look.
    """

    def __init__(self, path: str | Path | None = None, *, poll_seconds: float = 0.5) -> None:
        if poll_seconds < 0:
            raise ValueError(f"ControlFile: poll_seconds is {poll_seconds}; it must not be negative")
        self.path = None if path is None else Path(path)
        self.poll_seconds = poll_seconds
        self.actions: list[list[Any]] = []
        """[step, line] of everything that was carried out."""
        self._run: Run | None = None
        self._next_look = 0.0

    def on_train_start(self, state: TrainState, run: Run) -> None:
        self._run = run
        if self.path is None:
            if run.directory is None and not run.team.leads:
                return  # rank 0 looks
            if run.directory is None:
                raise ValueError("ControlFile has no place to look; pass ControlFile(path) or checkpoint_dir= to the "
                                 "Trainer")
            self.path = run.directory / "control"

    def on_step(self, state: TrainState) -> None:
        assert self._run is not None
        for line in self._lines_of_rank_0(self._run.team):
            outcome = self._obey(state, line)
            self._run.log(f"control at step {state.step}: {line}: {outcome}")
            self._run.report("control", {"command": line, "outcome": outcome})

    def _lines_of_rank_0(self, team: Team) -> list[str]:
        lines: list[str] = []
        now = time.monotonic()
        if team.leads and now >= self._next_look:
            self._next_look = now + self.poll_seconds
            lines = self._take_lines()
        return lines if team.is_alone else team.tell("\n".join(lines)).splitlines()

    def _take_lines(self) -> list[str]:
        assert self.path is not None
        taken = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            os.replace(self.path, taken)
        except FileNotFoundError:
            return []
        text = taken.read_text(encoding="utf-8", errors="replace")
        taken.unlink()
        return [line.strip() for line in text.splitlines() if line.strip()]

    def _obey(self, state: TrainState, line: str) -> str:
        command, _, argument = line.partition(" ")
        if command in ("save", "evaluate") and not argument:
            state.requests.add(command)
            outcome = "after this step"
        elif command == "stop" and not argument:
            state.request_stop("the control file asked for it")
            outcome = "after this step"
        elif command == "lr":
            outcome = self._scale_lr(state, argument)
        elif command == "sample":
            outcome = self._sample(argument)
        else:
            return f"not understood and ignored; the commands are {_COMMANDS}"
        self.actions.append([state.step, line])
        return outcome

    def _scale_lr(self, state: TrainState, argument: str) -> str:
        try:
            factor = float(argument)
        except ValueError:
            factor = -1.0
        if not 0.0 < factor < 1e6:
            return f"ignored: {argument!r} is no positive factor"
        for group in state.optimizer.param_groups:
            for key in ("lr", "initial_lr"):
                if key in group:
                    group[key] = group[key] * factor
        scheduler = state.scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [base * factor for base in scheduler.base_lrs]  # type: ignore[union-attr]
        return f"learning rate now {float(state.optimizer.param_groups[0]['lr']):.4g}"

    def _sample(self, prompt: str) -> str:
        assert self._run is not None
        if self._run.generate is None:
            return "ignored: the run has no tokenizer"
        return prompt + str(self._run.generate([prompt])[0])

    def state_dict(self) -> dict[str, Any]:
        return {"actions": self.actions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.actions = [list(action) for action in state["actions"]]
