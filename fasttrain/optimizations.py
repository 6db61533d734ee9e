"""Switches that make a run faster without changing what it computes; each says whether it is on, and why.

Nothing here acts at import. `apply_optimizations` is called once by the Trainer; a script can call it, or only
`tune_cpu_memory`, itself. Each switch can be turned back. Left out: anything that changes the arithmetic of the model.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .config import TrainConfig
from .ops import backend_info
from .utils import format_bytes

_MEMORY = "cpu memory policy"


@dataclass(frozen=True)
class Optimization:
    """One switch: `name`, whether it is `on`, and the `reason` in words."""

    name: str
    on: bool
    reason: str
    restore: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)
    """Turns the switch back off; does nothing if it is off."""


def apply_optimizations(model: nn.Module, config: TrainConfig,
                        device: torch.device) -> tuple[nn.Module, list[Optimization]]:
    """Turns on what `config` asks for and this device can do.

    Returns the module to train (`model` itself, or its compiled form, which shares its parameters) and the decisions.
    """
    decisions = [
        _fused_loss(device),
        tune_cpu_memory() if device.type == "cpu" else Optimization(_MEMORY, False, f"the model is on {device.type}"),
        _tf32(device),
        _activation_checkpointing(model, config.activation_checkpointing),
    ]
    if config.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    reason = "compile=True" if config.compile else "compile=False (the default)"
    decisions.append(Optimization("torch.compile", config.compile, reason))
    return model, decisions


def _fused_loss(device: torch.device) -> Optimization:
    choice = backend_info()["cross_entropy"].get(device.type)
    if choice is None:
        return Optimization("fused cross-entropy", False, f"no compiled kernel for {device.type}: plain PyTorch runs")
    return Optimization("fused cross-entropy", choice.impl != "reference", choice.reason or f"{choice.impl} kernel")


def _tf32(device: torch.device) -> Optimization:
    """Float32 matrix products on tensor cores: 10 bits of mantissa in the factors, float32 sums."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return Optimization("TF32 matmuls", False, "needs an NVIDIA GPU of compute capability 8.0 or later")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    return Optimization("TF32 matmuls", True, "float32 products run on tensor cores",
                        functools.partial(torch.set_float32_matmul_precision, before))


def _activation_checkpointing(model: nn.Module, mode: str) -> Optimization:
    """Recomputes each block in the backward: one block's activations in memory instead of all, for one more forward."""
    name = "activation checkpointing"
    if mode == "none":
        return Optimization(name, False, "activation_checkpointing='none' (the default)")
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(f"activation_checkpointing is {mode!r}, but {type(model).__name__} holds no nn.ModuleList of "
                         "two or more blocks of one class to recompute; set it to 'none'")

    def recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def restore() -> None:
        for block in blocks:
            block.__dict__.pop("forward", None)

    for block in blocks:  # on the instance: names in the state_dict stay as they are
        block.forward = functools.partial(recomputed, block.forward)
    return Optimization(name, True, f"{len(blocks)} {type(blocks[0]).__name__} modules are recomputed in the backward",
                        restore)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the longest nn.ModuleList whose members are all of one class."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    uniform = [blocks for blocks in lists if len(blocks) > 1 and len({type(block) for block in blocks}) == 1]
    return max(uniform, key=len, default=[])


# --- CPU memory policy ---------------------------------------------------------------------------------------------

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_DEFAULT_MMAP_MAX, _DEFAULT_THRESHOLD = 65536, 128 * 1024
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 << 20


def tune_cpu_memory(reserve_bytes: int | None = None) -> Optimization:
    """Keeps freed tensor memory in the process, on 2 MiB pages, instead of returning it to the kernel each time.

    By default every large tensor is a fresh mapping that is zeroed and faulted in 4 KiB at a time and given back when
    the tensor dies: a third of a CPU training step can go into that. Two glibc settings (no mmap for large blocks, no
    trimming) keep the memory, and `madvise(MADV_HUGEPAGE)` on the heap's next `reserve_bytes` (address space only:
    nothing is resident until it is used; default half of the memory now available) makes its faults 512 times rarer.
    The price is a higher peak of resident memory, since kept blocks fragment; `bench/bench_cpu_memory.py` shows both.

    Process-wide. `.restore()` of the result gives the free memory back and sets glibc's defaults again (except that
    glibc's self-adjusting mmap threshold stays off, which cannot be undone). Off elsewhere than on Linux with glibc.
    """
    name = _MEMORY
    libc_name, _ = platform.libc_ver()
    if libc_name != "glibc":
        other = libc_name or "another C library"
        return Optimization(name, False, f"needs glibc's mallopt; this is {platform.system()} with {other}")
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        return Optimization(name, False, "glibc refused mallopt")

    def restore() -> None:
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.malloc_trim(ctypes.c_size_t(0))

    pages = _advise_huge_heap(libc, _available_bytes() // 2 if reserve_bytes is None else reserve_bytes)
    return Optimization(name, True, f"freed tensors stay in the process; {pages}", restore)


def _advise_huge_heap(libc: ctypes.CDLL, num_bytes: int) -> str:
    """Grows the heap by `num_bytes` of untouched address space that the kernel may back with huge pages."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            if "[never]" in file.read():
                return "huge pages are off in this kernel"
    except OSError:
        return "this kernel has no huge pages"
    block = libc.malloc(num_bytes)
    if not block:
        return f"no huge pages: {format_bytes(num_bytes)} of address space were refused"
    begin = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    end = (block + num_bytes) // _HUGE_PAGE * _HUGE_PAGE
    advised = end > begin and libc.madvise(begin, end - begin, _MADV_HUGEPAGE) == 0
    libc.free(block)
    return f"huge pages for the next {format_bytes(num_bytes)}" if advised else "the kernel refused huge pages"


def _available_bytes() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 << 30
