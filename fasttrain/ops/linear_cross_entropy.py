"""Cross-entropy of a linear head without its logits: hidden states and weight in, loss and gradients out.

The N x V logits are the largest tensor of a language model's training step. Here they exist only a chunk of rows at a
time, in one workspace: a matrix product fills it, the row kernel of `cross_entropy` turns it into its own gradient in
place, two more products consume it. Rows without a target are left out of all three. Left out: class weights,
probability targets, skipping small gradients (inexact), and a second derivative.

Legend: N rows (tokens), D hidden size, V classes (vocabulary), n rows of a chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import TRITON_INTERPRETED
from ..products import fill_product, fill_transposed_product, product, usable
from ..utils import on_host, read_scalar
from ._dispatch import IMPLEMENTATIONS, Impl, resolve
from .cross_entropy import (
    TERMS_SCHEMA,
    Reduction,
    Terms,
    check_terms,
    cross_entropy_reference,
    raise_if_target_out_of_range,
)

IMPLEMENTATIONS["linear_cross_entropy"] = ("reference", "cpp", "triton")

WORKSPACE_BYTES = {"cpu": 56 << 20, "cuda": 512 << 20}
"""What a chunk of logits may take: 64 MiB with the products' own; a GPU needs thousands of rows to be kept busy."""

MIN_ROWS = 128
"""Of a chunk, whatever they take: each chunk reads the whole weight, and writes its whole gradient."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
                         ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
                         softcap: float | None = None, reduction: Reduction = "mean", impl: Impl = "auto") -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, targets, ...)` in the memory of one chunk of logits.

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64; any strides.
        weight: (V, D), any of these types, not necessarily hidden's; any strides. May be in use elsewhere (tied).
        targets: (N,), int64 or int32, each in [0, V) or equal to `ignore_index`; rows of the latter cost nothing on a
            CPU. (A GPU computes them: to count them would stall it.)
        bias: (V,) or None.
        label_smoothing, z_loss, softcap, reduction, impl: as in `cross_entropy`.

    The products are computed in the wider of the two types; under `torch.autocast` in its type; on a CPU in float32
    unless autocast says bfloat16 (most CPUs multiply 16-bit matrices a hundred times slower). The gradient of the
    weight is accumulated over the chunks in float32 whatever its type.

    Returns:
        float32 (float64 for float64 inputs): 0-d, or (N,) for "none". The mean over no target is NaN, as in PyTorch.

    Raises:
        ValueError: wrong shape, dtype, device or option.
        IndexError: a target out of range. On CUDA, where looking would stall the device, that row's loss is NaN.

    Memory beyond results and gradients: one chunk of logits, `WORKSPACE_BYTES` or `MIN_ROWS` rows if those are more;
    for 16-bit weights also a float32 copy (CPU) and a float32 sum of the gradient.

    Saved for backward: the inputs; with "mean" and "sum" also the finished gradients of those inputs that want one.
    With "none" they are computed in the backward, which computes the logits again.

    Equivalent to: `F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, ...)`.
    """
    _check(hidden, weight, targets, bias)
    check_terms(label_smoothing, z_loss, softcap, reduction)
    chosen = resolve("linear_cross_entropy", impl, hidden)
    if chosen == "triton" and impl == "auto" and torch.float64 in (hidden.dtype, weight.dtype):
        chosen = "reference"  # the Triton kernels compute in float32
    terms = Terms(ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0))
    targets = targets.long().contiguous()
    interpreted = chosen == "triton" and hidden.device.type == "cpu"
    try:
        if chosen == "reference":
            return linear_cross_entropy_reference(hidden, weight, targets, bias, terms, reduction)
        namespace = "fasttrain_interpreted" if interpreted else "fasttrain"
        return _run(namespace, hidden, weight, bias, targets, terms, reduction)
    except (RuntimeError, IndexError):
        raise_if_target_out_of_range(targets, weight.size(0), ignore_index)
        raise


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, terms: Terms,
                                   reduction: Reduction) -> Tensor:
    """The truth that the kernels are tested against: all the logits, at least in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        wide = _at_least_float32(torch.promote_types(hidden.dtype, weight.dtype))
        logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))  # (N, V)
        return cross_entropy_reference(logits, targets, terms, reduction)


def _run(namespace: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, terms: Terms,
         reduction: Reduction) -> Tensor:
    kernels: Any = getattr(torch.ops, namespace)
    compute = _compute_dtype(hidden, weight)
    loss: Tensor
    if reduction == "none":
        loss = kernels.linear_cross_entropy_forward(hidden, weight, bias, targets, compute, *terms)
        return loss
    scale = torch.ones((), dtype=_at_least_float32(compute), device=hidden.device)
    if reduction == "mean":
        scale = scale / (targets != terms.ignore_index).sum()
    needs = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    if not torch.is_grad_enabled() or not any(needs):
        loss = kernels.linear_cross_entropy_forward(hidden, weight, bias, targets, compute, *terms).sum() * scale
    elif torch.compiler.is_compiling():
        loss = kernels.linear_cross_entropy_fused(hidden, weight, bias, targets, scale, compute, needs, *terms)[0]
    else:
        loss = _GradientInForward.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, scale, compute, terms, namespace)
    return loss


class _GradientInForward(torch.autograd.Function):
    """scale * sum of the losses, with its gradients computed from the same logits.

    Outside a compiled graph this stands in for the op's own autograd, which may not hand out what it saved: a copy.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
                compute: torch.dtype, terms: Terms, namespace: str) -> Tensor:
        loss, *gradients = getattr(torch.ops, namespace).linear_cross_entropy_fused(
            hidden, weight, bias, targets, scale, compute, ctx.needs_input_grad[:3], *terms)
        ctx.save_for_backward(hidden, weight, bias, targets, scale)
        ctx.compute, ctx.terms, ctx.namespace, ctx.gradients = compute, terms, namespace, gradients
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        hidden, weight, bias, targets, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients, ctx.gradients = ctx.gradients, None  # handed out once: their receivers may write to them
        if gradients is None:  # a second backward over a retained graph
            row_gradients = (grad_output * scale).expand(targets.size(0))
            gradients = getattr(torch.ops, ctx.namespace).linear_cross_entropy_backward(
                hidden, weight, bias, targets, row_gradients, ctx.compute, needs, *ctx.terms)
        elif not on_host(hidden.device) or read_scalar(grad_output.detach()) != 1.0:  # never waits for a device
            for gradient, needed in zip(gradients, needs):
                if needed:
                    _scale_in_place(gradient, grad_output)
        return (*_wanted(gradients, needs), *[None] * 5)


