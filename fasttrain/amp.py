"""Which number format the forward and backward run in, and why: the best reduced precision that is faster here.

GPUs with native bfloat16 get bfloat16 autocast; older ones float16 with a gradient scaler; a CPU gets bfloat16 only if
it has the instructions and a small measured probe confirms the gain (without them a bfloat16 matmul is hundreds of
times slower). Weights and optimizer state stay in float32; the loss is float32 whatever comes in.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

_PROBE_SECONDS = 0.1
_PROBE_GAIN = 1.2
"""A reduced format must beat float32 by this factor, or timing noise would decide what a run computes."""


@dataclass(frozen=True)
class AmpPolicy:
    """The decision for one device."""

    device_type: str
    dtype: torch.dtype
    """float32: autocast off."""
    reason: str
    needs_scaler: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context for a forward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype)

    def build_scaler(self) -> GradScaler | None:
        # The loop differentiates a sum over thousands of targets, not a mean: the usual 65536 would overflow at once.
        return GradScaler(self.device_type, init_scale=64.0) if self.needs_scaler else None


def choose_policy(precision: str, use_amp: bool | None, device: torch.device) -> AmpPolicy:
    """The policy for `TrainConfig.precision` and the Trainer's `use_amp` (None: as precision says).

    Raises:
        ValueError: `use_amp` contradicts a named precision, or the device cannot run it.
    """
    if use_amp is True and precision == "float32":
        raise ValueError("use_amp is True but TrainConfig.precision is 'float32'; set precision='auto', or "
                         "use_amp=False")
    if use_amp is False and precision not in ("auto", "float32"):
        raise ValueError(f"use_amp is False but TrainConfig.precision is {precision!r}; drop one of the two")
    kind = device.type
    if use_amp is False:
        return AmpPolicy(kind, torch.float32, "use_amp=False")
    if precision == "float32":
        return AmpPolicy(kind, torch.float32, "precision='float32' was asked for")
    if precision == "float16":
        if kind != "cuda":
            raise ValueError(f"TrainConfig.precision is 'float16' on {kind}; float16 needs a CUDA device (use 'auto')")
        return AmpPolicy(kind, torch.float16, "precision='float16' was asked for", needs_scaler=True)
    if precision == "bfloat16":
        return AmpPolicy(kind, torch.bfloat16, "precision='bfloat16' was asked for")
    return _automatic(device)


def _automatic(device: torch.device) -> AmpPolicy:
    kind = device.type
    if kind == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.get_device_capability(device)[0] >= 8 or torch.version.hip is not None:
            return AmpPolicy(kind, torch.bfloat16, f"{name} runs bfloat16 natively")
        return AmpPolicy(kind, torch.float16, f"{name} has no native bfloat16: float16 with a gradient scaler", True)
    if kind == "cpu":
        features = cpu_bf16_features()
        if not features:
            return AmpPolicy(kind, torch.float32, "this CPU has no bfloat16 instructions: float32 is faster")
        gain = probe_cpu_bf16_gain()
        shown = f"this CPU has {', '.join(features)} and a probe ran its matmul {gain:.1f}x as fast as float32"
        if gain >= _PROBE_GAIN:
            return AmpPolicy(kind, torch.bfloat16, shown)
        return AmpPolicy(kind, torch.float32, f"{shown}, below the {_PROBE_GAIN}x that would pay for it")
    return AmpPolicy(kind, torch.float32, f"no reduced precision is chosen automatically on {kind}")


def cpu_bf16_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Instruction sets that multiply bfloat16, of avx512_bf16, amx_bf16 and (Arm) bf16; empty where unknown."""
    if not cpuinfo.is_file():
        return ()
    for line in cpuinfo.read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            present = line.split(":", 1)[1].split()
            return tuple(name for name in ("avx512_bf16", "amx_bf16", "bf16") if name in present)
    return ()


@functools.lru_cache(maxsize=1)
def probe_cpu_bf16_gain() -> float:
    """Time of a 256 x 512 x 512 linear layer's forward and backward in float32 over its time under autocast.

    On one thread, and the best of interleaved rounds within about 0.1 s: what a run computes must not depend on who
    else was busy on the machine meanwhile. Draws from no global generator.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _bf16_gain()
    finally:
        torch.set_num_threads(threads)


def _bf16_gain() -> float:
    x = torch.linspace(-1, 1, 256 * 512).view(256, 512)
    weight = torch.linspace(-1, 1, 512 * 512).view(512, 512).requires_grad_()

    def run(autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> float:
        start = time.perf_counter()
        with autocast():
            y = x @ weight
        y.float().sum().backward()  # type: ignore[no-untyped-call]
        weight.grad = None
        return time.perf_counter() - start

    plain, reduced = contextlib.nullcontext, functools.partial(torch.autocast, "cpu", torch.bfloat16)
    run(plain), run(reduced)  # the first call of each sets up its kernels
    times: tuple[list[float], list[float]] = ([], [])
    stop = time.perf_counter() + _PROBE_SECONDS
    while not times[1] or time.perf_counter() < stop:
        times[0].append(run(plain))
        times[1].append(run(reduced))
    return min(times[0]) / min(times[1])
