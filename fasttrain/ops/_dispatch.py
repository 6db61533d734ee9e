"""Which implementation of an op serves a call, and why not a faster one.

Every op has the same three names: `reference` (plain PyTorch), `cpp` (the extension, CPU tensors), `triton` (CUDA
tensors; CPU tensors too when TRITON_INTERPRET=1). An implementation asked for by name serves the call or raises.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..backend import CPP_PROBLEM, TRITON_INTERPRETED, TRITON_PROBLEM

Impl = Literal["auto", "reference", "cpp", "triton"]

FORCED_IMPL = os.environ.get("FASTTRAIN_IMPL", "auto")
if FORCED_IMPL not in get_args(Impl):
    raise ValueError(f"FASTTRAIN_IMPL is {FORCED_IMPL!r}; it must be one of {', '.join(get_args(Impl))}")

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {}
"""Op name -> its implementations; every op file adds its own line."""

FASTEST = {"cpu": "cpp", "cuda": "triton"}


@dataclass(frozen=True)
class Choice:
    """What `impl="auto"` runs for an op on a device type, and why it is not the fastest (empty if it is)."""

    impl: str
    reason: str


def problem(op: str, impl: str, device_type: str) -> str:
    """Why `impl` cannot serve `op` on this device type, or an empty string."""
    if impl not in IMPLEMENTATIONS[op]:
        return f"{op} has no {impl} implementation, only {', '.join(IMPLEMENTATIONS[op])}"
    if impl == "cpp":
        return CPP_PROBLEM or ("" if device_type == "cpu" else f"cpp runs on CPU tensors, not on {device_type}")
    if impl == "triton":
        usable = device_type == "cuda" or (device_type == "cpu" and TRITON_INTERPRETED)
        return TRITON_PROBLEM or ("" if usable else f"triton runs on CUDA tensors, not on {device_type} "
                                                    "(TRITON_INTERPRET=1 runs it on the CPU)")
    return ""


def choose(op: str, device_type: str) -> Choice:
    """The implementation `auto` runs: the device's compiled one where it can serve, else the reference."""
    fastest = FASTEST.get(device_type)
    if fastest is None:
        return Choice("reference", f"no compiled implementation for {device_type}")
    reason = problem(op, fastest, device_type)
    return Choice("reference", reason) if reason else Choice(fastest, "")


def resolve(op: str, impl: str, tensor: torch.Tensor) -> str:
    """`impl` made definite for this call.

    Raises:
        ValueError: an unknown name, or a named implementation that cannot serve the call.
    """
    device_type = tensor.device.type
    if impl == "auto":
        impl = FORCED_IMPL
    if impl == "auto":
        choice = choose(op, device_type)
        if choice.reason and device_type == "cpu" and CPP_PROBLEM:
            _say_once(f"fasttrain runs its plain PyTorch references on the CPU: {CPP_PROBLEM}")
        return choice.impl
    if impl not in get_args(Impl):
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(get_args(Impl))}")
    reason = problem(op, impl, device_type)
    if reason:
        raise ValueError(f"{op}: impl={impl!r} cannot serve this call: {reason}. Use impl='auto' or 'reference'")
    return impl


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said and not torch.compiler.is_compiling():
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def backend_info() -> dict[str, dict[str, Choice]]:
    """Op -> device type -> what `impl="auto"` runs there and, if that is not the compiled kernel, why not."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {op: {device: choose(op, device) for device in devices} for op in sorted(IMPLEMENTATIONS)}
