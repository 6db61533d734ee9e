"""What fully_shard holds beside a rank's own rows, moment by moment, laid over a trace of what the model allocates.

Gathered parameters are most in the backward, a fused loss takes most before it, and gradients come as activations go:
peaks of the parts that do not coincide must not be added up. So a trace (step_memory.py) notes how much is alive
between two events, and here each event gathers and drops what PyTorch's engine (torch 2.13, called as sharding.py calls
it) does then. Sizes alone depend on the ranks: one trace serves any number of them. Left out: what the communication
library holds itself.

Legend: n ranks, unit: one of the blocks, or OUTSIDE, the parameters outside of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

OUTSIDE = -1

Event = Literal["forward", "forwarded", "scored", "backward", "added", "summing", "summed"]
"""A unit's forward begins, ends; the root's forward, with the loss, ends; a block's backward begins; its gradients are
done, and stay as they are for the next micro-batch, or are about to be summed over ranks; they were, and are gone."""


class Moment(NamedTuple):
    """From one event to the next."""

    event: Event
    unit: int
    begin: int
    """Bytes that the model's own tensors take at the event."""
    most: int
    """Most that they take until the next one."""


class Unit(NamedTuple):
    """Of what is gathered at once, in bytes."""

    rows: int
    """A rank's own rows of all parameters, padded to the largest rank's."""
    last: int
    """The whole last parameter, whose gradient the engine drops only when all are summed."""


class Held(NamedTuple):
    """The worst moment of a step."""

    gathered: int
    """Bytes of whole parameters, of their buffers, and of whole gradients."""
    others: int
    """Of all else, less the gradients that a rank has at the end."""


def worst_moment(moments: Sequence[Moment], units: Sequence[Unit], num_ranks: int, on_cpu: bool) -> Held:
    """Of one step whose `moments` were traced.

    Args:
        units: the blocks, and after them what is outside.
        on_cpu: the sum over ranks is made of their parts, side by side (collectives.scatter_sum).
    """
    held = _Engine(units, num_ranks, on_cpu)
    for moment in moments:
        held.live = moment.begin
        getattr(held, moment.event)(moment.unit)
        held.live = moment.most
        held.look()
    end = held.own + moments[-1].begin  # gradients: all else is gone
    gathered = min(held.gathered, held.peak - end)
    return Held(gathered, held.peak - end - gathered)


class _Engine:
    """What is gathered now; a method for each event."""

    def __init__(self, units: Sequence[Unit], num_ranks: int, on_cpu: bool) -> None:
        self._units, self._ranks, self._on_cpu = units, num_ranks, on_cpu
        self._buffers: set[int] = set()  # units that are received, and not copied out yet
        self._whole: set[int] = set()  # units that are
        self._gradients: set[int] = set()  # units that have all of theirs, among the model's own tensors
        self._kept: int | None = None  # the unit whose buffer waits for the next copy (forward), or sum (backward)
        self.live = self.own = self.peak = self.gathered = 0

    def forward(self, unit: int) -> None:
        self._receive(unit)
        if unit not in self._whole:
            self._kept = None
            self._whole.add(unit)
            self.look()
            self._buffers.remove(unit)
            self._kept = unit
        if unit != OUTSIDE and unit + 2 < len(self._units):
            self._receive(unit + 1)
        self.look()

    def forwarded(self, unit: int) -> None:
        self._whole.discard(unit)

    def scored(self, unit: int) -> None:
        self._kept = None
        if len(self._units) > 1:
            self._receive(len(self._units) - 2)

    def backward(self, unit: int) -> None:
        self._receive(unit)
        self._whole.add(unit)
        self.look()
        self._buffers.discard(unit)
        if unit > 0:
            self._receive(unit - 1)
        self.look()

    def added(self, unit: int) -> None:
        self._gradients.add(unit)

    def summing(self, unit: int) -> None:
        self._gradients.add(unit)
        self._whole.discard(unit)
        self._kept = unit
        self.look()

    def summed(self, unit: int) -> None:
        self._gradients.remove(unit)
        rows, last = self._units[unit]
        self.own += rows
        self.look(last + (rows * self._ranks if self._on_cpu else 0))

    def look(self, beside: int = 0) -> None:
        """Whether this is the worst moment; `beside`: bytes gathered for it alone."""
        kept = [] if self._kept is None else [self._kept]
        gathered = self._bytes([*self._buffers, *self._whole, *kept]) + beside
        if gathered + self.own + self.live > self.peak:
            self.peak, self.gathered = gathered + self.own + self.live, gathered + self._bytes(self._gradients)

    def _bytes(self, units: Iterable[int]) -> int:
        return sum(self._units[unit].rows for unit in units) * self._ranks

    def _receive(self, unit: int) -> None:
        if unit not in self._whole:
            self._buffers.add(unit)
