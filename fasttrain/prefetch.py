"""Work done ahead by one thread, in order: what hides the assembling of a batch behind the training step."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


def prefetch(make: Callable[[InputT], OutputT], inputs: Sequence[InputT], num_ahead: int,
             ) -> Generator[OutputT, None, None]:
    """make(item) for each input, in order, the next `num_ahead` of them made by a thread meanwhile (0: no thread).

    An error in the thread is raised here, at its place in the order. Closing or dropping the generator ends the thread.
    """
    if num_ahead == 0:
        for item in inputs:
            yield make(item)
        return
    made: queue.SimpleQueue[tuple[OutputT | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(num_ahead)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in inputs:
                room.acquire()
                if stopped.is_set():
                    return
                made.put((make(item), None))
        except BaseException as error:  # not swallowed: the consumer raises it
            made.put((None, error))

    # A daemon: a generator that is still referenced when the program ends must not keep it from ending.
    thread = threading.Thread(target=work, name="fasttrain-prefetch", daemon=True)
    thread.start()
    try:
        for _ in inputs:
            output, error = made.get()
            room.release()
            if error is not None:
                raise error
            yield output  # type: ignore[misc]
    finally:
        stopped.set()
        room.release()
        if not sys.is_finalizing():  # by then daemon threads are frozen, and joining one would wait for ever
            thread.join()
