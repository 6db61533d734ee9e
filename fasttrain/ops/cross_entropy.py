"""Cross-entropy from logits, forward and backward in two passes over memory instead of seven.

PyTorch's own op writes log-probabilities, reads them back, zero-fills a gradient and reads everything again; that
traffic is its whole cost. Here a row of logits is read once: while it is in cache its log-sum-exp and its gradient
are formed, and the gradient is the only N x V tensor ever made. Class weights and probability targets are left out.

Legend: N rows (tokens), V classes (vocabulary).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import TRITON_INTERPRETED
from ..utils import on_host, read_scalar
from ._dispatch import IMPLEMENTATIONS, Impl, resolve

Reduction = Literal["mean", "sum", "none"]

IMPLEMENTATIONS["cross_entropy"] = ("reference", "cpp", "triton")


class Terms(NamedTuple):
    """The numbers that shape the loss, in the order in which every kernel takes them."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: off


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0,
                  z_loss: float = 0.0, softcap: float | None = None, reduction: Reduction = "mean",
                  impl: Impl = "auto") -> Tensor:
    """Cross-entropy between logits and class ids.

    With x = softcap * tanh(logits / softcap) (or the logits themselves) and lse = log sum_j exp(x_j), a row costs

        (1 - label_smoothing) * (lse - x_target) + label_smoothing * (lse - mean_j x_j) + z_loss * lse**2

    and a row whose target is `ignore_index` costs 0, has gradient 0 and is not counted in the mean.

    Args:
        logits: (N, V), float32, bfloat16, float16 or float64; any strides. Never written to.
        targets: (N,), int64 or int32, each in [0, V) or equal to `ignore_index`.
        label_smoothing: in [0, 1].
        z_loss: weight of the squared log-sum-exp (PaLM, arXiv:2204.02311, section 5).
        softcap: bound on the magnitude of the logits (Gemma 2, arXiv:2408.00118, section 2).
        reduction: "mean" over the rows with a target, "sum", or "none".
        impl: "auto", "reference", "cpp" (CPU) or "triton" (CUDA).

    Returns:
        float32 (float64 for float64 logits): 0-d, or (N,) for "none". The mean over no target is NaN, as in PyTorch.

    Raises:
        ValueError: wrong shape, dtype, device or option.
        IndexError: a target out of range. On CUDA, where looking would stall the device, that row's loss is NaN.

    Saved for backward: logits, targets and one float per row; with "mean" and "sum" also the finished gradient.

    Equivalent to: `F.cross_entropy(logits.float(), targets, ignore_index=ignore_index,
    label_smoothing=label_smoothing, reduction=reduction)` plus the z-loss and the softcap.
    """
    _check(logits, targets)
    check_terms(label_smoothing, z_loss, softcap, reduction)
    chosen = resolve("cross_entropy", impl, logits)
    terms = Terms(ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0))
    targets = targets.long()
    interpreted = chosen == "triton" and logits.device.type == "cpu"
    kernels: Any = torch.ops.fasttrain_interpreted if interpreted else torch.ops.fasttrain
    if logits.stride(1) != 1 and logits.size(1) != 1:
        logits = logits.contiguous()
    targets = targets.contiguous()
    try:
        if chosen == "reference":
            return cross_entropy_reference(logits, targets, terms, reduction)
        return _run(kernels, logits, targets, terms, reduction)
    except (RuntimeError, IndexError):
        raise_if_target_out_of_range(targets, logits.size(1), ignore_index)
        raise


def cross_entropy_reference(logits: Tensor, targets: Tensor, terms: Terms, reduction: Reduction) -> Tensor:
    """The truth that the kernels are tested against: the formula above in plain PyTorch, at least in float32."""
    x = logits if logits.dtype == torch.float64 else logits.float()  # (N, V)
    if terms.softcap:
        x = terms.softcap * torch.tanh(x / terms.softcap)
    losses = F.cross_entropy(x, targets, ignore_index=terms.ignore_index, label_smoothing=terms.label_smoothing,
                             reduction="none")  # (N,)
    counted = targets != terms.ignore_index
    if terms.z_loss:
        losses = losses + torch.where(counted, terms.z_loss * torch.logsumexp(x, dim=1).square(), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def _run(kernels: Any, logits: Tensor, targets: Tensor, terms: Terms, reduction: Reduction) -> Tensor:
    if reduction == "none":
        losses: Tensor = kernels.cross_entropy_forward(logits, targets, *terms)[0]
        return losses
    scale = torch.ones((), dtype=_loss_dtype(logits), device=logits.device)
    if reduction == "mean":
        scale = scale / (targets != terms.ignore_index).sum()
    # Making the gradient in the forward saves a pass, unless it must be rescaled in the backward: inside a compiled
    # graph that is always so (the incoming gradient is not known to be 1), hence the two separate ops there.
    if logits.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        loss: Tensor = _GradientInForward.apply(logits, targets, scale, terms, kernels)  # type: ignore[no-untyped-call]
    else:
        loss = kernels.cross_entropy_forward(logits, targets, *terms)[0].sum() * scale
    return loss


class _GradientInForward(torch.autograd.Function):
    """scale * sum of the losses, with its gradient computed while the logits are in cache."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, scale: Tensor, terms: Terms, kernels: Any) -> Tensor:
        losses, lse, gradient = kernels.cross_entropy_fused(logits, targets, scale, *terms)
        ctx.save_for_backward(logits, targets, lse, scale)
        ctx.terms, ctx.kernels, ctx.gradient = terms, kernels, gradient
        total: Tensor = losses.sum() * scale
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: a gradient without a graph would silently drop terms
            raise RuntimeError("cross_entropy has no second derivative in its compiled form; use impl='reference' with "
                               "create_graph=True")
        logits, targets, lse, scale = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None  # handed out once: its receiver may write to it
        if gradient is None:  # a second backward over a retained graph
            row_gradients = (grad_output * scale).expand_as(lse)
            gradient = ctx.kernels.cross_entropy_backward(row_gradients, logits, targets, lse, *ctx.terms)
        elif gradient.device.type == "cuda":
            _triton().scale_inplace(gradient, grad_output)  # the device looks whether it is 1: nobody waits
        elif not on_host(gradient.device) or read_scalar(grad_output.detach()) != 1.0:
            gradient.mul_(grad_output)
        return gradient, None, None, None, None


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; they must be (N, V): flatten with "
                         "logits.view(-1, V)")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"logits are {logits.dtype}; they must be float32, bfloat16, float16 or float64")
    if targets.dim() != 1 or targets.size(0) != logits.size(0):
        raise ValueError(f"targets have shape {tuple(targets.shape)}; they must be (N,) = ({logits.size(0)},), one per "
                         "row of logits")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets are {targets.dtype}; they must be class ids in int64 (or int32)")
    if targets.device != logits.device:
        raise ValueError(f"targets are on {targets.device} and logits on {logits.device}; both must be on one device")
    if logits.size(1) == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; there must be at least one class")


def check_terms(label_smoothing: float, z_loss: float, softcap: float | None, reduction: str) -> None:
    """Raises ValueError for a value that `cross_entropy` does not take."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1]")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss is {z_loss}; it must be finite and not negative")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; it must be positive and finite, or None for none")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")


