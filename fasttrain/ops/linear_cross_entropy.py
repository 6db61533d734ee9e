"""Cross-entropy of a linear head without its logits: hidden states and weight in, loss and gradients out.

The N x V logits are the largest tensor of a language model's training step. Here they exist only a chunk of rows at a
time, in one workspace: a matrix product fills it, the row kernel of `cross_entropy` turns it into its own gradient in
place, two more products consume it (`_linear_chunks`), on request without what is too small to matter
(`_gradient_filter`). Rows without a target are left out of all three. Left out: class weights, probability targets, and
a second derivative.

Legend: N rows (tokens), D hidden size, V classes (vocabulary), n rows of a chunk.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import TRITON_INTERPRETED
from ..utils import on_host, read_scalar
from ._dispatch import IMPLEMENTATIONS, Impl, resolve
from ._gradient_filter import filtered_reference
from ._linear_chunks import at_least_float32, chunked, is_transposed, losses_alone
from .cross_entropy import (
    TERMS_SCHEMA,
    Reduction,
    Terms,
    check_terms,
    cross_entropy_reference,
    raise_if_target_out_of_range,
)

IMPLEMENTATIONS["linear_cross_entropy"] = ("reference", "cpp", "triton")

@overload
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ...,
                         ignore_index: int = ..., label_smoothing: float = ..., z_loss: float = ...,
                         softcap: float | None = ..., reduction: Reduction = ..., filter_eps: float | None = ...,
                         return_skipped_mass: Literal[False] = ..., impl: Impl = ...) -> Tensor: ...


@overload
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ...,
                         ignore_index: int = ..., label_smoothing: float = ..., z_loss: float = ...,
                         softcap: float | None = ..., reduction: Reduction = ..., filter_eps: float | None = ...,
                         return_skipped_mass: Literal[True], impl: Impl = ...) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
                         ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
                         softcap: float | None = None, reduction: Reduction = "mean", filter_eps: float | None = None,
                         return_skipped_mass: bool = False, impl: Impl = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy(hidden @ weight.T + bias, targets, ...)` in the memory of one chunk of logits.

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64; any strides.
        weight: (V, D), any of these types, not necessarily hidden's; any strides. May be in use elsewhere (tied).
        targets: (N,), int64 or int32, each in [0, V) or equal to `ignore_index`; rows of the latter cost nothing on a
            CPU. On a GPU they go last, and chunks of them alone are left out: the host waits for their number when the
            first chunk is queued, so the device does not. One chunk, or a captured graph, is computed whole.
        bias: (V,) or None.
        label_smoothing, z_loss, softcap, reduction, impl: as in `cross_entropy`.
        filter_eps: None, or leave out of the two products of the backward each block of rows x one class whose every
            |d loss / d logit| (|softmax - onehot|) is smaller: faster on a trained model, inexact (arXiv:2411.09009,
            section 4.3, which takes 2**-12). Loss and gradient of the bias stay exact.
        return_skipped_mass: also return the sum of |d loss / d logit| over what `filter_eps` leaves out.

    The products are computed in the wider of the two types; under `torch.autocast` in its type; on a CPU in float32
    unless autocast says bfloat16 (most CPUs multiply 16-bit matrices a hundred times slower). The gradient of the
    weight is accumulated over the chunks in float32 whatever its type.

    Returns:
        float32 (float64 for float64 inputs): 0-d, or (N,) for "none". The mean over no target is NaN, as in PyTorch.
        With `return_skipped_mass` a second tensor of the same shape, s. It bounds what the filter changed, whatever the
        input: |error of hidden's gradient| <= s * max_j |weight_j| and |error of weight's| <= s * max_i |hidden_i|, in
        Frobenius and Euclidean norms, for an upstream gradient of 1 (a factor multiplies both sides).

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
    if filter_eps is not None and not 0.0 <= filter_eps < float("inf"):
        raise ValueError(f"filter_eps is {filter_eps}; it must be finite and not negative, or None for the whole "
                         "gradient (a trained model bears 2**-12)")
    chosen = resolve("linear_cross_entropy", impl, hidden)
    if chosen == "triton" and impl == "auto" and torch.float64 in (hidden.dtype, weight.dtype):
        chosen = "reference"  # the Triton kernels compute in float32
    terms = Terms(ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0))
    targets = targets.long().contiguous()
    interpreted = chosen == "triton" and hidden.device.type == "cpu"
    try:
        if chosen == "reference":
            loss, skipped = _reference(hidden, weight, targets, bias, terms, reduction, filter_eps)
        else:
            namespace = "fasttrain_interpreted" if interpreted else "fasttrain"
            loss, skipped = _run(namespace, hidden, weight, bias, targets, terms, reduction, filter_eps,
                                 return_skipped_mass)
        return (loss, skipped) if return_skipped_mass else loss
    except (RuntimeError, IndexError):
        raise_if_target_out_of_range(targets, weight.size(0), ignore_index)
        raise


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, terms: Terms,
                                   reduction: Reduction) -> Tensor:
    """The truth that the kernels are tested against: all the logits, at least in float32."""
    return _reference(hidden, weight, targets, bias, terms, reduction, None)[0]


def _reference(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, terms: Terms, reduction: Reduction,
               filter_eps: float | None) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        wide = at_least_float32(torch.promote_types(hidden.dtype, weight.dtype))
        hidden, weight, bias = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
        if filter_eps is None:
            losses = cross_entropy_reference(F.linear(hidden, weight, bias), targets, terms, "none")
            skipped = torch.zeros_like(losses)
        else:
            losses, skipped = filtered_reference(hidden, weight, bias, targets, terms, filter_eps)
        if reduction == "none":
            return losses, skipped
        divisor = (targets != terms.ignore_index).sum() if reduction == "mean" else targets.new_ones(())
        return losses.sum() / divisor, skipped.sum() / divisor.clamp(min=1)


def _run(namespace: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, terms: Terms,
         reduction: Reduction, filter_eps: float | None, want_skipped: bool) -> tuple[Tensor, Tensor]:
    """(loss, skipped); the latter is empty if nobody wants it."""
    kernels: Any = getattr(torch.ops, namespace)
    compute = _compute_dtype(hidden, weight)
    inputs = hidden, weight, bias, targets
    alone = (*inputs, compute, *terms, filter_eps, want_skipped)
    if reduction == "none":
        losses, skipped = kernels.linear_cross_entropy_forward(*alone)
        return losses, skipped
    scale = torch.ones((), dtype=at_least_float32(compute), device=hidden.device)
    if reduction == "mean":
        scale = scale / (targets != terms.ignore_index).sum()
    needs = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    if not torch.is_grad_enabled() or not any(needs):
        losses, skipped = kernels.linear_cross_entropy_forward(*alone)
        loss, skipped = losses.sum() * scale, skipped.sum() * scale.clamp(max=1)  # of no target: NaN, and nothing
    elif torch.compiler.is_compiling():
        loss, *_, skipped = kernels.linear_cross_entropy_fused(*inputs, scale, compute, needs, *terms, filter_eps)
    else:
        loss, skipped = _GradientInForward.apply(  # type: ignore[no-untyped-call]
            *inputs, scale, compute, terms, filter_eps, namespace)
    return loss, skipped


class _GradientInForward(torch.autograd.Function):
    """scale * sum of the losses, with its gradients computed from the same logits.

    Outside a compiled graph this stands in for the op's own autograd, which may not hand out what it saved: a copy.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
                compute: torch.dtype, terms: Terms, filter_eps: float | None, namespace: str) -> tuple[Tensor, Tensor]:
        loss, *gradients, skipped = getattr(torch.ops, namespace).linear_cross_entropy_fused(
            hidden, weight, bias, targets, scale, compute, ctx.needs_input_grad[:3], *terms, filter_eps)
        ctx.save_for_backward(hidden, weight, bias, targets, scale)
        ctx.compute, ctx.terms, ctx.namespace, ctx.gradients = compute, (*terms, filter_eps), namespace, gradients
        ctx.mark_non_differentiable(skipped)
        return loss, skipped

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
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
        return (*_wanted(gradients, needs), *[None] * 6)


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
    return at_least_float32(wide) if kind == "cpu" else wide


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


