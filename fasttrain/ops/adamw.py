"""AdamW whose step also measures, guards, scales and clips the gradient, without the host ever waiting for it.

A training loop needs the gradient's norm, a verdict on NaN, the division by the number of targets, clipping and the
update: five passes over the gradients with the usual functions, and a device read for the verdict. Here it is one
norm pass and one update pass, and the verdict is a tensor that the update itself obeys. Semantics and `state_dict`
are `torch.optim.AdamW`'s, so the two are interchangeable in both directions. Left out: amsgrad, maximize, sparse
gradients, complex parameters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..utils import on_host, read_scalar
from ._dispatch import FORCED_IMPL, IMPLEMENTATIONS, Impl, resolve

IMPLEMENTATIONS["adamw"] = ("reference",)

_FUSED_DEVICES = ("cpu", "cuda")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE_DTYPES: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}

Member = tuple[Tensor, dict[str, Any]]
"""A parameter with a gradient, and its state."""


class Terms(NamedTuple):
    """One parameter group's numbers."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101).

    With g the gradient times `grad_scale` times min(1, max_grad_norm / (norm + 1e-6)), and t the number of updates:

        m = beta1 m + (1 - beta1) g                v = beta2 v + (1 - beta2) g^2
        p = p - lr weight_decay p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        max_grad_norm: clip the global norm (all groups together) to this; None: no clipping.
        ema_decay: keep an exponential moving average of the parameters, e = decay e + (1 - decay) p after each
            update, in `state[p]["ema"]`; `ema_swapped()` puts it in place of the parameters for a while.
        state_dtype: "float32" keeps the moments in the parameter's own type, as PyTorch does. "bfloat16" keeps them in
            two bytes: each step widens them, computes as usual and rounds up or down at random with the probability
            that makes the mean exact, because v moves by less than a bfloat16 step and would otherwise stand still.
            The random bits depend on the step and the parameter only, so runs repeat.
        impl: "auto" runs PyTorch's fused kernel where it is right (contiguous float tensors on CPU or CUDA: its CPU
            version misreads a transposed gradient) and plain PyTorch elsewhere; "reference" is plain PyTorch.

    Guard: with `max_grad_norm`, `grad_scale` or `found_inf` in use, a step whose gradient norm is NaN or infinite, or
    whose `found_inf` is not 0, leaves parameters and state as they were, bit for bit. `last_found_inf` then is 1.
    Without any of them a step is exactly PyTorch's, which does not look.

    Raises:
        ValueError: an option out of range, a sparse or complex gradient.
    """

    grad_norm: Tensor | None
    """() float32 on the device: global norm of the latest guarded step, after grad_scale and before clipping."""
    last_found_inf: Tensor | None
    """() float32 on the device: 1 if the latest guarded step was skipped, else 0."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, *, max_grad_norm: float | None = None, ema_decay: float | None = None,
                 state_dtype: str = "float32", impl: Impl = "auto") -> None:
        for name, value, holds, rule in (
            ("lr", lr, not isinstance(lr, Tensor) and lr >= 0, "must be a number, not negative"),
            ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "must be two numbers in [0, 1)"),
            ("eps", eps, eps >= 0, "must not be negative"),
            ("weight_decay", weight_decay, weight_decay >= 0, "must not be negative"),
            ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0, "must be positive, or None"),
            ("ema_decay", ema_decay, ema_decay is None or 0 <= ema_decay < 1, "must lie in [0, 1), or be None"),
            ("state_dtype", state_dtype, state_dtype in _STATE_DTYPES, f"must be one of {', '.join(_STATE_DTYPES)}"),
        ):
            if not holds:
                raise ValueError(f"AdamW: {name} is {value!r}; it {rule}")
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.impl = "reference" if impl == "auto" and FORCED_IMPL == "reference" else impl
        self.state_dtype = _STATE_DTYPES[state_dtype]
        self.grad_norm = self.last_found_inf = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if impl != "auto":  # one that cannot serve is refused now, not in step 1
            for group in self.param_groups:
                for p in group["params"]:
                    resolve("adamw", impl, p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | float | None = None,
             found_inf: Tensor | float | None = None) -> Any:
        """One update.

        Args:
            closure: as in PyTorch: recomputes the loss, which is returned.
            grad_scale: () float32 on the device, or a number; gradients are multiplied by it first (1 / number of
                targets).
            found_inf: () float32 on the device, or a number; not 0 skips the update.

        Afterwards the contents of `.grad` are unspecified (scaled or not, depending on the kernel).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [(p, self._state_of(p)) for p in group["params"] if p.grad is not None])
                  for group in self.param_groups]
        grads = [cast(Tensor, p.grad) for _, members in groups for p, _ in members]
        if not grads:
            return loss
        multiplier: Tensor | float | None = None
        skip: Tensor | None = None
        if not (self.max_grad_norm is None and grad_scale is None and found_inf is None):
            if on_host(grads[0].device):
                multiplier = self._guard_on_host(grads, grad_scale, found_inf)
                if multiplier is None:
                    return loss
            else:
                multiplier, skip = self._guard_on_device(grads, grad_scale, found_inf)
        for group, members in groups:
            beta1, beta2 = group["betas"]
            terms = Terms(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
            if self.state_dtype is None:
                self._update(members, terms, multiplier, skip)
            else:
                self._update_narrow(group, members, terms, multiplier, skip)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """PyTorch's, without its bookkeeping when gradients are dropped."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Accepts this class's and torch.optim.AdamW's; refuses amsgrad and maximize, which change the maths."""
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"AdamW: the state was made with {option}=True, which this optimizer does not "
                                     "have; continue with torch.optim.AdamW")
        super().load_state_dict(cast("dict[str, Any]", state_dict))
        for group in self.param_groups:
            group["betas"] = tuple(group["betas"])
            for p in group["params"]:
                state = self.state[p]
                if "step" in state:
                    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
                for key in _MOMENTS:
                    if key in state:  # PyTorch has cast it to the parameter's type
                        state[key] = state[key].to(self.state_dtype or p.dtype)

    @contextlib.contextmanager
    def ema_swapped(self) -> Iterator[None]:
        """Inside, the parameters hold their moving average; afterwards their own values again."""
        if self.ema_decay is None:
            raise ValueError("AdamW: ema_swapped() needs ema_decay, which is None")
        averaged = [p for group in self.param_groups for p in group["params"] if "ema" in self.state[p]]

        def swap() -> None:
            for p in averaged:
                p.data, self.state[p]["ema"] = self.state[p]["ema"], p.data

        swap()
        try:
            yield
        finally:
            swap()

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if state:
            return state
        grad = cast(Tensor, p.grad)
        if grad.is_sparse or p.is_complex():
            kind = "sparse gradient" if grad.is_sparse else "complex value"
            raise ValueError(f"AdamW: a parameter of shape {tuple(p.shape)} has a {kind}, which AdamW does not "
                             "support; use dense (Embedding(sparse=False)), real parameters")
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for key in _MOMENTS:
            state[key] = torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.preserve_format)
        if self.ema_decay is not None:
            state["ema"] = p.detach().clone(memory_format=torch.preserve_format)
        return state

    def _guard_on_device(self, grads: list[Tensor], grad_scale: Tensor | float | None,
                         found_inf: Tensor | float | None) -> tuple[Tensor, Tensor]:
        """(multiplier of the gradients, 1.0 where the update must not happen), both () float32, without a wait."""
        norm = global_norm(grads)
        if grad_scale is not None:
            norm = norm * grad_scale
        bad = ~torch.isfinite(norm)
        if found_inf is not None:
            bad = bad | torch.as_tensor(found_inf, device=norm.device).ne(0)
        multiplier = torch.ones_like(norm) if grad_scale is None else torch.as_tensor(grad_scale, device=norm.device)
        if self.max_grad_norm is not None:
            multiplier = multiplier * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.grad_norm, self.last_found_inf = norm, bad.to(torch.float32)
        return multiplier, self.last_found_inf

    def _guard_on_host(self, grads: list[Tensor], grad_scale: Tensor | float | None,
                       found_inf: Tensor | float | None) -> float | None:
        """The multiplier, or None if the update must not happen. CPU tensors are memory that Python can look at, and
        a dozen operations on scalar tensors would cost a small model more than its update."""
        norm = global_norm(grads)
        if grad_scale is not None:
            norm = norm * grad_scale
        length, multiplier = read_scalar(norm), 1.0 if grad_scale is None else read_scalar(grad_scale)
        skip = not math.isfinite(length) or (found_inf is not None and read_scalar(found_inf) != 0)
        self.grad_norm, self.last_found_inf = norm, torch.full((), float(skip))
        if skip:
            return None
        if self.max_grad_norm is not None:
            multiplier *= min(1.0, self.max_grad_norm / (length + 1e-6))
        return multiplier

    def _update(self, members: list[Member], terms: Terms, multiplier: Tensor | float | None,
                skip: Tensor | None) -> None:
        fused: dict[tuple[torch.device, torch.dtype], list[Member]] = {}
        for member in members:
            p = member[0]
            if self.impl == "auto" and _fused_is_right(p):
                fused.setdefault((p.device, p.dtype), []).append(member)
            else:
                self._update_reference(member, terms, multiplier, skip)
        for (device, _), alike in fused.items():
            _update_fused(alike, terms, device, multiplier, skip)
        if self.ema_decay is not None:
            for p, state in members:
                _keep_if_skipped(state["ema"], torch.lerp(state["ema"], p, 1.0 - self.ema_decay), skip)

    def _update_narrow(self, group: dict[str, Any], members: list[Member], terms: Terms,
                       multiplier: Tensor | float | None, skip: Tensor | None) -> None:
        """One parameter at a time, so that only one is wide at once. A skipped step leaves the moments as they are:
        a widened bfloat16 rounds to itself whatever the random bits."""
        turn = group["rounding_step"] = group.get("rounding_step", 0) + 1
        for index, (p, state) in enumerate(members):
            wide = {**state, **{key: state[key].to(torch.float32) for key in _MOMENTS}}
            if p.dtype == torch.float32:
                self._update([(p, wide)], terms, multiplier, skip)
            else:
                self._update_reference((p, wide), terms, multiplier, skip)
            for which, key in enumerate(_MOMENTS):
                round_stochastically(wide[key], state[key], seed=(turn * len(members) + index) * len(_MOMENTS) + which)

    def _update_reference(self, member: Member, terms: Terms, multiplier: Tensor | float | None,
                          skip: Tensor | None) -> None:
        p, state = member
        if isinstance(multiplier, Tensor):
            multiplier = multiplier.to(p.device)
        new = adamw_reference(p, cast(Tensor, p.grad), state["exp_avg"], state["exp_avg_sq"], state["step"], terms,
                              multiplier)
        for old, value in zip((p, state["exp_avg"], state["exp_avg_sq"], state["step"]), new):
            _keep_if_skipped(old, value, skip)


