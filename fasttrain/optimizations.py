"""Switches that make a run faster without changing what it computes; each says whether it is on, and why.

Nothing here acts at import. `apply_optimizations` is called once by the Trainer; a script can call it, or only
`tune_cpu_memory`, itself. Each switch can be turned back. Left out: anything that changes the arithmetic of the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .config import TrainConfig
from .losses import linear_head
from .ops import backend_info
from .ops._dispatch import choose
from .ops.adamw import AdamW
from .products import fastest, use_fast_products
from .products import restore as restore_products
from .utils import available_memory_bytes, format_bytes, process_room

_MEMORY = "cpu memory policy"


@dataclass(frozen=True)
class Optimization:
    """One switch: `name`, whether it is `on`, and the `reason` in words."""

    name: str
    on: bool
    reason: str
    restore: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)
    """Turns the switch back off; does nothing if it is off."""


def apply_optimizations(model: nn.Module, config: TrainConfig, device: torch.device, *, own_loss: bool = False,
                        loader: Any = None) -> tuple[nn.Module, list[Optimization]]:
    """Turns on what `config` asks for and this device can do. `own_loss`: training calls a loss function of the user's.

    Returns the module to train (`model` itself, or its compiled form, which shares its parameters) and the decisions.
    """
    decisions = [
        _fused_loss(device),
        _fused_linear_loss(model, device, own_loss),
        tune_cpu_memory() if device.type == "cpu" else Optimization(_MEMORY, False, f"the model is on {device.type}"),
        _products(model, device),
        _tf32(device),
        _activation_checkpointing(model, config.activation_checkpointing),
        Optimization("threads", True, f"{torch.get_num_threads()} of {os.cpu_count() or 1} logical CPUs, as PyTorch "
                                      "was told (torch.set_num_threads)"),
        _prefetch(loader),
    ]
    if config.compile:
        model, compiled = compile_model(model)
        return model, [*decisions, compiled]
    return model, [*decisions, Optimization("torch.compile", False, "compile=False (the default)")]


def optimizer_switches(optimizer: Optimizer) -> list[Optimization]:
    """What the optimizer is: not this module's to switch, but part of the picture."""
    name, narrow = "fused AdamW", "narrow optimizer states"
    if not isinstance(optimizer, AdamW):
        return [Optimization(name, False, f"the optimizer is the user's {type(optimizer).__name__}"),
                Optimization(narrow, False, "they belong to fasttrain's AdamW")]
    device = optimizer.param_groups[0]["params"][0].device.type
    choice = choose("adamw", device)
    fused = optimizer.impl != "reference" and choice.impl != "reference"
    dtype = optimizer.state_dtype
    return [Optimization(name, fused, f"{choice.impl} kernel: norm, verdict, clip and update in two passes" if fused
                         else choice.reason or "impl='reference' was asked for"),
            Optimization(narrow, dtype != "float32", f"optimizer_state_dtype={dtype!r}")]


def compile_model(model: nn.Module) -> tuple[nn.Module, Optimization]:
    """Through torch.compile: as a whole, or, for a Hugging Face model whose loss comes from its hidden states, its
    base_model in place, so that the logits are still not made."""
    name = "torch.compile"
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model and linear_head(model)[0] is not None:
        base.compile()

        def restore() -> None:
            base._compiled_call_impl = None

        return model, Optimization(name, True, f"compile=True: {type(base).__name__} in place, the head is left out",
                                   restore)
    return torch.compile(model), Optimization(name, True, "compile=True")  # type: ignore[return-value]


def _prefetch(loader: Any) -> Optimization:
    """Whether the next batch is made while this one is trained on."""
    name = "data prefetch"
    ahead = getattr(loader, "num_prefetch", None)
    workers = getattr(loader, "num_workers", None)
    if isinstance(ahead, int) and ahead:
        return Optimization(name, True, f"{type(loader).__name__} makes {ahead} batches ahead in a thread")
    if isinstance(workers, int) and workers:
        return Optimization(name, True, f"{workers} worker processes of the DataLoader")
    if isinstance(loader, (list, tuple)):
        return Optimization(name, False, "the batches are in memory already")
    way_out = ": DataLoader(num_workers=...) would" if workers == 0 else ""
    return Optimization(name, False, f"{type(loader).__name__} makes batches when they are asked for{way_out}")


