"""How a model is spread over the ranks of a Team: `TrainConfig.parallel` decided and carried out.

    ddp     every rank holds the whole model; gradients are summed once a step, behind the backward (replicas.py).
    fsdp    each rank holds rows of every parameter, gradient and moment; a block's parameters are gathered before it
            runs, and its gradients summed into their rows behind it (sharding.py).
    fsdp-vocab  fsdp whose head is not gathered: each rank scores all tokens against its classes (sharded_head.py).
    hsdp    fsdp among the processes of a machine, with a copy on each machine.

Left out: pipelines, and tensor and sequence parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .config import TrainConfig
from .distributed import Team
from .meta_init import is_on_meta, materialise
from .replicas import Replicas, Spread, Whole
from .sharding import Shards
from .utils import unwrap


def spread_model(model: nn.Module, config: TrainConfig, team: Team,
                 autocast: Callable[[], contextlib.AbstractContextManager[Any]], optimizer: Any,
                 scaled: bool) -> tuple[Spread, str]:
    """Spreads the model in place as the config says: (what a step needs of that, why). A user's `optimizer` is given
    the parameters that take the old ones' place. `scaled`: a gradient scaler will be in use.

    Raises:
        ValueError: float16 with sharded parameters, whose scaler would see a part of the gradients only.
    """
    name, reason = choose(config.parallel, team, model)
    how = f"{name} over {team.world_size} ranks: {reason}" if name != "none" else reason
    before = list(unwrap(model).named_parameters())
    spread: Spread = Whole()
    if name in ("none", "ddp"):
        if is_on_meta(model):
            materialise(unwrap(model), team.device, config.seed)
        spread = spread if name == "none" else Replicas(team, model, config.grad_accum_steps)
        if optimizer is not None:
            repointed(optimizer, before, model)
        return spread, how
    if scaled:
        raise ValueError(f"parallel={name!r} with float16 and its gradient scaler is not supported; use "
                         "precision='bfloat16' or 'float32', or parallel='ddp'")
    spread = Shards(team, model, name, config.grad_accum_steps, autocast)
    if is_on_meta(model):
        materialise(unwrap(model), team.device, config.seed)
    if optimizer is not None:
        repointed(optimizer, before, model)
    return spread, how


def repointed(optimizer: Any, before: Sequence[tuple[str, nn.Parameter]], model: nn.Module) -> None:
    """fully_shard puts new parameters in the old ones' place: a user's optimizer is given these.

    Raises:
        ValueError: it has stepped already, so its state belongs to whole parameters.
    """
    after = dict(unwrap(model).named_parameters())
    renewed = {id(p): after[name] for name, p in before}
    if all(renewed.get(id(p), p) is p for group in optimizer.param_groups for p in group["params"]):
        return
    if optimizer.state:
        raise ValueError(f"the optimizer ({type(optimizer).__name__}) has stepped before the model was sharded; pass a "
                         "fresh one, and let the Trainer load its state from a checkpoint")
    for group in optimizer.param_groups:
        group["params"] = [renewed.get(id(p), p) for p in group["params"]]


def choose(parallel: str, team: Team, model: nn.Module) -> tuple[str, str]:
    """(none, ddp, fsdp, fsdp-vocab or hsdp; why) for `TrainConfig.parallel`."""
    if team.is_alone:
        return "none", "one process"
    if parallel != "auto":
        return parallel, f"parallel={parallel!r} was asked for"
    if is_on_meta(model):
        return "fsdp", "the model is on the meta device: each rank makes its own part"
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    needed = 4 * weights  # weights, gradients, two moments
    if team.device.type == "cuda":
        room = torch.cuda.get_device_properties(team.device).total_memory
        if needed > 0.6 * room:
            return "fsdp", f"weights, gradients and moments need {needed >> 20} MiB of a device's {room >> 20}"
    return "ddp", f"weights, gradients and moments ({needed >> 20} MiB) fit each rank"
