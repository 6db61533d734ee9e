"""What all ranks have to decide alike: to stop, to save, to evaluate, to go back, that a signal came, what time it is.

A rank that left the loop alone would leave the others waiting. So after each step the wishes of all are joined by one
small reduction, and between two of these everyone acts on the joint verdict; a signal is served at the next one. The
first reason to stop is the lowest rank's that has one.
"""

from __future__ import annotations

import signal
import time

from .distributed import Team
from .state import TrainState
from .utils import Interruption, PhaseClock

_REQUESTS = ("save", "evaluate", "rewind")


class Agreement:
    """The joint verdict of a team's ranks in one call of `train()`."""

    def __init__(self, team: Team, interruption: Interruption, clock: PhaseClock) -> None:
        self._team, self._interruption, self._clock = team, interruption, clock
        self.signal = ""
        """Name of the signal that some rank was sent; empty before all know it."""

    def __bool__(self) -> bool:
        """Whether all are to end: the verdict of the latest joint call, so every rank sees the same."""
        return bool(self.signal)

    def agree(self, state: TrainState) -> None:
        """Joins requests, stop reasons, signals and clocks of all ranks; they call it together, after each step."""
        team = self._team
        rank = float(team.world_size - team.rank)  # the lowest rank's is the largest
        mine = [self._signal_number(), rank if state.stop_reason else 0.0, self._clock.passed(),
                *(float(name in state.requests) for name in _REQUESTS)]
        number, stopper, seconds, *wanted = team.agree(mine)
        self._note(number)
        self._clock.agreed = seconds
        if stopper:
            reason = team.tell(state.stop_reason, team.world_size - int(stopper))
            state.request_stop(reason)
        state.requests |= {name for name, flag in zip(_REQUESTS, wanted) if flag}

    def poll(self) -> bool:
        """Joins the signals alone, inside an evaluation."""
        self._note(self._team.agree([self._signal_number()])[0])
        return bool(self)

    def close(self) -> None:
        """Tells this rank's own flag what the others were sent."""
        if self.signal and not self._interruption:
            self._interruption.requested, self._interruption.at = self.signal, time.monotonic()

    def _signal_number(self) -> float:
        return float(getattr(signal, self._interruption.requested)) if self._interruption else 0.0

    def _note(self, number: float) -> None:
        if number and not self.signal:
            self.signal = signal.Signals(int(number)).name
