"""BatchStream: an endless, resumable sequence of batches over any loader.

A loader that can say where it is (`state_dict`/`load_state_dict`) is asked. For PyTorch's DataLoader over a dataset
with indices the sampler is replayed: the random state at the start of the epoch is recorded, a resumed run draws the
same order again and passes over the *samples* that were used, so that none is loaded twice and batch size and workers
may change. Of anything else the batches are read again, one by one, and the log says so.
Under several ranks each gets its own batches of every turn (dealing.py), and the position, the same on all of them, is
that of the whole: it may be continued by any number of ranks.
Left out: random numbers that a dataset draws inside worker processes (a resumed worker starts its own afresh).
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dealing import END, PASSED, Order, batches_per_turn, blank, deal, has_indices, is_blank
from .distributed import ALONE, Team
from .utils import Interrupted, capture_rng, preserve_rng, restore_rng


class BatchStream:
    """Batches epoch after epoch, with the position (epoch, batches and samples handed out in it)."""

    def __init__(self, loader: Iterable[Any], *, max_epochs: int = 0, log: Callable[[str], None] = print,
                 team: Team = ALONE) -> None:
        self.loader = loader
        self.max_epochs = max_epochs
        self.epoch = 0
        self.batch = 0
        self.samples = 0
        self.end_reason = ""
        self.waiting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        """A context around waits for a batch, in which a signal may raise Interrupted; the stream is then where it was
        before, generators included, and the next call reads on from there."""
        self.skipped: list[tuple[int, int, int]] = []
        """(epoch, first, last) of batches that are passed over: they made a loss spike (see `skip`)."""
        self._log = log
        self._team = team
        self._turn = batches_per_turn(loader, team.world_size)
        self._seat = team.rank if self._turn > 1 else 0
        self._latest: Any = None
        self._iterator: Iterator[Any] | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._broken = False

    def next_batch(self) -> Any | None:
        """The next batch, across epoch ends; None once `max_epochs` are done, the data cannot be read again, or a
        signal ended the wait."""
        if self._broken:
            self._broken = False
            with preserve_rng():
                self._replay(self.state_dict())
        mine: Any = None
        for seat in range(self._turn):
            batch = self._next_place(seat)
            if batch is None:
                if seat == 0:
                    return None
                break  # the data end inside the turn
            mine = mine if batch is PASSED else batch
        if self._turn > 1:
            mine = self._blank() if mine is None else mine
            self._latest = mine
        return mine

    def _next_place(self, seat: int) -> Any | None:
        """The batch at the next place of the common order (PASSED if it is another rank's), None at the end of all;
        `seat` places of this turn are taken."""
        while True:
            if self.max_epochs and self.epoch >= self.max_epochs:
                self.end_reason = f"max_epochs={self.max_epochs} reached"
                return None
            if self._iterator is None:
                self._start_epoch(seat=seat)
            assert self._iterator is not None
            try:
                batch = self._wait(self._iterator)
            except Interrupted:
                return None
            if batch is not END:
                self.batch += 1
                self.samples = _samples_after(self.loader, self.samples)
                if self.skipped and any(epoch == self.epoch and first < self.batch <= last
                                        for epoch, first, last in self.skipped):
                    continue
                return batch
            if self.batch == 0:
                self._say_no_data()
                return None
            self.epoch, self.batch, self.samples, self._iterator = self.epoch + 1, 0, 0, None

    def _blank(self) -> Any:
        """What a rank computes along with, for which the last turn has no batch."""
        batches = peek_batches(self.loader, 1) if self._latest is None else [self._latest]
        if not batches:
            raise ValueError(f"the training data hold fewer batches than there are ranks ({self._team.world_size}), "
                             f"and {type(self.loader).__name__} can be read only once; use fewer processes")
        return batches[0] if is_blank(batches[0]) else blank(batches[0])

    def skip(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """From now on passes over the batches handed out between two positions (epoch, batches of it): a part of the
        stream's state, so a resumed run passes over them too."""
        num_batches = self.num_batches() or max(start[1], end[1])
        for epoch in range(start[0], end[0] + 1):
            first = start[1] if epoch == start[0] else 0
            last = end[1] if epoch == end[0] else num_batches
            if last > first:
                self.skipped.append((epoch, first, last))

    def num_batches(self) -> int | None:
        """Batches per epoch, or None for a loader that does not know."""
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError:
            return None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"epoch": self.epoch, "batch": self.batch, "samples": self.samples}
        if self.skipped:
            state["skipped"] = [list(entry) for entry in self.skipped]
        if self._knows_position:
            state["loader"] = self.loader.state_dict()  # type: ignore[attr-defined]
        elif self._iterator is not None:
            state["epoch_start"] = self._epoch_start
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch that was handed out. Draws from the global generators (the caller
        restores them afterwards)."""
        self.epoch, self.batch, self._iterator = state["epoch"], state["batch"], None
        self.samples = state["samples"]
        self.skipped = [(entry[0], entry[1], entry[2]) for entry in state.get("skipped", [])]
        if self._knows_position:
            if "loader" not in state:
                raise ValueError("the checkpoint was written with a loader that has no state_dict(); "
                                 "pass the loader that the run was started with")
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
            if self.batch:
                self._iterator = iter(self.loader) if self._turn == 1 else self._deal(0, self._seat)
        elif "epoch_start" in state:
            self._replay(state)
        elif "loader" in state:
            raise ValueError("the checkpoint was written with a loader that has state_dict(), and "
                             f"{type(self.loader).__name__} has none; pass the loader that the run was started with")

    @property
    def _knows_position(self) -> bool:
        return hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict")

    def _wait(self, iterator: Iterator[Any]) -> Any:
        # A loader that knows its position alone can say where a broken wait leaves it: it is let finish.
        # A list makes nobody wait.
        if self._knows_position or self.waiting is contextlib.nullcontext or isinstance(self.loader, (list, tuple)):
            return next(iterator, END)
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            with self.waiting():
                return next(iterator, END)
        except Interrupted:
            self._broken = True  # what was being read is lost, and read again if this stream goes on
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
            raise

    def _start_epoch(self, skip_samples: int = 0, seat: int = 0) -> None:
        for part in (self.loader, getattr(self.loader, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)  # type: ignore[union-attr]
        if self._turn > 1:
            self._iterator = self._deal(skip_samples, (self._seat - seat) % self._turn)
            return
        if not self._knows_position:
            self._epoch_start = self._generators()
        # With samples to pass over, they are drawn now, while the generators are those of the epoch's start.
        self._iterator = iter(self.loader) if not skip_samples else \
            Order(self.loader, skip_samples).batches()  # type: ignore[arg-type]

    def _deal(self, skip_samples: int, first: int) -> Iterator[Any]:
        """This rank's batches of the rest of the epoch: the order is drawn from rank 0's generators by all of them,
        and the other ranks' own are left as they were."""
        if self._knows_position:
            return deal(self.loader, first, self._turn)
        start = self._epoch_start = self._shared(self._generators())
        if not has_indices(self.loader):
            return deal(self.loader, first, self._turn)
        order = Order(self.loader, skip_samples, first, self._turn)  # type: ignore[arg-type]
        if self._team.leads:
            return order.batches()
        with preserve_rng():
            self._set_generators(start)
            return order.batches()

    def _generators(self) -> dict[str, Any]:
        generator = getattr(self.loader, "generator", None)
        own = generator.get_state() if isinstance(generator, torch.Generator) else None
        return {"rng": capture_rng(), "generator": own}

    def _shared(self, states: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's, on every rank."""
        def share(state: Tensor | None) -> Tensor | None:
            return None if state is None else self._team.share(state)

        return {"rng": {name: share(state) for name, state in states["rng"].items() if not name.startswith("cuda")},
                "generator": share(states["generator"])}

    def _set_generators(self, states: dict[str, Any]) -> None:
        generator = getattr(self.loader, "generator", None)
        restore_rng(states["rng"])
        if isinstance(generator, torch.Generator) and states["generator"] is not None:
            generator.set_state(states["generator"])

    def _replay(self, state: dict[str, Any]) -> None:
        self._set_generators(state["epoch_start"])
        if has_indices(self.loader):
            self._start_epoch(skip_samples=self.samples)
            return
        self._start_epoch(seat=-self.batch)  # the next turn begins after them
        assert self._iterator is not None
        if self.batch:
            self._log(f"resume: reading past {self.batch} batches one by one, because a {type(self.loader).__name__} "
                      "cannot jump (fasttrain.data.TokenLoader can; so can a DataLoader over a dataset with indices, "
                      "and any loader with state_dict/load_state_dict)")
        for index in range(self.batch):
            if next(self._iterator, END) is END:
                raise ValueError(f"the run had taken {self.batch} batches of epoch {self.epoch}, the loader yields "
                                 f"only {index}; resume with the data that the run was started with")

    def _say_no_data(self) -> None:
        if self.epoch == 0:
            raise ValueError(f"train_dataloader ({type(self.loader).__name__}) yields no batch; check the dataset's "
                             "length against batch_size and drop_last")
        self.end_reason = (f"the data ended after {self.epoch} epoch(s): {type(self.loader).__name__} can be read only "
                           "once; pass something that can be iterated again to train longer")
        self._log(self.end_reason)


def _samples_after(loader: Any, samples: int) -> int:
    """Samples used once one more batch is: of the sampler's items, so that the batch size may change."""
    if not has_indices(loader):
        return samples + 1
    after = samples + (loader.batch_size or 1)
    order = loader.sampler if loader.batch_size is not None or loader.batch_sampler is None else loader.batch_sampler
    return min(after, len(order)) if hasattr(order, "__len__") else after


def peek_batches(loader: Iterable[Any], count: int) -> list[Any]:
    """The first `count` batches of an epoch without disturbing anything: the loader's position and generator and the
    global generators are put back. Empty for an iterator that can be read only once, or a loader without batches."""
    if iter_is_self(loader):
        return []
    from_start = getattr(loader, "from_start", None)
    generator = getattr(loader, "generator", None)
    own = generator.get_state() if isinstance(generator, torch.Generator) else None
    position = loader.state_dict() if from_start is None and hasattr(loader, "state_dict") else None
    with preserve_rng():
        batches = from_start() if from_start is not None else iter(loader)
        peeked = list(itertools.islice(batches, count))
        if hasattr(batches, "close"):
            batches.close()
    if position is not None:
        loader.load_state_dict(position)  # type: ignore[attr-defined]
    if isinstance(generator, torch.Generator) and own is not None:
        generator.set_state(own)
    return peeked


def iter_is_self(loader: Iterable[Any]) -> bool:
    """Whether reading `loader` uses it up."""
    return hasattr(loader, "__next__")

