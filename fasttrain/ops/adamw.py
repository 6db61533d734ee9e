"""AdamW whose step also measures, guards, scales and clips the gradient, without the host ever waiting for it.

A training loop needs the gradient's norm, a verdict on NaN, the division by the number of targets, clipping, the update
and often zeroing: six passes over the gradients with the usual functions, and a device read for the verdict. Here it is
one norm pass and one update pass over all parameters together, and the verdict is a tensor that the update itself
obeys. Semantics and `state_dict` are `torch.optim.AdamW`'s, so the two are interchangeable in both directions. Left
out: amsgrad, sparse gradients, complex parameters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..shards import exchange, is_shard, local, spread_like
from ..utils import on_host, read_scalar
from ._adamw_kernels import Member, Terms, kernel_norm, kernel_update, takes
from ._adamw_moments import MOMENTS, REMAINDER, SCALES, keep, new_moments, round_stochastically, wide_dtype, widened
from ._adamw_plain import adamw_reference, fused_is_right, update_fused, update_reference
from ._adamw_plan import Plan, bound, make_plan
from ._dispatch import FORCED_IMPL, IMPLEMENTATIONS, Impl, resolve

__all__ = ["AdamW", "Shard", "Terms", "adamw_reference", "global_norm", "round_stochastically"]

IMPLEMENTATIONS["adamw"] = ("reference", "cpp", "triton")

_STATE_DTYPES = ("float32", "bfloat16", "int8")
_OWN = ["max_grad_norm", "ema_decay", "impl", "state_dtype", "master", "rounding_seed", "grad_norm", "last_found_inf"]


class Shard(NamedTuple):
    """Which part of a larger parameter a parameter is."""

    offset: int
    """Index of its first element in the whole, row-major."""
    numel: int
    """Elements of the whole."""
    whole_blocks: bool = True
    """Whether all parts begin at multiples of 256 elements: int8 moments need that, and stay float32 without."""


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101).

    With g the gradient times `grad_scale` times min(1, max_grad_norm / (norm + 1e-6)), and t the number of updates:

        m = beta1 m + (1 - beta1) g                v = beta2 v + (1 - beta2) g^2
        p = p - lr weight_decay p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        max_grad_norm: clip the global norm (all groups together) to this; None: no clipping.
        ema_decay: keep an exponential moving average of the parameters, e = decay e + (1 - decay) p after each
            update, in `state[p]["ema"]`; `ema_swapped()` puts it in place of the parameters for a while.
        state_dtype: how the moments are kept. "float32" (float64 for float64 parameters), "bfloat16" or "int8" (a
            scale for every 256 elements; parameters under 4096 elements keep float32): 8, 4 or 2 bytes a parameter.
            The narrow ones are widened, computed as usual and rounded up or down at random with the probability that
            makes the mean exact, because v moves by less than they can hold and would otherwise stand still. The
            random bits are a function of `rounding_seed`, the step, the parameter and the element, so runs repeat.
        master: "remainder" gives each bfloat16 parameter an exact float32 master at two more bytes: its lower half is
            `state[p]["remainder"]`, its upper half, rounded to nearest, the parameter. The run is that of float32
            parameters bit for bit; without it an update below 1/512 of a bfloat16 value is lost. None: no master.
        impl: "auto" runs the compiled kernels: one call for all float32 and bfloat16 parameters with contiguous
            memory. What they do not take is served by PyTorch's fused kernel where
            that is right, and by plain PyTorch elsewhere; "reference" is plain PyTorch. Kernels and reference agree
            bit for bit on the same multiplier.

    A parameter group may have its own `lr`, `betas`, `eps`, `weight_decay` and `maximize`; `lr` may be a 0-d tensor,
    whose value is read in every step.

    Guard: with `max_grad_norm`, `grad_scale` or `found_inf` in use, a step whose gradient norm is NaN or infinite, or
    whose `found_inf` is not 0, leaves parameters and state as they were, bit for bit. `last_found_inf` then is 1.
    Without any of them a step does as PyTorch's: it does not look, and NaN spreads to the elements it reaches.

    `state_dict` holds float32 moments where the state is int8, so that torch.optim.AdamW can load it; narrowing them
    again gives back the same values.

    Raises:
        ValueError: an option out of range, a sparse or complex gradient.
    """

    grad_norm: Tensor | None
    """() float32 on the device: global norm of the latest guarded step, after grad_scale and before clipping."""
    last_found_inf: Tensor | None
    """() float32 on the device: 1 if the latest guarded step was skipped, else 0."""
    rounding_seed: int
    """Key of the random bits of narrow moments, 0 unless set."""
    shards: dict[Tensor, Shard]
    """Entries for parameters that are parts of larger ones (DTensors), set before the first step: rounding and the
    choice of what to compress then are those of the whole. State tensors are this rank's parts."""
    norm_of_all: Callable[[Tensor], Tensor]
    """The norm of this rank's gradients -> that of all ranks' parts; the identity unless set."""

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, *, max_grad_norm: float | None = None,
                 ema_decay: float | None = None, state_dtype: str = "float32", master: str | None = None,
                 impl: Impl = "auto") -> None:
        for name, value, holds, rule in (
            ("lr", lr, float(lr) >= 0, "must not be negative"),
            ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "must be two numbers in [0, 1)"),
            ("eps", eps, eps >= 0, "must not be negative"),
            ("weight_decay", weight_decay, weight_decay >= 0, "must not be negative"),
            ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0, "must be positive, or None"),
            ("ema_decay", ema_decay, ema_decay is None or 0 <= ema_decay < 1, "must lie in [0, 1), or be None"),
            ("state_dtype", state_dtype, state_dtype in _STATE_DTYPES, f"must be one of {', '.join(_STATE_DTYPES)}"),
            ("master", master, master in (None, REMAINDER), f"must be {REMAINDER!r}, or None"),
        ):
            if not holds:
                raise ValueError(f"AdamW: {name} is {value!r}; it {rule}")
        self.max_grad_norm, self.ema_decay = max_grad_norm, ema_decay
        self.impl = "reference" if impl == "auto" and FORCED_IMPL == "reference" else impl
        self.state_dtype, self.master, self.rounding_seed, self.shards = state_dtype, master, 0, {}
        self.norm_of_all = lambda norm: norm
        self.grad_norm = self.last_found_inf = None
        self._plan: Plan | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "maximize": False})
        if impl != "auto":  # one that cannot serve is refused now, not in step 1
            for group in self.param_groups:
                for p in group["params"]:
                    resolve("adamw", impl, p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | float | None = None,
             found_inf: Tensor | float | None = None, zero_grads: bool = False) -> Any:
        """One update.

        Args:
            closure: as in PyTorch: recomputes the loss, which is returned.
            grad_scale: () float32 on the device, or a number; gradients are multiplied by it first (1 / number of
                targets).
            found_inf: () float32 on the device, or a number; not 0 skips the update.
            zero_grads: leave zeros in every `.grad` that was used, at next to no cost, also after a skipped update.

        Without `zero_grads` the contents of `.grad` are unspecified afterwards (scaled or not: the kernels differ).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._step_by_plan(grad_scale, found_inf, zero_grads):
            return loss
        compiled, plain = self._share_out(self._members())
        members = [*itertools.chain(*compiled.values()), *plain]
        if not members:
            return loss
        multiplier: Tensor | float | None = None
        skip: Tensor | None = None
        skipped = False
        if not (self.max_grad_norm is None and grad_scale is None and found_inf is None):
            norm = self.norm_of_all(_norm(compiled, plain))
            if on_host(norm.device):
                multiplier = self._guard_on_host(norm, grad_scale, found_inf)
                skipped = multiplier is None
            else:
                multiplier, skip = self._guard_on_device(norm, grad_scale, found_inf)
        terms = [self._terms(group) for group in self.param_groups]
        if not skipped:
            for (namespace, _), alike in compiled.items():
                kernel_update(namespace, alike, terms, multiplier, skip, self.rounding_seed, zero_grads)
            self._update_plain(plain, terms, multiplier, skip)
        if zero_grads and (plain or skipped):
            torch._foreach_zero_([member.grad for member in (members if skipped else plain)])
        held = list(compiled) == [("fasttrain", torch.device("cpu"))] and not plain and not self.shards
        self._plan = make_plan(self.param_groups, self.state, members) if held else None
        return loss

    def _step_by_plan(self, grad_scale: Tensor | float | None, found_inf: Tensor | float | None,
                      zero_grads: bool) -> bool:
        """Whether there is a plan that held, and the step is done."""
        plan, self._plan = self._plan, None
        if plan is None or self.shards or not on_host(torch.device("cpu")):
            return False
        if (_grads := bound(plan, self.param_groups, self.state)) is None:  # kept until the step is over
            return False
        multiplier: float | None = 1.0
        if not (self.max_grad_norm is None and grad_scale is None and found_inf is None):
            norm = torch.full((), plan.native.norm(), dtype=torch.float32, device="cpu")
            multiplier = self._guard_on_host(self.norm_of_all(norm), grad_scale, found_inf)
        if multiplier is not None:
            plan.native.update(list(map(self._terms, self.param_groups)), multiplier, self.rounding_seed, zero_grads)
        elif zero_grads:
            plan.native.zero()
        self._plan = plan
        return True

    def __getstate__(self) -> dict[str, Any]:
        if self.shards:
            raise TypeError("AdamW: parameters are spread over ranks; load the state_dict into a new one instead")
        return super().__getstate__() | {key: value for key, value in vars(self).items() if key in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "state_dtype" in state:  # a copy of a whole optimizer; PyTorch's load_state_dict hands over state and groups
            self.shards, self.norm_of_all, self._plan = {}, lambda norm: norm, None
        super().__setstate__(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """PyTorch's, without its bookkeeping when gradients are dropped."""
        if not set_to_none:
            return super().zero_grad(set_to_none=False)
        for p in self._parameters():
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's form, with float32 moments where the state is int8: torch.optim.AdamW would misread the codes."""
        packed = super().state_dict()
        parameters = list(self._parameters()) if self.shards else []
        for index, entry in packed["state"].items():
            if SCALES in entry:
                plain = {key: value for key, value in entry.items() if key != SCALES}
                entry = packed["state"][index] = {**plain, **dict(zip(MOMENTS, widened(entry)))}
            if parameters and is_shard(parameters[index]):
                packed["state"][index] = {key: spread_like(value, parameters[index]) if value.dim() else value
                                          for key, value in entry.items()}
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Accepts this class's and torch.optim.AdamW's, whatever type either keeps moments in; refuses amsgrad."""
        for group in state_dict["param_groups"]:
            if group.get("amsgrad"):
                raise ValueError("AdamW: the state was made with amsgrad=True, which this optimizer does not have; "
                                 "continue with torch.optim.AdamW")
        self._plan = None  # it would keep the old state's memory
        super().load_state_dict(cast("dict[str, Any]", state_dict))
        saved_ids = itertools.chain(*(group["params"] for group in state_dict["param_groups"]))
        for index, (saved_id, p) in enumerate(zip(saved_ids, self._parameters())):
            saved = state_dict["state"].get(saved_id)
            if saved:  # from the saved tensors: PyTorch has cast its copies to the parameter's type
                self.state[p] = self._loaded(p, saved, index)
        for group in self.param_groups:
            group["betas"] = tuple(group["betas"])

    def _loaded(self, p: Tensor, saved: Mapping[str, Any], index: int) -> dict[str, Any]:
        state: dict[str, Any] = {"step": torch.tensor(float(saved["step"]), device=p.device)}
        state |= self._new_moments(p)
        m, v = (local(saved[key]).to(p.device, wide_dtype(p)) for key in MOMENTS)
        keep(state, m, v, seed=self.rounding_seed, parameter=index, offset=self._shard(p).offset)
        if self._has_remainder(p):  # torch's optimizer casts it to bfloat16, which is of no use
            state[REMAINDER] = torch.zeros_like(local(p), dtype=torch.int16, memory_format=torch.preserve_format)
            if REMAINDER in saved and saved[REMAINDER].dtype == torch.int16:
                state[REMAINDER].copy_(local(saved[REMAINDER]))
        if "ema" in saved:
            state["ema"] = local(saved["ema"]).to(p.device, p.dtype, copy=True)
        return state

    @contextlib.contextmanager
    def ema_swapped(self) -> Iterator[None]:
        """Inside, the parameters hold their moving average; afterwards their own values again."""
        if self.ema_decay is None:
            raise ValueError("AdamW: ema_swapped() needs ema_decay, which is None")
        averaged = [p for group in self.param_groups for p in group["params"] if "ema" in self.state[p]]

        def swap() -> None:
            for p in averaged:
                if is_shard(p):
                    exchange(p, self.state[p]["ema"])
                else:
                    p.data, self.state[p]["ema"] = self.state[p]["ema"], p.data

        swap()
        try:
            yield
        finally:
            swap()

    def _parameters(self) -> Iterator[Tensor]:
        return itertools.chain(*(group["params"] for group in self.param_groups))

    def _has_remainder(self, p: Tensor) -> bool:
        return self.master == REMAINDER and p.dtype == torch.bfloat16

    def _shard(self, p: Tensor) -> Shard:
        return (self.shards.get(p) if self.shards else None) or Shard(0, p.numel())

    def _members(self) -> list[Member]:
        members, first = [], 0
        for number, group in enumerate(self.param_groups):
            if self.shards:
                members += [Member(local(p), local(grad), self._state_of(p, grad), number, first + index,
                                   self._shard(p).offset)
                            for index, p in enumerate(group["params"]) if (grad := p.grad) is not None]
            else:
                members += [Member(p, grad, self._state_of(p, grad), number, first + index, 0)
                            for index, p in enumerate(group["params"]) if (grad := p.grad) is not None]
            first += len(group["params"])
        return members

    def _share_out(self, members: list[Member]) -> tuple[dict[tuple[str, torch.device], list[Member]], list[Member]]:
        """(what the kernels take, by their namespace and device; the rest)."""
        compiled: dict[tuple[str, torch.device], list[Member]] = {}
        plain: list[Member] = []
        chosen: dict[torch.device, str] = {}
        for member in members:
            device = member.p.device
            if device not in chosen:
                chosen[device] = resolve("adamw", self.impl, member.p)
            if chosen[device] != "reference" and takes(member):
                interpreted = chosen[device] == "triton" and device.type == "cpu"
                namespace = "fasttrain_interpreted" if interpreted else "fasttrain"
                compiled.setdefault((namespace, device), []).append(member)
            else:
                plain.append(member)
        return compiled, plain

    def _terms(self, group: dict[str, Any]) -> Terms:
        beta1, beta2 = group["betas"]
        return Terms(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"],
                     -1.0 if group.get("maximize") else 1.0, 0.0 if self.ema_decay is None else 1.0 - self.ema_decay)

    def _state_of(self, p: Tensor, grad: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if state:
            return state
        if grad.is_sparse or p.is_complex():
            kind = "sparse gradient" if grad.is_sparse else "complex value"
            raise ValueError(f"AdamW: a parameter of shape {tuple(p.shape)} has a {kind}, which AdamW does not "
                             "support; use dense (Embedding(sparse=False)), real parameters")
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        own = local(p)
        state.update(self._new_moments(p))
        if self._has_remainder(p):
            state[REMAINDER] = torch.zeros_like(own, dtype=torch.int16, memory_format=torch.preserve_format)
        if self.ema_decay is not None:
            state["ema"] = own.detach().clone(memory_format=torch.preserve_format)
        return state

    def _new_moments(self, p: Tensor) -> dict[str, Tensor]:
        shard = self._shard(p)
        return new_moments(local(p), self.state_dtype, shard.numel if shard.whole_blocks else 0)

    def _guard_on_device(self, norm: Tensor, grad_scale: Tensor | float | None,
                         found_inf: Tensor | float | None) -> tuple[Tensor, Tensor]:
        """(multiplier of the gradients, 1.0 where the update must not happen), both () float32, without a wait."""
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

    def _guard_on_host(self, norm: Tensor, grad_scale: Tensor | float | None,
                       found_inf: Tensor | float | None) -> float | None:
        """The multiplier, or None if the update must not happen. CPU tensors are memory that Python can look at, and
        a dozen operations on scalar tensors would cost a small model more than its update."""
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

    def _update_plain(self, members: list[Member], terms: list[Terms], multiplier: Tensor | float | None,
                      skip: Tensor | None) -> None:
        fused: dict[tuple[int, torch.device, torch.dtype], list[Member]] = {}
        for member in members:
            if self.impl == "auto" and fused_is_right(member):
                fused.setdefault((member.group, member.p.device, member.p.dtype), []).append(member)
            else:
                update_reference(member, terms[member.group], multiplier, skip, self.rounding_seed)
        for alike in fused.values():
            update_fused(alike, terms[alike[0].group], multiplier, skip)


def _norm(compiled: Mapping[tuple[str, torch.device], list[Member]], plain: list[Member]) -> Tensor:
    """() float32: the norm of all gradients, those that the kernels take read by the kernels."""
    norms = [kernel_norm(key[0], [member.grad for member in members]) for key, members in compiled.items()]
    if plain or len(norms) > 1:
        norms.append(global_norm([*norms, *(member.grad for member in plain)]))
    return norms[-1]


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
