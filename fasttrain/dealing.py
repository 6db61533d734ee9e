"""How one sequence of batches is dealt to several ranks: place j of a turn belongs to rank j, whatever the loader.

A turn is as many batches of the loader as there are ranks, and each rank gets the one of its number, so N ranks with
one micro-batch see, together and in order, what one rank sees in N. A rank loads only its own batches where that is
possible: from a DataLoader over a dataset with indices, a loader with `deal(first, every)` (`data.TokenLoader`), and a
list; of any other iterable all are read and the others' dropped.
A loader that is divided already (a DistributedSampler) is left alone: each rank takes all of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

PASSED: Any = object()
"""Stands for a batch that belongs to another rank and was not loaded."""

END: Any = object()
"""Stands for the end of an iterator."""

BLANK = "a batch of another place, which counts for nothing"
"""Key of a batch {BLANK: batch}: a rank for which none is left computes along, for others wait for its part."""


def blank(batch: Any) -> dict[str, Any]:
    """The batch marked as one that adds nothing to loss, gradients or counts."""
    return {BLANK: batch}


def is_blank(batch: Any) -> bool:
    return isinstance(batch, dict) and BLANK in batch


def has_indices(loader: Any) -> bool:
    """Whether it is PyTorch's DataLoader over a dataset with indices, whose order can be drawn without loading."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def batches_per_turn(loader: Any, world_size: int) -> int:
    """How many batches of `loader` all ranks together take at a time: as many as there are ranks, or 1 where the
    loader itself gives each rank others.

    Raises:
        ValueError: a TokenLoader that was told of ranks; the Trainer deals.
    """
    if world_size > 1 and getattr(loader, "world_size", 1) > 1:
        raise ValueError(f"{type(loader).__name__} was made with world_size={loader.world_size}, but under torchrun "
                         "the Trainer deals its batches to the ranks; leave rank and world_size out")
    replicas = (getattr(getattr(loader, name, None), "num_replicas", 1) for name in ("sampler", "batch_sampler"))
    return 1 if world_size > 1 and max(replicas) > 1 else world_size


def deal(loader: Iterable[Any], first: int, every: int) -> Generator[Any, None, None]:
    """One pass over `loader`: its batch at the places first, first + every, ..., and PASSED at the others."""
    if has_indices(loader):
        order = Order(loader, 0, first, every)  # type: ignore[arg-type]
        yield from order.batches()
    elif hasattr(loader, "deal"):
        yield from loader.deal(first, every)
    else:
        for place, batch in enumerate(loader):
            yield batch if place % every == first else PASSED


def dealt_from_start(loader: Any, first: int, every: int) -> Generator[Any, None, None]:
    """The same of a loader with `from_start()`; one that can `deal` makes only its own."""
    if not hasattr(loader, "deal"):
        for place, batch in enumerate(loader.from_start()):
            yield batch if place % every == first else PASSED
        return
    mine = loader.from_start(first=first, every=every)
    try:
        for place in range(len(loader)):
            yield next(mine) if place % every == first else PASSED
    finally:
        mine.close()


class Order:
    """The samples of one epoch of a DataLoader from the `skip`-th on, dealt: draws what the loader itself would draw.

    Making its iterator draws the loader's own seed first and then the sampler's, as PyTorch does.
    """

    def __init__(self, loader: DataLoader[Any], skip: int, first: int = 0, every: int = 1) -> None:
        sampler: Any = loader.sampler
        if loader.batch_size is None and loader.batch_sampler is not None:
            sampler = loader.batch_sampler  # of the user's own: `skip` counts batches
        self._rest = Rest(sampler, skip)
        grouped = self._rest if loader.batch_size is None else \
            BatchSampler(self._rest, loader.batch_size, loader.drop_last)  # type: ignore[arg-type]
        self._first, self._every = first, every
        self._source: Iterator[Any] | None = None
        self._grouped: Iterable[Any] = grouped
        self._ready: deque[Any] = deque()
        self._count = 0
        whole = loader.batch_size is None and loader.batch_sampler is None
        order: dict[str, Any] = {"batch_size": None, "sampler": self} if whole else {"batch_sampler": self}
        self._loader: DataLoader[Any] = DataLoader(
            loader.dataset, num_workers=loader.num_workers, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory,
            timeout=loader.timeout, worker_init_fn=loader.worker_init_fn, generator=loader.generator,
            prefetch_factor=loader.prefetch_factor, multiprocessing_context=loader.multiprocessing_context, **order)

    def batches(self) -> Iterator[Any]:
        """The batches, PASSED for others' places. All that is drawn at the start of an epoch is drawn by this call."""
        loaded = iter(self._loader)
        self._rest.pass_over()
        self._pull()
        return self._dealt(loaded)

    def __iter__(self) -> Iterator[Any]:
        """For the loader: the indices of this rank's batches."""
        while self._ready or self._pull():
            if self._ready:
                yield self._ready.popleft()

    def _dealt(self, loaded: Iterator[Any]) -> Iterator[Any]:
        place = 0
        while True:
            while self._count <= place and self._pull():
                pass
            if self._count <= place:
                return
            yield next(loaded) if place % self._every == self._first else PASSED
            place += 1

    def _pull(self) -> bool:
        if self._source is None:
            self._source = iter(self._grouped)
        item = next(self._source, END)
        if item is END:
            return False
        if self._count % self._every == self._first:
            self._ready.append(item)
        self._count += 1
        return True


class Rest:
    """What a sampler yields after its first `count` items, which are drawn and dropped; for one reading."""

    def __init__(self, sampler: Iterable[Any], count: int) -> None:
        self._sampler, self._count = sampler, count
        self._items: Iterator[Any] | None = None

    def pass_over(self) -> Iterator[Any]:
        """Draws the order, now if not yet."""
        if self._items is None:
            items = iter(self._sampler)
            self._items = items
            for index in range(self._count):
                if next(items, END) is END:
                    raise ValueError(f"the run had used {self._count} samples of this epoch, the sampler yields only "
                                     f"{index}; resume with the data that the run was started with")
        return self._items

    def __iter__(self) -> Iterator[Any]:
        yield from self.pass_over()  # a generator: nothing is drawn before the loader has drawn its own seed
