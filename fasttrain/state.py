"""TrainState: everything that outlives a step, in one dataclass that goes in and out of the loop and of a checkpoint.

`capture` gives plain trees (nested dicts of tensors and JSON values) and `restore` puts them back, also in the middle
of an accumulation window: then the gradients so far, their loss and their target count are part of the state. What is
not here (the config, the tokenizer, where checkpoints lie) does not change while training. Files are not touched here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .batch_stream import BatchStream
from .distributed import ALONE, Team
from .shards import Pieces, is_shard, overwrite, part_like
from .utils import canonical_name, capture_rng, device_of, on_host, read_scalar, restore_rng, unwrap

Trees = dict[str, Any]


class Stateful(Protocol):
    """Anything whose state belongs in a checkpoint (callbacks)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Counters:
    """The host's view of the run: plain numbers, saved as they are. One step is one turn of the optimizer."""

    step: int = 0
    """Optimizer steps taken, skipped ones included: it is the clock of every interval."""
    tokens_seen: int = 0
    """Target tokens in those steps."""
    tokens_before: int = 0
    """The same, without the latest step's."""
    nonfinite_steps: int = 0
    """Steps whose loss or gradient was not finite: their update did not happen."""
    nonfinite_in_a_row: int = 0
    """How many of the latest steps were non-finite."""
    empty_steps: int = 0
    """Steps without a single target: nothing to learn, no update."""
    last_was_empty: bool = False
    """Whether the latest step was one of them."""
    best_val_loss: float = math.inf
    """Lowest validation loss so far, nats per target."""
    best_step: int = 0
    """Where that was."""
    last_val_loss: float = math.nan
    """Latest validation loss."""
    last_eval_step: int = -1
    """Where that was."""
    num_pieces: int = 1
    """Pieces that each micro-batch is divided into since memory ran out; 1: it never did."""
    rewinds: int = 0
    """How often the run went back to a checkpoint after a loss spike."""
    interval_loss: float = 0.0
    """Sum of target losses since the last log record, over finite steps."""
    interval_targets: int = 0
    """Targets behind `interval_loss`."""
    interval_nonfinite: int = 0
    """Non-finite steps since the last log record."""
    train_loss: float = math.nan
    """Mean loss of the latest completed log interval."""
    last_grad_norm: float = math.nan
    """Gradient norm of the latest step, before clipping."""
    last_lr: float = math.nan
    """Learning rate of the latest update, first parameter group."""
    last_loss: float = math.nan
    """Mean loss of the latest step, as it was: NaN stays NaN."""


class Drawn(NamedTuple):
    """A micro-batch as the loss saw it, with the generators' states just before: enough to compute it again."""

    batch: Any
    generators: tuple[Tensor, Tensor | None]


@dataclass
class Window:
    """The accumulation window: sums over the micro-batches since the last update, kept on the device."""

    micro_step: int = 0
    loss_sum: Tensor | None = None  # () float32
    num_targets: Tensor | None = None  # () int64
    most_targets: int = 0
    """Upper bound on `num_targets`, known to the host."""
    drawn: list[Drawn] = field(default_factory=list)
    """The micro-batches themselves; after a resume inside a window, those since then."""
    pieces_left: int = 0
    """Pieces of the present micro-batch that come after this one, where it is divided."""
    out_of_memory: str = ""
    """What the allocator said when memory ran out in this window on this rank, where the others are still in it."""

    def add(self, loss_sum: Tensor, num_targets: Tensor, most_targets: int) -> None:
        first = self.loss_sum is None or self.num_targets is None
        self.loss_sum = loss_sum if first else self.loss_sum + loss_sum  # type: ignore[operator]
        self.num_targets = num_targets if first else self.num_targets + num_targets  # type: ignore[operator]
        self.micro_step += 1
        self.most_targets += most_targets

    def clear(self) -> None:
        self.micro_step, self.loss_sum, self.num_targets, self.most_targets, self.drawn = 0, None, None, 0, []
        self.out_of_memory = ""

    def is_last_pass(self, accumulated: int) -> bool:
        """Whether the backward under way ends a window of `accumulated` micro-batches."""
        return self.micro_step >= accumulated - 1 and not self.pieces_left