def _scale_in_place(gradient: Tensor, factor: Tensor) -> None:
    if gradient.device.type == "cuda":
        from ..kernels.cross_entropy import scale_inplace  # triton is imported by the first call that needs it

        scale_inplace(gradient if gradient.is_contiguous() else gradient.t(), factor.float())
    else:  # on the host as a Python number, which is not rounded to the gradient's type
        gradient.mul_(read_scalar(factor.detach()) if on_host(gradient.device) else factor)


def _refuse_second_derivative() -> None:
    # create_graph=True: a gradient without a graph would silently drop terms. Tracing a backward is no such request.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("linear_cross_entropy has no second derivative in its compiled form; use impl='reference' "
                           "with create_graph=True")


def _wanted(gradients: Any, needs: Any) -> list[Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(gradients, needs)]


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind, wide = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    if wide != torch.float64 and torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        if kind != "cpu" or narrow == torch.bfloat16:
            return narrow
    return _at_least_float32(wide) if kind == "cpu" else wide


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_per_chunk(num_rows: int, num_classes: int, element_size: int, device_type: str) -> int:
    """Equal chunks within the budget: a last chunk of few rows would read the weight for little."""
    most = max(MIN_ROWS, WORKSPACE_BYTES["cpu" if device_type == "cpu" else "cuda"] // (num_classes * element_size))
    if num_rows <= most:
        return max(num_rows, 1)
    equal = math.ceil(num_rows / math.ceil(num_rows / most))
    return min(most, math.ceil(equal / 16) * 16)  # whole tiles of a matrix product


def _chunked(namespace: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
             scale: Tensor | None, compute: torch.dtype, needs: Any, terms: Terms) -> tuple[Tensor, ...]:
    """Losses (N,) and, given `scale` (0-d or (N,)), the gradients of sum(scale * losses) that `needs` asks for."""
    kernels, wide = getattr(torch.ops, namespace), _at_least_float32(compute)
    num_rows, num_classes = hidden.size(0), weight.size(0)
    rows = _rows_with_target(targets, terms.ignore_index)  # None: all
    count = num_rows if rows is None else rows.numel()
    step = _rows_per_chunk(count, num_classes, compute.itemsize, hidden.device.type)
    multiplied = weight.to(compute)
    if 1 not in multiplied.stride() or 0 in multiplied.stride():
        multiplied = multiplied.contiguous()  # once, not in every product
    added = None if bias is None else bias.to(compute)
    workspace = _empty_matrix(namespace, step, num_classes, compute, hidden.device)
    onednn = namespace == "fasttrain" and usable(step, multiplied)
    losses = torch.zeros(num_rows, dtype=wide, device=hidden.device)
    grad_hidden, grad_weight, grad_bias = _empty_gradients(namespace, hidden, weight, wide, needs, rows is not None)
    for begin in range(0, count, step):
        at = slice(begin, min(begin + step, count)) if rows is None else rows[begin:begin + step]
        h, y = hidden[at].to(compute), targets[at]  # (n, D), (n,)
        z = workspace[:y.size(0)]  # (n, V): logits, then their gradient
        if onednn:
            fill_product(z, h, multiplied, added)
        elif added is None:
            torch.mm(h, multiplied.t(), out=z)
        else:
            torch.addmm(added, h, multiplied.t(), out=z)
        if scale is None:
            losses[at] = kernels.cross_entropy_forward(z, y, *terms)[0]
            continue
        losses[at] = kernels.cross_entropy_fused_(z, y, scale if scale.dim() == 0 else scale[at], *terms)[0]
        if needs[0]:
            part = product(z, multiplied.t()) if onednn else torch.mm(z, multiplied)
            grad_hidden[at] = part.to(grad_hidden.dtype)
        if needs[1] and onednn and grad_weight.is_contiguous():
            fill_transposed_product(grad_weight, z, h, add=begin > 0)
        elif needs[1]:
            _add_product(grad_weight, z.t(), h, first=begin == 0)
        if needs[2]:
            grad_bias += z.sum(0, dtype=wide)
    if count == 0 and needs[1]:
        grad_weight.zero_()
    return losses, grad_hidden, grad_weight.to(weight.dtype), grad_bias.to((weight if bias is None else bias).dtype)


def _losses(namespace: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
            compute: torch.dtype, terms: Terms) -> Tensor:
    """Losses (N,) alone: of one kernel that writes no logits, or in chunks."""
    if hidden.device.type != "cpu" or namespace != "fasttrain":
        from ..kernels import linear_cross_entropy as kernels  # triton is imported by the first call that needs it

        if hidden.size(1) <= kernels.MAX_HIDDEN:
            losses: Tensor = kernels.linear_cross_entropy_forward(
                hidden.to(compute), weight.to(compute), bias, targets, **terms._asdict())[0]
            return losses
    return _chunked(namespace, hidden, weight, bias, targets, None, compute, [False] * 3, terms)[0]


def _rows_with_target(targets: Tensor, ignore_index: int) -> Tensor | None:
    if targets.device.type != "cpu":
        return None
    counted = targets != ignore_index
    return None if counted.all() else counted.nonzero().squeeze(1)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total (+)= a @ b, in the total's type."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    else:
        total.copy_(torch.mm(a, b)) if first else total.add_(torch.mm(a, b))


def _empty_gradients(namespace: str, hidden: Tensor, weight: Tensor, wide: torch.dtype, needs: Any,
                     partial: bool) -> list[Tensor]:
    """The three gradients before their first chunk; those that nobody wants are empty."""
    (num_classes, size), device = weight.shape, weight.device
    grad_hidden = torch.zeros if partial else torch.empty
    grads = [grad_hidden(hidden.shape if needs[0] else 0, dtype=hidden.dtype, device=device)]
    if not needs[1]:
        grads.append(torch.empty(0, dtype=wide, device=device))
    elif _is_transposed(weight):  # a gradient in the parameter's own layout is taken over without a copy
        grads.append(_empty_matrix(namespace, size, num_classes, wide, device).t())
    else:
        grads.append(_empty_matrix(namespace, num_classes, size, wide, device))
    return [*grads, torch.zeros(num_classes if needs[2] else 0, dtype=wide, device=device)]


def _is_transposed(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.t().is_contiguous()


def _empty_matrix(namespace: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu" and namespace == "fasttrain":
        return torch.ops.fasttrain.empty_matrix(torch.empty(0, dtype=dtype), rows, columns)  # type: ignore[no-any-return]
    return torch.empty(rows, columns, dtype=dtype, device=device)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; it must be (N, D): flatten with hidden.view(-1, D)")
    if weight.dim() != 2 or weight.size(1) != hidden.size(1):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (V, D) with D = {hidden.size(1)}, "
                         "hidden's last dimension")
    if weight.size(0) == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; there must be at least one class")
    if targets.dim() != 1 or targets.size(0) != hidden.size(0):
        raise ValueError(f"targets have shape {tuple(targets.shape)}; they must be (N,) = ({hidden.size(0)},), one per "
                         "row of hidden")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets are {targets.dtype}; they must be class ids in int64 (or int32)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be (V,) = ({weight.size(0)},), one per row of "
                         "weight")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in floats:
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}; all must be on one device")