def _fused_loss(device: torch.device) -> Optimization:
    choice = backend_info()["cross_entropy"].get(device.type)
    if choice is None:
        return Optimization("fused cross-entropy", False, f"no compiled kernel for {device.type}: plain PyTorch runs")
    return Optimization("fused cross-entropy", choice.impl != "reference", choice.reason or f"{choice.impl} kernel")


def _fused_linear_loss(model: nn.Module, device: torch.device, own_loss: bool) -> Optimization:
    """Reports what `batch_loss` does: the head and the loss in one op, in chunks, in place of all the logits."""
    name = "fused linear loss"
    head, reason = linear_head(model)
    if own_loss or head is None:
        return Optimization(name, False, "loss_fn is the user's own" if own_loss else reason)
    choice = backend_info()["linear_cross_entropy"].get(device.type)
    if choice is None or choice.impl == "reference":
        other = f"no compiled kernel for {device.type}: plain PyTorch runs"
        return Optimization(name, False, choice.reason if choice else other)
    return Optimization(name, True, f"{reason}; {choice.impl} kernel")


def _products(model: nn.Module, device: torch.device) -> Optimization:
    """Whose kernels multiply the float32 matrices of the linear layers."""
    name = "matrix products"
    if device.type != "cpu":
        return Optimization(name, False, f"the model is on {device.type}")
    by, reason = fastest()
    count = use_fast_products(model) if by != "torch" else 0
    if by != "torch":
        reason = f"{by}: {reason}; {count} linear layers" if count else "the model has no float32 nn.Linear"
    return Optimization(name, count > 0, reason, functools.partial(restore_products, model))


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
    every = int(mode.removeprefix("every_")) if mode.startswith("every_") else 1
    blocks = repeated_blocks(model)[::every]
    if not blocks:
        raise ValueError(f"activation_checkpointing is {mode!r}, but {type(model).__name__} holds no nn.ModuleList of "
                         "two or more blocks of one class to recompute; set it to 'none'")

    options: dict[str, Any] = {"context_fn": _keep_products} if mode == "selective" else {}

    def recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    def restore() -> None:
        for block in blocks:
            block.__dict__.pop("forward", None)

    for block in blocks:  # on the instance: names in the state_dict stay as they are
        block.forward = functools.partial(recomputed, block.forward)
    what = ", all but their matrix products" if options else ""
    return Optimization(name, True, f"{len(blocks)} {type(blocks[0]).__name__} modules are recomputed in the "
                                    f"backward{what}", restore)


def _keep_products() -> Any:
    """Saves what is dear to compute (matrix products, attention), recomputes the element-wise rest."""
    aten = torch.ops.aten
    dear = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default]
    return create_selective_checkpoint_contexts(dear)  # type: ignore[no-untyped-call]


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
    In a Trainer's run it is bounded: see memory_bound.py.

    Under a limit on the process's memory (`ulimit -d`, `ulimit -v`) it does the opposite: every large tensor stays a
    mapping of its own. glibc gives that up when the first of them dies, and parameters that are gathered and dropped
    (fsdp) then leave holes in the heap, together larger than the whole model.

    Process-wide. `.restore()` of the result gives the free memory back and sets glibc's defaults again (except that
    glibc's self-adjusting mmap threshold stays off, which cannot be undone). Off elsewhere than on Linux with glibc.
    """
    name = _MEMORY
    libc_name, _ = platform.libc_ver()
    if libc_name != "glibc":
        other = libc_name or "another C library"
        return Optimization(name, False, f"needs glibc's mallopt; this is {platform.system()} with {other}")
    libc = ctypes.CDLL(None)
    if (room := process_room()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)  # in the heap, blocks of many sizes leave holes
        return Optimization(name, False, f"a limit on this process's memory ({room.limit}) counts what is kept, too; "
                                         "large tensors go back to the system when they die")
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        return Optimization(name, False, "glibc refused mallopt")

    def restore() -> None:
        libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_THRESHOLD)
        libc.malloc_trim(ctypes.c_size_t(0))

    pages = _advise_huge_heap(libc, (available_memory_bytes() or 8 << 30) // 2 if reserve_bytes is None
                              else reserve_bytes)
    return Optimization(name, True, f"freed tensors stay in the process; {pages}", restore)


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """`tune_cpu_memory` inside, for a model on the CPU; the kept memory is given back at the end."""
    policy = tune_cpu_memory() if device.type == "cpu" else None
    try:
        yield
    finally:
        if policy is not None:
            policy.restore()


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
