"""Small helpers that every level may use: seeding, random state as plain tensors, devices, human units.

Imports nothing of this package. Also the two small objects that watch a run: its clock
and its signals. Deliberately left out: anything that writes files or reads the environment.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

_PYTHON, _NUMPY, _TORCH, _CUDA = "python", "numpy", "torch", "cuda:"


def seed_all(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators (CPU and every CUDA device)."""
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rank_seed(seed: int, rank: int) -> int:
    """The seed of a rank's own generators (dropout); rank 0's is the run's."""
    return (seed + rank * 0x9E3779B97F4A7C15) % 2**63


def capture_rng() -> dict[str, Tensor]:
    """The global generators' states as int64/uint8 tensors, ready for a checkpoint without pickle.

    Keys: `python`, `numpy`, `torch`, and `cuda:i` for each device once CUDA is in use.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    if name != "MT19937":
        raise ValueError(f"NumPy's global generator is {name!r}; only MT19937 (the default) can be saved")
    states = {
        _PYTHON: torch.tensor([version, gauss is not None, _float_bits(gauss or 0.0), *words], dtype=torch.int64),
        _NUMPY: torch.tensor([position, has_gauss, _float_bits(cached), *keys.tolist()], dtype=torch.int64),
        _TORCH: torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index in range(torch.cuda.device_count()):
            states[f"{_CUDA}{index}"] = torch.cuda.get_rng_state(index)
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Puts back what `capture_rng` returned. States of CUDA devices that this machine lacks are left out."""
    for name in (_PYTHON, _NUMPY, _TORCH):
        if name not in states:
            raise ValueError(f"random state lacks {name!r} (it has {sorted(states)}); pass what capture_rng() returned")
    version, has_gauss, bits, *words = (int(word) for word in states[_PYTHON].tolist())
    random.setstate((version, tuple(words), _bits_float(bits) if has_gauss else None))
    position, cached, bits, *keys = (int(word) for word in states[_NUMPY].tolist())
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, cached, _bits_float(bits)))
    torch.set_rng_state(states[_TORCH].cpu())
    for name, state in states.items():
        if name.startswith(_CUDA) and torch.cuda.is_available():
            index = int(name[len(_CUDA):])
            if index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state.cpu(), index)


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Whatever is drawn inside leaves the global generators as they were, also when it raises."""
    states = capture_rng()
    try:
        yield
    finally:
        restore_rng(states)


class PhaseClock:
    """Where the wall-clock time goes. `mark(phase)` books everything since the previous mark, so the phases never
    overlap and add up to the whole. Host time only: work queued on a GPU counts where the host waits for it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.agreed: float | None = None
        """What `elapsed` says, where several processes have to see the same time."""
        self._start = self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def elapsed(self) -> float:
        """Seconds since the clock was made, as agreed if they were."""
        return self.passed() if self.agreed is None else self.agreed

    def passed(self) -> float:
        """Seconds since the clock was made, by this process."""
        return time.perf_counter() - self._start


class Interrupted(Exception):
    """A signal cut off a wait or a side task (evaluation, generation); what it was doing counts for nothing."""


