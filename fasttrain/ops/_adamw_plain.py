"""AdamW's update in plain PyTorch: the formula, one parameter's update with its state, and PyTorch's own fused kernel.

The formula is what the compiled kernels repeat bit for bit; the fused kernel serves what they do not take where it is
right, which this file decides.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ._adamw_kernels import Member, Terms
from ._adamw_moments import MOMENTS, REMAINDER, is_narrow, joined, keep, split, wide_dtype, widened

_FUSED_DEVICES = ("cpu", "cuda")


def update_fused(members: list[Member], terms: Terms, multiplier: Tensor | float | None, skip: Tensor | None) -> None:
    """PyTorch's one-pass kernel. It divides gradients by its `grad_scale` and obeys `found_inf` itself."""
    device = members[0].p.device
    steps = [member.state["step"] for member in members]
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
    exp_avgs, exp_avg_sqs = ([member.state[key] for member in members] for key in MOMENTS)
    torch._fused_adamw_([member.p for member in members], [member.grad for member in members], exp_avgs, exp_avg_sqs,
                        [], steps, lr=terms.lr, beta1=terms.beta1, beta2=terms.beta2, weight_decay=terms.weight_decay,
                        eps=terms.eps, amsgrad=False, maximize=terms.sign < 0, grad_scale=divisor, found_inf=skip)


def update_reference(member: Member, terms: Terms, multiplier: Tensor | float | None, skip: Tensor | None,
                     seed: int) -> None:
    """One parameter's update in place, in plain PyTorch: what the kernels are tested against, bit for bit."""
    p, state = member.p, member.state
    written = [p, *(value for value in state.values() if isinstance(value, Tensor))]
    before = [] if skip is None else [value.clone() for value in written]
    if isinstance(multiplier, Tensor):
        multiplier = multiplier.to(p.device)
    master = joined(p, state[REMAINDER]) if REMAINDER in state else p
    new_p, m, v, step = adamw_reference(master, member.grad, *widened(state), state["step"], terms, multiplier)
    if REMAINDER in state:
        new_p, remainder = split(new_p)
        state[REMAINDER].copy_(remainder)
    p.copy_(new_p)
    state["step"].copy_(step)
    keep(state, m, v, seed=seed, parameter=member.number, offset=member.offset)
    if "ema" in state:
        wide = state["ema"].to(m.dtype)
        state["ema"].copy_(wide + (p.to(m.dtype) - wide) * terms.ema_weight)
    for value, old in zip(written, before):
        value.copy_(torch.where(cast(Tensor, skip).to(p.device) != 0, old, value))


def adamw_reference(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, terms: Terms,
                    multiplier: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The truth: the formula of `AdamW`, out of place. Returns the new (p, exp_avg, exp_avg_sq, step).

    Arithmetic is at least float32 whatever the parameter's type; the bias corrections are float64 (of a small integer).
    Every operation is a single IEEE one, in the order in which the kernels do them.
    """
    lr, beta1, beta2, eps, weight_decay, sign, _ = terms
    wide = wide_dtype(p)
    g = grad.to(wide) if multiplier is None else grad.to(wide) * multiplier
    g = g if sign > 0 else -g
    new_step = step + 1
    m = exp_avg.to(wide) + (g - exp_avg.to(wide)) * (1 - beta1)
    v = exp_avg_sq.to(wide) * beta2 + (g * g) * (1 - beta2)
    correction1, correction2 = 1 - beta1 ** new_step.double(), 1 - beta2 ** new_step.double()
    root = v.double().sqrt().to(wide)  # PyTorch's float32 root on a CPU is an ulp off in every fifth element
    denominator = root * (1 / correction2.sqrt()).to(wide) + eps
    new_p = p.to(wide) * (1 - lr * weight_decay) - (m / denominator) * (lr / correction1).to(wide)
    return new_p.to(p.dtype), m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype), new_step


def fused_is_right(member: Member) -> bool:
    """PyTorch's fused kernel walks raw memory: parameter and gradient must be laid out alike (torch 2.13's CPU one
    does not check, and silently mixes up the elements of a transposed gradient), and it knows one type for all and
    only rounding to nearest."""
    p, grad, state = member.p, member.grad, member.state
    return (p.device.type in _FUSED_DEVICES and p.is_floating_point()
            and grad.dtype == p.dtype == state["exp_avg"].dtype and p.is_contiguous()
            and grad.is_contiguous() and state["exp_avg"].is_contiguous() and "ema" not in state
            and REMAINDER not in state and not is_narrow(state))
