"""Weights for a model that was built on the meta device, made where they belong: a model may be larger than a process.

    with torch.device("meta"):
        model = GPT(config)          # shapes, no memory

After `materialise(model, device, seed)` it has the weights of `torch.manual_seed(seed); model.reset_parameters()`,
each rank of a sharded one its rows of them: every rank draws the whole of one tensor at a time and keeps its part. A
rank of n under fsdp then needs 1/n of weights, gradients and moments, and for a moment two blocks whole, the buffers
of one, and what lies outside of the blocks: in less than the weights of a float32 model no two ranks can train it, but
four can (with eight-bit moments). Left out: models whose initialisation is not in `reset_parameters` of the model, or
of each of its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .shards import is_shard, overwrite
from .utils import device_of, preserve_rng

_DRAWN = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_"}


def is_on_meta(model: nn.Module) -> bool:
    return device_of(model).type == "meta"


def materialise(model: nn.Module, device: torch.device, seed: int) -> None:
    """Gives the model memory on `device` and fresh weights; the global generators stay as they are.

    Raises:
        ValueError: a buffer is on the meta device too, or a module has parameters and no `reset_parameters`.
    """
    lost = next((name for name, buffer in model.named_buffers() if buffer.device.type == "meta"), None)
    if lost is not None and not callable(getattr(model, "reset_parameters", None)):
        raise ValueError(f"buffer {lost!r} of {type(model).__name__} is on the meta device, and nothing says what it "
                         "holds; give the model a reset_parameters() that fills it too, or build it with real buffers")
    model.to_empty(device=device)
    with preserve_rng(), torch.no_grad(), _WholeDraws():
        torch.manual_seed(seed)
        for module in _initialised(model):
            module.reset_parameters()  # type: ignore[operator]


def _initialised(model: nn.Module) -> list[nn.Module]:
    if callable(getattr(model, "reset_parameters", None)):
        return [model]
    found = [module for module in model.modules() if callable(getattr(module, "reset_parameters", None))]
    covered = {id(p) for module in found for p in module.parameters()}
    missing = [name for name, p in model.named_parameters() if id(p) not in covered]
    if missing:
        raise ValueError(f"{type(model).__name__} is on the meta device, and no module's reset_parameters() covers "
                         f"{missing[0]!r}; give the model one, or build it on a device")
    return found


class _WholeDraws(TorchFunctionMode):
    """Random in-place methods of a spread tensor draw the whole tensor and keep this rank's part."""

    def __torch_function__(self, function: Callable[..., Any], types: Sequence[Any], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        if getattr(function, "__name__", "") in _DRAWN and args and is_shard(args[0]):
            target = args[0]
            whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            function(whole, *args[1:], **(kwargs or {}))
            overwrite(target, whole)
            return target
        return function(*args, **(kwargs or {}))