def raise_if_target_out_of_range(targets: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises the IndexError that names the first target that is neither a class nor `ignore_index`, if there is one."""
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= num_classes))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(f"targets[{row}] is {int(targets[row])}; a target must be in [0, {num_classes}) (the logits "
                         f"have {num_classes} classes) or equal ignore_index={ignore_index}") from None


TERMS_SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float softcap"


def _register(namespace: str, triton_device: str) -> Any:
    """The four ops in one namespace: schema, shapes for tracing, autograd, and the Triton launchers for one device.

    `cross_entropy_fused_` writes the gradient over contiguous logits; `scale` is one value or one per row.

    The second result, lse (N,), is float64 from C++ (so that p - 1 keeps its digits) and float32 from Triton.
    """
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"cross_entropy_forward(Tensor logits, Tensor targets, {TERMS_SCHEMA}) -> (Tensor, Tensor)")
    library.define(f"cross_entropy_fused(Tensor logits, Tensor targets, Tensor scale, {TERMS_SCHEMA}) "
                   "-> (Tensor, Tensor, Tensor)")
    library.define(f"cross_entropy_fused_(Tensor(a!) logits, Tensor targets, Tensor scale, {TERMS_SCHEMA}) "
                   "-> (Tensor, Tensor)")
    library.define("cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor targets, Tensor lse, "
                   f"{TERMS_SCHEMA}) -> Tensor")

    def lse_dtype(logits: Tensor) -> torch.dtype:
        return torch.float64 if logits.device.type == "cpu" and triton_device != "CPU" else torch.float32

    def forward_fake(logits: Tensor, targets: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
        losses = logits.new_empty(logits.size(0), dtype=_loss_dtype(logits))
        return losses, torch.empty_like(losses, dtype=lse_dtype(logits))

    def fused_fake(logits: Tensor, targets: Tensor, scale: Tensor, *terms: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *forward_fake(logits, targets), logits.new_empty(logits.shape)

    def fused_inplace_fake(logits: Tensor, targets: Tensor, scale: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
        return forward_fake(logits, targets)

    def backward_fake(grad_losses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, *terms: Any) -> Tensor:
        return logits.new_empty(logits.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, targets, *ctx.terms = inputs
        ctx.save_for_backward(logits, targets, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_losses: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        logits, targets, lse = ctx.saved_tensors
        gradient = None
        if grad_losses is not None and ctx.needs_input_grad[0]:
            op = getattr(torch.ops, namespace).cross_entropy_backward
            gradient = op(grad_losses, logits, targets, lse, *ctx.terms)
        return (gradient, *[None] * 5)

    torch.library.register_fake(f"{namespace}::cross_entropy_forward", forward_fake, lib=library)
    torch.library.register_fake(f"{namespace}::cross_entropy_fused", fused_fake, lib=library)
    torch.library.register_fake(f"{namespace}::cross_entropy_fused_", fused_inplace_fake, lib=library)
    torch.library.register_fake(f"{namespace}::cross_entropy_backward", backward_fake, lib=library)
    torch.library.register_autograd(f"{namespace}::cross_entropy_forward", backward, setup_context=setup_context,
                                    lib=library)
    for name in ("cross_entropy_forward", "cross_entropy_fused", "cross_entropy_fused_", "cross_entropy_backward"):
        library.impl(name, _launcher(name), triton_device)
    return library


def _launcher(name: str) -> Any:
    num_terms = len(Terms._fields)

    def launch(*arguments: Any) -> Any:
        return getattr(_triton(), name)(*arguments[:-num_terms], **dict(zip(Terms._fields, arguments[-num_terms:])))

    return launch


def _triton() -> Any:
    from ..kernels import cross_entropy  # triton is imported by the first call that needs it

    return cross_entropy


# The CPU kernels of namespace `fasttrain` are the extension's.
_LIBRARIES = [_register("fasttrain", triton_device="CUDA")]
if TRITON_INTERPRETED:
    _LIBRARIES.append(_register("fasttrain_interpreted", triton_device="CPU"))
