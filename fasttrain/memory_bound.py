"""Gives kept memory back when the machine, or the container, runs short of it.

`optimizations.tune_cpu_memory` keeps freed tensors' memory in the process, which is what makes steps fast; a run must
not hoard it while something else needs it. Looked at with every log record; nothing happens while there is room.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .callbacks import Callback, Run
from .utils import device_of, format_bytes, memory_room

if TYPE_CHECKING:
    from .state import TrainState

SCARCE = 8
"""Memory is short when less than one part in so many is available."""


class MemoryBound(Callback):
    """`malloc_trim` while less than 1/8 of the memory is available; said once a run. On the CPU, with glibc."""

    observer = True
    collective = True  # each rank's own memory

    def __init__(self) -> None:
        self.times = 0
        """How often memory was given back."""
        self._log: Any = print

    def on_train_start(self, state: TrainState, run: Run) -> None:
        self._log = run.log

    def on_log(self, state: TrainState, record: Mapping[str, Any]) -> None:
        if device_of(state.model).type != "cpu":
            return
        room = memory_room()
        if room is None or room.available * SCARCE >= room.total or not give_back():
            return
        self.times += 1
        if self.times == 1:
            self._log(f"memory is short ({format_bytes(room.available)} of {format_bytes(room.total)} available): the "
                      "memory of freed tensors goes back to the system, at every log record while it stays so")


def give_back() -> bool:
    """Returns what the heap holds and no tensor uses to the system; False where that is not glibc's heap."""
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0)))