class Interruption:
    """A flag that SIGTERM, SIGINT and SIGUSR1 set; `watch()` installs the handlers and puts the old ones back.

    The handler does nothing else: saving inside one could find the optimizer half-way through an update. Only inside
    `breakable()`, around waits in which nothing is half-done, it ends the wait as well. A second signal raises
    KeyboardInterrupt at once. Outside the main thread Python allows no handlers: then signals act as before.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.requested = ""
        """Name of the signal that came, empty before."""
        self.at = 0.0
        """When, on time.monotonic's clock."""
        self._breakable = False

    def __bool__(self) -> bool:
        return bool(self.requested)

    @property
    def seconds(self) -> float:
        """Time since the signal."""
        return time.monotonic() - self.at

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """Raises Interrupted in the block as soon as a signal comes, or at once if one has come."""
        try:
            self._breakable = True
            if self.requested:
                raise Interrupted(self.requested)
            yield
        finally:
            self._breakable = False

    def _note(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt(f"{signal.Signals(number).name} after {self.requested}")
        self.requested, self.at = signal.Signals(number).name, time.monotonic()
        if self._breakable:
            raise Interrupted(self.requested)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module, without torch.compile's and data-parallel wrappers (which would rename its parameters)."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def canonical_name(name: str) -> str:
    """A parameter's own name, without what torch.compile, activation checkpointing and FSDP put into it where they wrap
    a part of the model."""
    return _WRAPPERS.sub("", name)


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter (else buffer) lives; the CPU for a module that has neither."""
    tensors: Iterator[Tensor] = itertools.chain(model.parameters(), model.buffers())
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


_HOST_DEVICES = ("cpu",)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Passes forward and backward inside leave no trace: gradients (none inside, at first), buffers (a batch norm's
    averages), each module's mode and the global generators are put back. Costs a copy of the buffers."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for p, _ in gradients:
            p.grad = None
        with preserve_rng():
            yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA's error, PyTorch's CPU allocator (a plain RuntimeError), or Python's own."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text))


def draw_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of the generators that a forward pass draws from (dropout): the CPU's and the device's own."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_draw_state(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Puts back what `draw_state` returned."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)


def on_host(device: torch.device) -> bool:
    """Whether a tensor there is memory that Python can look at without waiting for queued work."""
    return device.type in _HOST_DEVICES


def read_scalar(value: Tensor | float) -> float:
    """A number, or a 0-d tensor as one. Where the tensor is not in host memory, this waits for the device."""
    if not isinstance(value, Tensor):
        return value
    return float(value.numpy()) if on_host(value.device) else float(value.item())


def peak_rss_bytes() -> int:
    """Most resident memory this process has had, in bytes; 0 where the platform does not tell."""
    if sys.platform == "win32":
        return 0
    import resource  # a Unix-only module of the standard library

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MemoryRoom(NamedTuple):
    """Bytes that can be allocated without swapping, and how many there are in all."""

    available: int
    total: int
    limit: str = ""
    """What sets it, where that is a limit on this process."""


def process_room() -> MemoryRoom | None:
    """What the nearest limit on this process's memory, touched or not, leaves: RLIMIT_DATA (`ulimit -d`) on what it can
    write to, or RLIMIT_AS (`ulimit -v`) on all addresses; None without one."""
    try:
        import resource

        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except (ImportError, OSError):
        return None
    used = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("VmData:", "VmSize:")))
    rooms = []
    for limit, field in (("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")):
        total = resource.getrlimit(getattr(resource, limit))[0]
        if field in used and total != resource.RLIM_INFINITY:
            rooms.append(MemoryRoom(max(0, total - int(used[field].split()[0]) * 1024), total, limit))
    return min(rooms, default=None)


def memory_room(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> MemoryRoom | None:
    """The machine's, the container's (cgroup v2) or this process's (`process_room`), whose limit is nearest;
    None where the platform does not tell. Files read into a container's page cache count as available: they are
    dropped first."""
    try:
        fields = dict(line.split(":", 1) for line in proc.read_text(encoding="ascii").splitlines())
        available, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return None
    room = MemoryRoom(available, total)
    room = min(room, process_room() or room)
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):
        return room
    return min(room, MemoryRoom(max(0, limit - used), limit))


def available_memory_bytes() -> int | None:
    """Memory that can be allocated without swapping; None where the platform does not tell."""
    room = memory_room()
    return None if room is None else room.available


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of tensors on a GPU, of the process elsewhere. Does not wait for the device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def format_count(n: float) -> str:
    """1234567 -> '1.23 M': three significant digits and a decimal prefix."""
    for size, prefix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= size * 0.9995:
            return f"{_three_digits(n / size)} {prefix}"
    return f"{n:g}" if isinstance(n, int) or float(n).is_integer() else _three_digits(n)


def format_bytes(n: float) -> str:
    """1536 -> '1.50 KiB': three significant digits and a binary prefix."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(n) >= size:
            return f"{_three_digits(n / size)} {unit}"
    return f"{int(n)} B"


def format_duration(seconds: float) -> str:
    """4 -> '4.0 s', 75 -> '1 min 15 s', 3725 -> '1 h 02 min'."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds * 1e3:.1f} ms" if 0 < seconds < 0.1 else f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.2f}" if magnitude < 9.995 else f"{value:.1f}" if magnitude < 99.95 else f"{value:.0f}"


def _float_bits(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _bits_float(bits: int) -> float:
    value: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return value