def _update_fused(members: list[Member], terms: Terms, device: torch.device, multiplier: Tensor | float | None,
                  skip: Tensor | None) -> None:
    """PyTorch's one-pass kernel. It divides gradients by its `grad_scale` and obeys `found_inf` itself."""
    steps = [state["step"] for _, state in members]
    divisor: Tensor | None = None
    if isinstance(multiplier, Tensor):
        divisor = multiplier.reciprocal().to(device)
    elif multiplier is not None and multiplier != 1.0:
        divisor = torch.full((), 1.0 / multiplier, device=device)
    if skip is not None:
        skip = skip.to(device)
        torch._foreach_add_(steps, [1.0 - skip] * len(steps))  # its one-tensor form reads the value on the host
    else:
        torch._foreach_add_(steps, 1.0)
    torch._fused_adamw_([p for p, _ in members], [cast(Tensor, p.grad) for p, _ in members],
                        [state["exp_avg"] for _, state in members], [state["exp_avg_sq"] for _, state in members], [],
                        steps, lr=terms.lr, beta1=terms.beta1, beta2=terms.beta2, weight_decay=terms.weight_decay,
                        eps=terms.eps, amsgrad=False, maximize=False, grad_scale=divisor, found_inf=skip)


def adamw_reference(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, terms: Terms,
                    multiplier: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The truth: the formula of `AdamW`, out of place. Returns the new (p, exp_avg, exp_avg_sq, step).

    Arithmetic is at least float32 whatever the parameter's type; the bias corrections are float64 (of a small integer).
    """
    lr, beta1, beta2, eps, weight_decay = terms
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    g = grad.to(wide) if multiplier is None else grad.to(wide) * multiplier
    new_step = step + 1
    m = torch.lerp(exp_avg.to(wide), g, 1 - beta1)
    v = exp_avg_sq.to(wide) * beta2 + g * g * (1 - beta2)
    correction1, correction2 = 1 - beta1 ** new_step.double(), 1 - beta2 ** new_step.double()
    denominator = v.sqrt() / correction2.sqrt() + eps
    new_p = p.to(wide) * (1 - lr * weight_decay) - (lr / correction1) * (m / denominator)
    return new_p.to(p.dtype), m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype), new_step


def round_stochastically(wide: Tensor, narrow: Tensor, *, seed: int) -> None:
    """Writes float32 `wide` into bfloat16 `narrow`, up or down with the probability that makes the mean exact.

    Sixteen random bits are added below the ones that bfloat16 keeps and the rest is cut off: the carry is the rounding.
    The sign bit is apart, so it works on the magnitude. Infinities and NaN are passed on as they are.
    """
    generator = torch.Generator(wide.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=generator)
    bits = (wide.contiguous().view(torch.int32) + noise) & -(1 << 16)
    narrow.copy_(torch.where(torch.isfinite(wide), bits.view(torch.float32), wide))


def global_norm(grads: list[Tensor]) -> Tensor:
    """() float32 on the first gradient's device: the 2-norm of all of them together, read once."""
    double = [g for g in grads if g.dtype == torch.float64]
    single = [g for g in grads if g.dtype != torch.float64]
    norms: list[Tensor] = []
    if single:
        norms += torch._foreach_norm(single, 2, dtype=torch.float32)
    if double:
        norms += torch._foreach_norm(double, 2)
    device = grads[0].device
    if double or any(norm.device != device for norm in norms):
        norms = [norm.to(device, torch.float32) for norm in norms]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _keep_if_skipped(old: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    old.copy_(new if found_inf is None else torch.where(found_inf.to(old.device) != 0, old, new))


def _fused_is_right(p: Tensor) -> bool:
    """PyTorch's fused kernel walks raw memory: parameter and gradient must be laid out alike (torch 2.13's CPU one
    does not check, and silently mixes up the elements of a transposed gradient)."""
    grad = cast(Tensor, p.grad)
    return (p.device.type in _FUSED_DEVICES and p.is_floating_point() and grad.dtype == p.dtype
            and p.is_contiguous() and grad.is_contiguous())