def _losses_and_skipped(namespace: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                        compute: torch.dtype, terms: Terms, filter_eps: float | None,
                        want_skipped: bool) -> tuple[Tensor, Tensor]:
    if filter_eps is None or not want_skipped:
        losses = losses_alone(namespace, hidden, weight, bias, targets, compute, terms)
        return losses, torch.zeros_like(losses) if want_skipped else losses.new_empty(0)
    one = torch.ones((), dtype=at_least_float32(compute), device=hidden.device)
    needs = [False] * 3
    losses, *_, skipped = chunked(namespace, hidden, weight, bias, targets, one, compute, needs, terms, filter_eps)
    return losses, skipped


def _define(library: Any, namespace: str) -> None:
    """The schemas: three ops, and what the filter needs of C++."""
    inputs = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
    terms_schema = f"{TERMS_SCHEMA}, float? filter_eps"
    gradients = f"{inputs}, Tensor scale, ScalarType compute, bool[] needs, {terms_schema}"
    library.define(f"linear_cross_entropy_forward({inputs}, ScalarType compute, {terms_schema}, bool want_skipped) -> "
                   "(Tensor, Tensor)")
    library.define(f"linear_cross_entropy_fused({gradients}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
    library.define(f"linear_cross_entropy_backward({gradients}) -> (Tensor, Tensor, Tensor)")
    if namespace == "fasttrain":
        library.define("empty_matrix(Tensor like, int rows, int columns) -> Tensor")
        library.define("live_block(Tensor z, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)")
        library.define("take(Tensor z, Tensor rows, Tensor columns) -> Tensor")
        library.define("add_rows_(Tensor(a!) total, Tensor ids, Tensor part) -> ()")


def _register(namespace: str, devices: tuple[str, ...]) -> Any:
    """The three ops in one namespace: schema, implementation, shapes for tracing, autograd."""
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    _define(library, namespace)

    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, compute: torch.dtype,
                *terms: Any) -> tuple[Tensor, Tensor]:
        *four, filter_eps, want_skipped = terms
        with torch.autocast(hidden.device.type, enabled=False):
            return _losses_and_skipped(namespace, hidden, weight, bias, targets, compute, Terms(*four), filter_eps,
                                       want_skipped)

    def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
              compute: torch.dtype, needs: Any, *terms: Any) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            losses, *gradients, skipped = chunked(namespace, hidden, weight, bias, targets, scale, compute, needs,
                                                  Terms(*terms[:-1]), terms[-1])
            return losses.sum() * scale, *gradients, skipped.sum()

    def backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
                 compute: torch.dtype, needs: Any, *terms: Any) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            return chunked(namespace, hidden, weight, bias, targets, scale, compute, needs, Terms(*terms[:-1]),
                           terms[-1])[1:4]

    def forward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, compute: torch.dtype,
                     *terms: Any) -> tuple[Tensor, Tensor]:
        losses = hidden.new_empty(hidden.size(0), dtype=at_least_float32(compute))
        return losses, torch.empty_like(losses) if terms[-1] else losses.new_empty(0)

    def backward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
                      compute: torch.dtype, needs: Any, *terms: Any) -> tuple[Tensor, ...]:
        grad_weight = weight.new_empty(weight.shape if needs[1] else (0,))
        if needs[1] and is_transposed(weight):
            grad_weight = weight.new_empty(weight.t().shape).t()
        grad_bias = (weight if bias is None else bias).new_empty(weight.shape[:1] if needs[2] else (0,))
        return hidden.new_empty(hidden.shape if needs[0] else (0,)), grad_weight, grad_bias

    def fused_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: Tensor,
                   *rest: Any) -> tuple[Tensor, ...]:
        gradients = backward_fake(hidden, weight, bias, targets, scale, *rest)
        return scale.new_empty(()), *gradients, scale.new_empty(())

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.compute = inputs[:5]
        ctx.terms = inputs[5:-1]
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(output[1])

    def backward_of_forward(ctx: Any, grad_losses: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        needs = list(ctx.needs_input_grad[:3])
        op = getattr(torch.ops, namespace).linear_cross_entropy_backward
        return (*_wanted(op(*ctx.saved_tensors, grad_losses, ctx.compute, needs, *ctx.terms), needs), *[None] * 8)

    def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.needs = inputs[6]
        ctx.save_for_backward(*output[1:-1])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward_of_fused(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        if grad_loss is None:
            return (None,) * 12
        gradients = [(grad_loss * gradient).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return (*_wanted(gradients, ctx.needs), *[None] * 9)

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
