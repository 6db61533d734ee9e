"""Float32 matrix products on CPUs where PyTorch's own choice leaves much of the processor idle.

`torch.mm` calls MKL, whose best kernels run on Intel's processors only. On another maker's,

    onednn     in the same build of PyTorch, computes with AVX-512 where MKL does not: 2.1 times as fast on AMD's Zen 5.
    fasttrain  csrc/products.cpp, for AMD's processors before, whose vectors are as wide as MKL's; on Zen 3 1.5, 1.3
               and 1.2 times as fast in a linear head's products (logits, gradients of weight and hidden states) and
               0.9 to 1.1 in a layer's. Its sums do not depend on the number of threads. Zen 4 has not been measured.

All by `pytest bench/bench_products.py`.

`use_fast_products` gives the nn.Linear layers of a model a forward and backward by them. The decision depends on the
processor and the shapes alone, never on a timing: a resumed run computes the same bits.
Left out: attention's own products; 16-bit ones, which PyTorch gives to oneDNN already; and compiled graphs.
"""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backend import CPP_PROBLEM, instruction_set

By = Literal["torch", "onednn", "fasttrain"]
"""Whose kernels multiply."""

MIN_MULTIPLICATIONS = 1 << 22
"""Rows x inputs x outputs below which a product's fixed cost outweighs what a faster one saves."""


@functools.cache
def fastest() -> tuple[By, str]:
    """Whose float32 products are the fast ones on this processor, and why."""
    vendor, family = _processor()
    width = torch.backends.cpu.get_cpu_capability()
    if vendor in ("GenuineIntel", ""):
        return "torch", "MKL is made for this processor" if vendor else "the processor's maker is not known"
    if width.startswith("AVX512") and not (vendor == "AuthenticAMD" and family < _ZEN_5):
        if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return "onednn", f"this {vendor} processor has AVX-512, which MKL does not use"
        return "torch", "this build of PyTorch has no oneDNN"
    if vendor == "AuthenticAMD" and instruction_set() in ("avx2", "avx512"):
        return "fasttrain", "MKL's kernels are not made for this AMD processor"
    return "torch", CPP_PROBLEM or f"nothing is known to be faster than MKL on this {vendor} processor"


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


def use_fast_products(model: nn.Module) -> int:
    """Gives every float32 nn.Linear of `model` on a CPU a forward by `fastest()`; returns how many. See `restore`.

    `y = x @ weight.T + bias` with x (..., inputs), weight (outputs, inputs); both gradients are computed so as well.
    A layer whose forward is the user's own, or that is not exactly an nn.Linear, keeps it.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)
              and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32]
    for layer in layers:
        layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]
    return len(layers)


def restore(model: nn.Module) -> None:
    """Undoes `use_fast_products`."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is forward:
            del module.forward


def forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """nn.Linear's; under that name, so that a pickled layer comes back as a plain one."""
    weight = layer.weight
    suits = x.numel() * weight.size(0) >= MIN_MULTIPLICATIONS and x.dtype == torch.float32
    by = _allowed() if suits and not torch.is_autocast_enabled("cpu") else "torch"
    if by == "torch":
        return F.linear(x, weight, layer.bias)
    y: Tensor = _Linear.apply(by, x.reshape(-1, x.size(-1)), weight, layer.bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.size(0))


def _allowed() -> By:
    """`fastest()`, but for what forbids it: `torch.backends.mkldnn.flags(enabled=False)` oneDNN, and a compiled graph
    both (Inductor takes oneDNN's op with constant weights only)."""
    by = fastest()[0]
    if torch.compiler.is_compiling() or (by == "onednn" and not torch._C._get_mkldnn_enabled()):
        return "torch"
    return by


def kernels_for(rows: int, weight: Tensor) -> By:
    """Whose kernels are the fast ones to multiply (rows, k) by weight.T, weight (n, k), in the functions below."""
    suits = (rows * weight.numel() >= MIN_MULTIPLICATIONS and weight.device.type == "cpu" and weight.is_contiguous()
             and weight.dtype == torch.float32)
    return _allowed() if suits else "torch"


def multiply(by: By, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`: a (m, k), b (k, n), each contiguous or the transpose of a contiguous matrix."""
    if by == "onednn":
        return _by_onednn(a, b.t())
    if by == "torch":
        return torch.mm(a, b)
    out = a.new_empty((a.size(0), b.size(1)))
    torch.ops.fasttrain.product_(out, _dense(a), _dense(b), None, False)
    return out


def multiply_into(by: By, out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """`out = a @ b + bias`: out (m, n) contiguous, a (m, k), b (k, n), bias (n,)."""
    if by == "fasttrain":
        torch.ops.fasttrain.product_(out, _dense(a), _dense(b), bias, False)
    elif by == "onednn":
        for at in _slices(b.size(1), a.size(0)):
            out[:, at] = _by_onednn(a, b.t()[at], None if bias is None else bias[at])
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def add_transposed_product(by: By, total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """`total (+)= a.T @ b`, set by the first: total (m, n), of a wider type or a's, a (k, m), b (k, n)."""
    if by != "torch" and not total.is_contiguous():
        by = "torch"
    if by == "fasttrain":
        torch.ops.fasttrain.product_(total, _dense(a).t(), _dense(b), None, not first)
    elif by == "onednn":
        b_transposed = b.t().contiguous()
        for at in _slices(a.size(1), max(a.size(0), b.size(1))):
            part = _by_onednn(a[:, at].contiguous().t(), b_transposed)
            total[at].copy_(part) if first else total[at].add_(part)
    elif total.dtype == a.dtype:
        torch.mm(a.t(), b, out=total) if first else total.addmm_(a.t(), b)
    else:
        total.copy_(torch.mm(a.t(), b)) if first else total.add_(torch.mm(a.t(), b))


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias`: a (m, k), b (n, k). Other strides than `_dense`'s are copied: oneDNN takes minutes for them."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")
    return y  # (m, n)


def _dense(a: Tensor) -> Tensor:
    return a if a.is_contiguous() or a.t().is_contiguous() else a.contiguous()


SLICE_BYTES = 2 << 20
"""Of a result that has a place already, at a time: oneDNN returns fresh memory, and a little of it stays in cache."""


def _slices(count: int, width: int) -> list[slice]:
    step = max(SLICE_BYTES // (4 * max(width, 1)), 128)
    return [slice(begin, begin + step) for begin in range(0, count, step)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by: By, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by = by
        if by == "onednn":
            return _by_onednn(x, weight, bias)
        y = x.new_empty((x.size(0), weight.size(0)))
        multiply_into(by, y, x, weight.t(), bias)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()  # (N, outputs)
        _, wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (None, multiply(ctx.by, grad, weight) if wants_x else None,
                multiply(ctx.by, grad.t(), x) if wants_weight else None,
                grad.sum(0) if wants_bias else None)


_LIBRARY: Any = torch.library.Library("fasttrain", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("product_(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, bool add) -> ()")
torch.library.register_fake("fasttrain::product_", lambda *args: None, lib=_LIBRARY)
