"""Float32 matrix products by oneDNN on CPUs where PyTorch's own choice leaves half of the processor idle.

`torch.mm` calls MKL, whose AVX-512 kernels run on Intel's processors only; on another maker's it computes with vectors
of half the width. oneDNN, in the same build of PyTorch, goes by what the processor can do: 2.1 times as fast on AMD's
Zen 5, and no faster on Zen 4, which computes AVX-512 in two halves (`pytest bench/bench_products.py`). `use_onednn`
gives the nn.Linear layers of a model a forward and backward by it. The decision depends on the processor and the shapes
alone, never on a timing: a resumed run computes the same bits.
Left out: attention's own products; 16-bit ones, which PyTorch gives to oneDNN already; and compiled graphs.
"""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_MULTIPLICATIONS = 1 << 22
"""Rows x inputs x outputs below which a product's fixed cost outweighs what oneDNN saves."""


@functools.cache
def onednn_advantage() -> tuple[bool, str]:
    """Whether oneDNN's float32 products are the faster ones on this processor, and why."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False, "this build of PyTorch has no oneDNN"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False, "without AVX-512, MKL's products are as fast"
    vendor, family = _processor()
    if vendor in ("GenuineIntel", ""):
        return False, "MKL uses this processor's AVX-512" if vendor else "the processor's maker is not known"
    if vendor == "AuthenticAMD" and family < _ZEN_5:
        return False, "this AMD processor computes AVX-512 in two halves, at the speed of MKL's AVX2"
    return True, f"this {vendor} processor has AVX-512, which MKL does not use"


_ZEN_5 = 26
"""The first family of AMD's processors that can compute 512 bits at once."""


def _processor() -> tuple[str, int]:
    """(maker, family) as the kernel tells them; ("", 0) where it does not."""
    try:
        lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return "", 0
    told = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    return told.get("vendor_id", ""), int(told.get("cpu family", 0))


def use_onednn(model: nn.Module) -> int:
    """Gives every float32 nn.Linear of `model` on a CPU a forward by oneDNN; returns how many. See `restore`.

    `y = x @ weight.T + bias` with x (..., inputs), weight (outputs, inputs); both gradients come from oneDNN as well.
    A layer whose forward is the user's own, or that is not exactly an nn.Linear, keeps it.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)
              and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32]
    for layer in layers:
        layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]
    return len(layers)


def restore(model: nn.Module) -> None:
    """Undoes `use_onednn`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is forward:
            del module.forward


def forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """nn.Linear's; under that name, so that a pickled layer comes back as a plain one."""
    weight = layer.weight
    suits = x.numel() * weight.size(0) >= MIN_MULTIPLICATIONS and x.dtype == torch.float32
    if not suits or torch.is_autocast_enabled("cpu") or _turned_off():
        return F.linear(x, weight, layer.bias)
    y: Tensor = _Linear.apply(x.reshape(-1, x.size(-1)), weight, layer.bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.size(0))


def _turned_off() -> bool:
    """By `torch.backends.mkldnn.flags(enabled=False)`, or in a compiled graph: Inductor takes this op with constant
    weights only."""
    return torch.compiler.is_compiling() or not torch._C._get_mkldnn_enabled()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias` by oneDNN: a (m, k), b (n, k), each contiguous or the transpose of a contiguous matrix.

    Other strides are copied: oneDNN takes minutes for them.
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")
    return y  # (m, n)


def _dense(a: Tensor) -> Tensor:
    return a if a.is_contiguous() or a.t().is_contiguous() else a.contiguous()


_SLICE_BYTES = 2 << 20
"""Of a result that has a place already, at a time: oneDNN returns fresh memory, and a little of it stays in cache."""


def usable(rows: int, weight: Tensor) -> bool:
    """Whether the functions below are the fast way to multiply (rows, k) by weight.T, weight (n, k)."""
    return (rows * weight.numel() >= MIN_MULTIPLICATIONS and weight.device.type == "cpu" and weight.is_contiguous()
            and weight.dtype == torch.float32 and onednn_advantage()[0] and not _turned_off())


def fill_product(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """out = a @ b.T + bias: out (m, n), a (m, k), b (n, k), bias (n,)."""
    for at in _slices(b.size(0), a.size(0)):
        out[:, at] = product(a, b[at], None if bias is None else bias[at])


def fill_transposed_product(total: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """total (+)= a.T @ b: total (m, n), a (k, m), b (k, n)."""
    b_transposed = b.t().contiguous()
    for at in _slices(a.size(1), max(a.size(0), b.size(1))):
        part = product(a[:, at].contiguous().t(), b_transposed)
        total[at].add_(part) if add else total[at].copy_(part)


def _slices(count: int, width: int) -> list[slice]:
    step = max(_SLICE_BYTES // (4 * max(width, 1)), 128)
    return [slice(begin, begin + step) for begin in range(0, count, step)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()  # (N, outputs)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (product(grad, weight.t()) if wants_x else None,
                product(grad.t(), x.t()) if wants_weight else None,
                grad.sum(0) if wants_bias else None)
