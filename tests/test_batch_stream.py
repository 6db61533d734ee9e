"""BatchStream: a resumed stream yields what the uninterrupted one would have, and loads nothing that was used."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import one_thread, tiny_trainer  # noqa: F401
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from fasttrain.batch_stream import BatchStream
from fasttrain.utils import Interruption, capture_rng, restore_rng

SIZE = 23
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # one core is enough here


class Numbers(Dataset[int]):
    """Item i is i; remembers which items were asked for. With `noisy`, items draw from all global generators."""

    def __init__(self, noisy: bool = False) -> None:
        self.asked: list[int] = []
        self.noisy = noisy

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        if self.noisy:
            return index + 1000 * (torch.randint(0, 9, ()).item() + random.randrange(9) + int(np.random.randint(9)))
        return index


def loader_of(kind: str, dataset: Numbers, workers: int = 0, batch_size: int = 4) -> DataLoader[Any]:
    options: dict[str, Any] = {"num_workers": workers}
    if kind == "shuffle":
        return DataLoader(dataset, batch_size, shuffle=True, **options)
    if kind == "own generator":
        return DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(5), **options)
    if kind == "with replacement":
        order = RandomSampler(dataset, replacement=True, num_samples=50)
        return DataLoader(dataset, batch_size, sampler=order, **options)
    if kind == "weighted":
        weighted = WeightedRandomSampler([1.0] * SIZE, SIZE)
        return DataLoader(dataset, batch_size, sampler=weighted, drop_last=True, **options)
    if kind == "batch sampler":
        return DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), batch_size, False), **options)
    if kind == "no batches":
        return DataLoader(dataset, batch_size=None, shuffle=True, **options)
    return DataLoader(dataset, batch_size, **options)


KINDS = ("shuffle", "own generator", "with replacement", "weighted", "batch sampler", "no batches", "in order")


def ids(stream: BatchStream, count: int) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch
            for batch in (stream.next_batch() for _ in range(count))]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_data_loader_resumes_at_any_batch_without_loading_what_was_used(kind: str, workers: int) -> None:
    """Two epochs and a half; with workers at a few places only, since each one starts processes."""
    total = 15 if kind != "no batches" else 50
    stops = range(total) if not workers else (0, 3, total // 2 + 1)
    dataset = Numbers(noisy=not workers)
    torch.manual_seed(1)
    straight = BatchStream(loader_of(kind, dataset, workers))
    expected, states, generators = [], [], []
    for _ in range(total):
        states.append(straight.state_dict())
        generators.append(capture_rng())
        expected += ids(straight, 1)
    final = capture_rng()
    for stop in stops:
        torch.manual_seed(99)
        fresh = Numbers(noisy=not workers)
        resumed = BatchStream(loader_of(kind, fresh, workers), log=lambda line: pytest.fail(line))
        resumed.load_state_dict(states[stop])
        restore_rng(generators[stop])
        assert fresh.asked == [] or workers
        assert ids(resumed, total - stop) == expected[stop:], f"from batch {stop}"
        assert all(torch.equal(final[key], value) for key, value in capture_rng().items())
    assert total > 10


@pytest.mark.parametrize(("size", "workers"), [(2, 0), (6, 0), (1, 0), (4, 2), (3, 2)])
def test_another_batch_split_or_worker_count_keeps_the_order_of_samples(size: int, workers: int) -> None:
    torch.manual_seed(1)
    straight = BatchStream(loader_of("shuffle", Numbers()))
    order = [sample for batch in ids(straight, 6) for sample in batch]
    torch.manual_seed(1)
    first = BatchStream(loader_of("shuffle", Numbers()))
    used = [sample for batch in ids(first, 3) for sample in batch]
    state = first.state_dict()
    second = BatchStream(loader_of("shuffle", Numbers(), workers, size))
    second.load_state_dict(state)
    rest: list[int] = []
    while len(used) + len(rest) < SIZE:
        rest += ids(second, 1)[0]
    assert used + rest == order and sorted(order) == list(range(SIZE))


def test_a_bare_iterable_is_read_again_batch_by_batch_and_the_log_says_so() -> None:
    class Lines(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(20)

    for loader in (DataLoader(Lines(), batch_size=3), [torch.tensor([i]) for i in range(7)]):
        straight = BatchStream(loader)
        expected = ids(straight, 9)
        first = BatchStream(loader)
        ids(first, 4)
        lines: list[str] = []
        second = BatchStream(loader, log=lines.append)
        second.load_state_dict(first.state_dict())
        assert ids(second, 5) == expected[4:]
        assert len(lines) == 1 and "4 batches one by one" in lines[0] and type(loader).__name__ in lines[0]


def test_data_that_became_shorter_are_refused() -> None:
    class Short(Numbers):
        def __len__(self) -> int:
            return 5

    torch.manual_seed(1)
    first = BatchStream(loader_of("shuffle", Numbers()))
    ids(first, 3)
    with pytest.raises(ValueError, match="had used 12 samples of this epoch, the sampler yields only 5"):
        BatchStream(loader_of("shuffle", Short())).load_state_dict(first.state_dict())


def signal_soon(number: int = signal.SIGTERM) -> None:
    threading.Thread(target=lambda: (time.sleep(0.05), os.kill(os.getpid(), number))).start()


def test_a_signal_breaks_a_wait_for_data_and_nothing_is_lost() -> None:
    class Slow(Numbers):
        slow_at = -1

        def __getitem__(self, index: int) -> int:
            item = super().__getitem__(index)
            if len(self.asked) == self.slow_at:
                time.sleep(60)
            return item

    for stop, whole_batches in ((1, 0), (2, 0), (14, 3), (24, 6)):  # 24: the first item of the second epoch
        dataset = Slow(noisy=True)
        dataset.slow_at = stop
        torch.manual_seed(1)
        random.seed(0)
        stream, interruption = BatchStream(loader_of("shuffle", dataset)), Interruption()
        np.random.seed(0)
        before = capture_rng()
        with interruption.watch():
            stream.waiting = interruption.breakable
            signal_soon()
            start = time.monotonic()
            seen = []
            while (batch := stream.next_batch()) is not None:
                seen.append(batch.tolist())
            assert time.monotonic() - start < 30 and interruption.requested == "SIGTERM"
        assert len(seen) == whole_batches
        # In a new process, and in this one: the same batches follow.
        state, generators = stream.state_dict(), capture_rng()
        stream.waiting = Interruption().breakable
        here = ids(stream, 8 - len(seen))
        resumed = BatchStream(loader_of("shuffle", Slow(noisy=True)))
        resumed.load_state_dict(state)
        restore_rng(generators)
        assert here == ids(resumed, 8 - len(seen))
        restore_rng(before)
        straight = BatchStream(loader_of("shuffle", Slow(noisy=True)))
        assert ids(straight, 8) == seen + here, f"broken at item {stop}"


def test_a_run_that_waits_for_its_data_is_served_at_once() -> None:
    class Hanging:
        def __iter__(self) -> Iterator[Any]:
            yield torch.zeros(1, 8, dtype=torch.int64)
            signal_soon(signal.SIGINT)
            time.sleep(60)

    start = time.monotonic()
    result = tiny_trainer(loader=Hanging()).train()
    assert (result.status, result.step, result.exit_code) == ("interrupted", 1, 130) and time.monotonic() - start < 30