@dataclass(frozen=True)
class Pending:
    """The numbers of the latest step on their way to the host. On a GPU they arrive by a copy that nobody waits for
    until the next step's work is queued; on the CPU they are there already."""

    values: Sequence[float] | Tensor
    """Loss sum, number of targets, gradient norm, 1 if the update was skipped."""
    arrived: torch.cuda.Event | None
    most_targets: int
    """Upper bound on the number of targets, known without asking the device."""
    drawn: Sequence[Drawn] = ()
    """The step's micro-batches."""

    @classmethod
    def of(cls, *scalars: Tensor, most_targets: int, drawn: Sequence[Drawn] = ()) -> Pending:
        device = scalars[0].device
        if on_host(device):
            return cls([read_scalar(scalar) for scalar in scalars], None, most_targets, drawn)
        wide = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack([scalar.to(device, wide) for scalar in scalars])
        if device.type != "cuda":
            return cls(values, None, most_targets, drawn)
        host = torch.empty(len(scalars), dtype=wide, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return cls(host, event, most_targets, drawn)

    def read(self) -> Sequence[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return [float(value) for value in self.values.cpu().numpy()] if isinstance(self.values, Tensor) else self.values


@dataclass
class TrainState:
    """What a run is at one instant. The loop mutates it; nobody else keeps any of it."""

    model: nn.Module
    optimizer: Optimizer
    stream: BatchStream
    scheduler: LRScheduler | None = None
    scaler: GradScaler | None = None
    callbacks: Sequence[Stateful] = ()
    team: Team = ALONE
    """The ranks that train this state together; all of it is the same on each, but its part of what is spread."""
    counters: Counters = field(default_factory=Counters)
    window: Window = field(default_factory=Window)
    pending: Pending | None = None
    """The latest step's numbers until `training_loop.settle` has booked them; None whenever a checkpoint is taken."""
    judged: Sequence[Drawn] = ()
    """The micro-batches of the step that was booked last."""
    requests: set[str] = field(default_factory=set)
    """What callbacks want of the loop after this step: save, evaluate or rewind."""
    blamed: tuple[tuple[int, int], tuple[int, int]] | None = None
    """For a rewind: from which to which position (epoch, batches of it) the data are passed over from now on."""
    stop_reason: str = ""
    """Why the run should end after this step (empty: it should not). Any part may set it; the first reason stays."""

    @property
    def step(self) -> int:
        return self.counters.step

    def request_stop(self, reason: str) -> None:
        """Asks the loop to end after the current step; requests are OR-ed."""
        self.stop_reason = self.stop_reason or reason

    def take_request(self, name: str) -> bool:
        """Whether `name` was asked for; asked again, the answer is no."""
        wanted = name in self.requests
        self.requests.discard(name)
        return wanted

    def tokens_seen_exactly(self, limit: int) -> int:
        """Target tokens so far, for a comparison with `limit`: the step still under way is waited for only where it
        could reach it."""
        if self.pending is None or self.counters.tokens_seen + self.pending.most_targets < limit:
            return self.counters.tokens_seen
        return self.counters.tokens_seen + int(self.pending.read()[1])

    def passed_multiple(self, every: int) -> bool:
        """Whether the latest step took the target tokens to or over a multiple of `every`."""
        before = self.counters.tokens_before if self.pending is None else self.counters.tokens_seen
        limit = (before // every + 1) * every
        return self.tokens_seen_exactly(limit) >= limit

    def capture(self) -> Trees:
        """Trees of everything above. Tensors are the live ones, not copies: write them before the next step."""
        assert self.pending is None, "settle() before capture()"
        module = unwrap(self.model)
        training: Trees = {
            "counters": dict(vars(self.counters)),
            "stream": self.stream.state_dict(),
            "callbacks": [[type(callback).__name__, callback.state_dict()] for callback in self.callbacks],
            "micro_step": self.window.micro_step, "most_targets": self.window.most_targets,
        }
        if self.scheduler is not None:
            training["scheduler"] = self.scheduler.state_dict()
        if self.scaler is not None:
            training["scaler"] = self.scaler.state_dict()
        weights = {canonical_name(name): tensor for name, tensor in module.state_dict().items()}
        trees = {"model": weights, "optimizer": self.optimizer.state_dict(), "training": training,
                 "rng": capture_rng()}
        if self.window.micro_step:
            assert self.window.loss_sum is not None and self.window.num_targets is not None
            trees["window"] = {
                "loss_sum": self.window.loss_sum.detach(), "num_targets": self.window.num_targets,
                "gradients": {canonical_name(name): p.grad for name, p in module.named_parameters()
                              if p.grad is not None},
            }
        return trees

    def restore(self, trees: Mapping[str, Any]) -> None:
        """Becomes what `capture` saw.

        Raises:
            ValueError: the trees belong to another model, optimizer or scheduler; nothing has been changed then
                but what came before the misfit in the order model, optimizer, the rest.
        """
        module, training = unwrap(self.model), trees["training"]
        load_model(module, trees["model"])
        load_optimizer(self.optimizer, trees["optimizer"])
        for name, part in (("scheduler", self.scheduler), ("scaler", self.scaler)):
            if part is not None and name in training:
                part.load_state_dict(training[name])
        self.counters = Counters(**training["counters"])
        self._restore_window(module, trees.get("window"), training)
        self._restore_callbacks(training["callbacks"], dict(module.named_parameters()))
        self.stream.load_state_dict(training["stream"])
        restore_rng(trees["rng"])  # last: replaying a loader draws from the global generators

    def _restore_window(self, module: nn.Module, window: Mapping[str, Any] | None,
                        training: Mapping[str, Any]) -> None:
        self.window.clear()
        gradients = window["gradients"] if window else {}
        for name, parameter in module.named_parameters():
            saved = gradients.get(canonical_name(name))
            # A copy: the saved tensor may be a read-only view of the checkpoint's file, and gradients are added to.
            # Sums count once over all ranks, whose parts add up.
            mine = is_shard(parameter) or self.team.leads
            parameter.grad = part_like(saved, parameter).to(parameter.dtype) if mine and saved is not None else None
        if window:
            device, counts = device_of(module), int(self.team.leads)
            self.window.micro_step = max(1, training["micro_step"] // self.team.world_size)
            self.window.most_targets = training["most_targets"] * counts
            self.window.loss_sum = window["loss_sum"].to(device, copy=True) * counts
            self.window.num_targets = window["num_targets"].to(device, copy=True) * counts

    def _restore_callbacks(self, saved: Sequence[Sequence[Any]], parameters: Mapping[str, Tensor]) -> None:
        """By class name and occurrence, so that adding or removing one callback leaves the others' state alone."""
        waiting = list(saved)
        for callback in self.callbacks:
            for entry in waiting:
                if entry[0] == type(callback).__name__:
                    callback.load_state_dict(placed_like(entry[1], parameters))
                    waiting.remove(entry)
                    break


def placed_like(tree: Any, parameters: Mapping[str, Tensor], name: str = "") -> Any:
    """The tree with tensors for its `Pieces`: one that has a parameter's name and shape is spread like it, and any
    other is whole."""
    if isinstance(tree, Pieces):
        like = parameters.get(name)
        return tree.whole() if like is None or like.shape != tree.shape else part_like(tree, like)
    if isinstance(tree, dict):
        return {key: placed_like(value, parameters, str(key)) for key, value in tree.items()}
    return type(tree)(placed_like(value, parameters) for value in tree) if isinstance(tree, (list, tuple)) else tree


def load_model(module: nn.Module, tree: Mapping[str, Tensor | Pieces]) -> None:
    """Copies parameters and buffers in place; refuses the tensors of another model, naming the first that differs."""
    own = {canonical_name(name): tensor for name, tensor in module.state_dict().items()}
    for name in own:
        if name not in tree:
            raise ValueError(f"the checkpoint has no tensor {name!r} (model {type(module).__name__}): it belongs to "
                             "another model; build the model that was trained, or start in another checkpoint_dir")
        if isinstance(own[name], Tensor) and own[name].shape != tree[name].shape:
            raise ValueError(f"checkpoint tensor {name!r} is {tuple(tree[name].shape)}, the model's is "
                             f"{tuple(own[name].shape)}; build the model with the sizes that were trained")
    extra = [name for name in tree if name not in own]
    if extra:
        raise ValueError(f"the checkpoint holds {extra[0]!r}, which the model ({type(module).__name__}) lacks: it "
                         "belongs to another model; build the model that was trained")
    if any(is_shard(tensor) or isinstance(tree[name], Pieces) for name, tensor in own.items()):
        for name, tensor in own.items():
            overwrite(tensor, tree[name])
    else:
        module.load_state_dict({name: tree[canonical_name(name)] for name in module.state_dict()})


def load_optimizer(optimizer: Optimizer, tree: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` with errors that name what differs and without aliasing the checkpoint's memory."""
    own, saved = optimizer.state_dict()["param_groups"], tree["param_groups"]
    sizes, saved_sizes = [len(group["params"]) for group in own], [len(group["params"]) for group in saved]
    if sizes != saved_sizes:
        raise ValueError(f"the checkpoint's optimizer has parameter groups of {saved_sizes} tensors, this one of "
                         f"{sizes}; pass the optimizer that the run was started with")
    parameters = dict(zip(itertools.chain(*(group["params"] for group in saved)),
                          itertools.chain(*(group["params"] for group in optimizer.param_groups))))

    def owned(value: Any, p: Tensor) -> Any:
        if isinstance(value, (Tensor, Pieces)) and is_shard(p) and value.shape == p.shape:
            return part_like(value, p)
        return value.whole() if isinstance(value, Pieces) else value.clone() if isinstance(value, Tensor) else value

    state = {index: {key: owned(value, parameters[index]) for key, value in entry.items()}
             for index, entry in tree["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": saved})
