"""BatchStream: an endless, resumable sequence of batches over any loader.

A loader that can say where it is (`state_dict`/`load_state_dict`) is asked. For PyTorch's DataLoader over a dataset
with indices the sampler is replayed: the random state at the start of the epoch is recorded, a resumed run draws the
same order again and passes over the *samples* that were used, so that none is loaded twice and batch size and workers
may change. Of anything else the batches are read again, one by one, and the log says so.
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
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from .utils import Interrupted, capture_rng, preserve_rng, restore_rng


class BatchStream:
    """Batches epoch after epoch, with the position (epoch, batches and samples handed out in it)."""

    def __init__(self, loader: Iterable[Any], *, max_epochs: int = 0, log: Callable[[str], None] = print) -> None:
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
        while True:
            if self.max_epochs and self.epoch >= self.max_epochs:
                self.end_reason = f"max_epochs={self.max_epochs} reached"
                return None
            if self._iterator is None:
                self._start_epoch()
            assert self._iterator is not None
            try:
                batch = self._wait(self._iterator)
            except Interrupted:
                return None
            if batch is not _END:
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
                self._iterator = iter(self.loader)
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
            return next(iterator, _END)
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            with self.waiting():
                return next(iterator, _END)
        except Interrupted:
            self._broken = True  # what was being read is lost, and read again if this stream goes on
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
            raise

    def _start_epoch(self, skip_samples: int = 0) -> None:
        for part in (self.loader, getattr(self.loader, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)  # type: ignore[union-attr]
        if not self._knows_position:
            generator = getattr(self.loader, "generator", None)
            own = generator.get_state() if isinstance(generator, torch.Generator) else None
            self._epoch_start = {"rng": capture_rng(), "generator": own}
        if skip_samples:
            rest, loader = _from_sample(self.loader, skip_samples)  # type: ignore[arg-type]
            self._iterator = iter(loader)
            rest.pass_over()  # now, while the generators are those of the epoch's start
        else:
            self._iterator = iter(self.loader)

    def _replay(self, state: dict[str, Any]) -> None:
        generator = getattr(self.loader, "generator", None)
        restore_rng(state["epoch_start"]["rng"])
        if isinstance(generator, torch.Generator) and state["epoch_start"]["generator"] is not None:
            generator.set_state(state["epoch_start"]["generator"])
        if _has_indices(self.loader):
            self._start_epoch(skip_samples=self.samples)
            return
        self._start_epoch()
        assert self._iterator is not None
        if self.batch:
            self._log(f"resume: reading past {self.batch} batches one by one, because a {type(self.loader).__name__} "
                      "cannot jump (fasttrain.data.TokenLoader can; so can a DataLoader over a dataset with indices, "
                      "and any loader with state_dict/load_state_dict)")
        for index in range(self.batch):
            if next(self._iterator, _END) is _END:
                raise ValueError(f"the run had taken {self.batch} batches of epoch {self.epoch}, the loader yields "
                                 f"only {index}; resume with the data that the run was started with")

    def _say_no_data(self) -> None:
        if self.epoch == 0:
            raise ValueError(f"train_dataloader ({type(self.loader).__name__}) yields no batch; check the dataset's "
                             "length against batch_size and drop_last")
        self.end_reason = (f"the data ended after {self.epoch} epoch(s): {type(self.loader).__name__} can be read only "
                           "once; pass something that can be iterated again to train longer")
        self._log(self.end_reason)


def _has_indices(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _samples_after(loader: Any, samples: int) -> int:
    """Samples used once one more batch is: of the sampler's items, so that the batch size may change."""
    if not _has_indices(loader):
        return samples + 1
    after = samples + (loader.batch_size or 1)
    order = loader.sampler if loader.batch_size is not None or loader.batch_sampler is None else loader.batch_sampler
    return min(after, len(order)) if hasattr(order, "__len__") else after


def _from_sample(loader: DataLoader[Any], count: int) -> tuple[_Rest, DataLoader[Any]]:
    """The same loader without its sampler's first `count` samples (for a batch sampler of the user's own: batches).
    Making its iterator draws what the original's would have drawn."""
    order: dict[str, Any]
    if loader.batch_size is not None:
        rest = _Rest(loader.sampler, count)
        order = {"batch_sampler": BatchSampler(rest, loader.batch_size, loader.drop_last)}
    elif loader.batch_sampler is not None:
        rest = _Rest(loader.batch_sampler, count)
        order = {"batch_sampler": rest}
    else:
        rest = _Rest(loader.sampler, count)
        order = {"batch_size": None, "sampler": rest}
    return rest, DataLoader(
        loader.dataset, num_workers=loader.num_workers, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory,
        timeout=loader.timeout, worker_init_fn=loader.worker_init_fn, generator=loader.generator,
        prefetch_factor=loader.prefetch_factor, multiprocessing_context=loader.multiprocessing_context, **order)


class _Rest:
    """What a sampler yields after its first `count` items, which are drawn and dropped; for one reading."""

    def __init__(self, sampler: Iterable[Any], count: int) -> None:
        self._sampler, self._count = sampler, count
        self._items: Iterator[Any] | None = None

    def pass_over(self) -> Iterator[Any]:
        if self._items is None:
            self._items = iter(self._sampler)
            for index in range(self._count):
                if next(self._items, _END) is _END:
                    raise ValueError(f"the run had used {self._count} samples of this epoch, the sampler yields only "
                                     f"{index}; resume with the data that the run was started with")
        return self._items

    def __iter__(self) -> Iterator[Any]:
        yield from self.pass_over()  # a generator: nothing is drawn before the loader has drawn its own seed


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