def _register(namespace: str, devices: tuple[str, ...]) -> Any:
    """The three ops in one namespace: schema, implementation, shapes for tracing, autograd."""
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    inputs = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
    gradients = f"{inputs}, Tensor scale, ScalarType compute, bool[] needs, {TERMS_SCHEMA}"
    library.define(f"linear_cross_entropy_forward({inputs}, ScalarType compute, {TERMS_SCHEMA}) -> Tensor")
    library.define(f"linear_cross_entropy_fused({gradients}) -> (Tensor, Tensor, Tensor, Tensor)")
    library.define(f"linear_cross_entropy_backward({gradients}) -> (Tensor, Tensor, Tensor)")
    if namespace == "fasttrain":
        library.define("empty_matrix(Tensor like, int rows, int columns) -> Tensor")

    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, compute: torch.dtype,
                *terms: Any) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return _losses(namespace, hidden, weight, bias, targets, compute, Terms(*terms))

    def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
              compute: torch.dtype, needs: Any, *terms: Any) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            losses, *rest = _chunked(namespace, hidden, weight, bias, targets, scale, compute, needs, Terms(*terms))
            return losses.sum() * scale, *rest

    def backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
                 compute: torch.dtype, needs: Any, *terms: Any) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            return _chunked(namespace, hidden, weight, bias, targets, scale, compute, needs, Terms(*terms))[1:]

    def forward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, compute: torch.dtype,
                     *terms: Any) -> Tensor:
        return hidden.new_empty(hidden.size(0), dtype=_at_least_float32(compute))

    def backward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
                      compute: torch.dtype, needs: Any, *terms: Any) -> tuple[Tensor, ...]:
        grad_weight = weight.new_empty(weight.shape if needs[1] else (0,))
        if needs[1] and _is_transposed(weight):
            grad_weight = weight.new_empty(weight.t().shape).t()
        grad_bias = (weight if bias is None else bias).new_empty(weight.shape[:1] if needs[2] else (0,))
        return hidden.new_empty(hidden.shape if needs[0] else (0,)), grad_weight, grad_bias

    def fused_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
                   *rest: Any) -> tuple[Tensor, ...]:
        return scale.new_empty(()), *backward_fake(hidden, weight, bias, targets, scale, *rest)

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.compute = inputs[:5]
        ctx.terms = inputs[5:]
        ctx.save_for_backward(*tensors)

    def backward_of_forward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        needs = list(ctx.needs_input_grad[:3])
        op = getattr(torch.ops, namespace).linear_cross_entropy_backward
        return (*_wanted(op(*ctx.saved_tensors, grad_losses, ctx.compute, needs, *ctx.terms), needs), *[None] * 6)

    def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needs = inputs[6]
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward_of_fused(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        if grad_loss is None:
            return (None,) * 11
        gradients = [(grad_loss * gradient).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return (*_wanted(gradients, ctx.needs), *[None] * 8)

    autograd = torch.library.register_autograd
    for name, implementation, fake in (("forward", forward, forward_fake), ("fused", fused, fused_fake),
                                       ("backward", backward, backward_fake)):
        for device in devices:
            library.impl(f"linear_cross_entropy_{name}", implementation, device)
        torch.library.register_fake(f"{namespace}::linear_cross_entropy_{name}", fake, lib=library)
    name = f"{namespace}::linear_cross_entropy"
    autograd(f"{name}_forward", backward_of_forward, setup_context=save_inputs, lib=library)
    autograd(f"{name}_fused", backward_of_fused, setup_context=save_gradients, lib=library)
    return library


_LIBRARIES = [_register("fasttrain", ("CPU", "CUDA"))]
if TRITON_INTERPRETED:
    _LIBRARIES.append(_register("fasttrain_interpreted", ("CPU",)))
