"""BatchStream: an endless, resumable sequence of batches over any loader.

A loader that can say where it is (`state_dict`/`load_state_dict`) is asked. Any other one, say a plain
`DataLoader(shuffle=True)`, is replayed: the random state at the start of the epoch is recorded, and a resumed run
draws the same order again and skips the batches already trained on. Moving batches to a device is the loop's work.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .utils import capture_rng, preserve_rng, restore_rng

_SLOW_REPLAY_SECONDS = 2.0


class BatchStream:
    """Batches epoch after epoch, with the position (epoch, batches handed out in it)."""

    def __init__(self, loader: Iterable[Any], *, max_epochs: int = 0, log: Callable[[str], None] = print) -> None:
        self.loader = loader
        self.max_epochs = max_epochs
        self.epoch = 0
        self.batch = 0
        self.end_reason = ""
        self._log = log
        self._iterator: Iterator[Any] | None = None
        self._epoch_start: dict[str, Any] | None = None

    def next_batch(self) -> Any | None:
        """The next batch, across epoch ends; None once `max_epochs` are done or the data cannot be read again."""
        while True:
            if self.max_epochs and self.epoch >= self.max_epochs:
                self.end_reason = f"max_epochs={self.max_epochs} reached"
                return None
            if self._iterator is None:
                self._start_epoch()
            assert self._iterator is not None
            batch = next(self._iterator, _END)
            if batch is not _END:
                self.batch += 1
                return batch
            if self.batch == 0:
                self._say_no_data()
                return None
            self.epoch, self.batch, self._iterator = self.epoch + 1, 0, None

    def num_batches(self) -> int | None:
        """Batches per epoch, or None for a loader that does not know."""
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError:
            return None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"epoch": self.epoch, "batch": self.batch}
        if self._knows_position:
            state["loader"] = self.loader.state_dict()  # type: ignore[attr-defined]
        elif self._iterator is not None:
            state["epoch_start"] = self._epoch_start
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch that was handed out. Draws from the global generators (the caller
        restores them afterwards)."""
        self.epoch, self.batch, self._iterator = state["epoch"], state["batch"], None
        if self._knows_position:
            if "loader" not in state:
                raise ValueError("the checkpoint was written with a loader that has no state_dict(); "
                                 "pass the loader that the run was started with")
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
            if self.batch:
                self._iterator = iter(self.loader)
        elif "epoch_start" in state:
            self._replay(state)

    @property
    def _knows_position(self) -> bool:
        return hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict")

    def _start_epoch(self) -> None:
        for part in (self.loader, getattr(self.loader, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)  # type: ignore[union-attr]
        if not self._knows_position:
            generator = getattr(self.loader, "generator", None)
            own = generator.get_state() if isinstance(generator, torch.Generator) else None
            self._epoch_start = {"rng": capture_rng(), "generator": own}
        self._iterator = iter(self.loader)

    def _replay(self, state: dict[str, Any]) -> None:
        generator = getattr(self.loader, "generator", None)
        restore_rng(state["epoch_start"]["rng"])
        if isinstance(generator, torch.Generator) and state["epoch_start"]["generator"] is not None:
            generator.set_state(state["epoch_start"]["generator"])
        self._start_epoch()
        assert self._iterator is not None
        start, told = time.monotonic(), False
        for index in range(self.batch):
            if next(self._iterator, _END) is _END:
                raise ValueError(f"the run had taken {self.batch} batches of epoch {self.epoch}, the loader yields "
                                 f"only {index}; resume with the data that the run was started with")
            if not told and time.monotonic() - start > _SLOW_REPLAY_SECONDS:
                told = True
                self._log(f"resume: reading past {self.batch} batches, because this loader cannot jump "
                          "(fasttrain.data.TokenLoader can; so can any loader with state_dict/load_state_dict)")

    def _say_no_data(self) -> None:
        if self.epoch == 0:
            raise ValueError(f"train_dataloader ({type(self.loader).__name__}) yields no batch; check the dataset's "
                             "length against batch_size and drop_last")
        self.end_reason = (f"the data ended after {self.epoch} epoch(s): {type(self.loader).__name__} can be read only "
                           "once; pass something that can be iterated again to train longer")
        self._log(self.end_reason)


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


_END: Any = object()
