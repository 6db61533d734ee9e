"""How a Trainer's missing parts are derived from the config, and the checks that the given ones fit together.

Plain functions without state; each error names what was given, the rule and the way out. Nothing is trained here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .averaging import averaged_weights
from .batch_stream import peek_batches
from .batches import tensors_of
from .checkpointing import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from .config import TrainConfig, to_dict
from .dealing import batches_per_turn
from .distributed import ALONE, Team
from .generation import generate
from .manifest import is_rank_tree
from .ops.adamw import AdamW
from .shard_files import tree_of_generators
from .state import TrainState
from .tokenization import Tokenizer, as_tokenizer, tokenizer_to_dict
from .utils import Interrupted, Interruption, device_of, format_count, rank_seed, seed_all, unwrap


def place_model(model: nn.Module, team: Team = ALONE) -> tuple[nn.Module, torch.device]:
    """The model on the GPU (of this rank), if there is one and the model is still on the CPU; parameters stay the same
    objects, so an optimizer made before stays valid."""
    device = device_of(model)
    on_meta = device.type == "meta"  # it gets its memory when it is known who holds which part
    if (device.type == "cpu" or on_meta) and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device()) if team.is_alone else team.device
        if not on_meta:
            model.to(device)
    elif on_meta:
        device = team.device
    return model, device


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """PyTorch raises inside where an operation has no deterministic version; afterwards the old setting holds."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that require a gradient, each once.

    Raises:
        ValueError: there is none.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True: there is nothing to train")
    return trainable


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW with weight decay on matrices and none on vectors (norm gains, biases)."""
    trainable = trainable_parameters(model)
    groups = [
        {"params": [p for _, p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas,
                      state_dtype=config.optimizer_state_dtype)
    optimizer.rounding_seed = config.seed
    return optimizer


def check_optimizer(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Refuses an optimizer that would update something else than the model, or a scheduler that drives another one.

    Raises:
        ValueError: the first parameter that the optimizer lacks, or whose parameters are not the model's.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in trainable_parameters(model) if id(p) not in held]
    if missing:
        raise ValueError(f"the optimizer does not hold {len(missing)} of the model's trainable parameters, the first "
                         f"being {missing[0]!r}; build it from this model's parameters(), after any change of it, or "
                         "freeze what it should not train with requires_grad_(False)")
    own = {id(p) for p in model.parameters()}
    if not held <= own:
        raise ValueError(f"the optimizer holds {len(held - own)} tensors that are not the model's parameters; build it "
                         "from this model's parameters()")
    driven = getattr(scheduler, "optimizer", optimizer)
    if driven is not optimizer:
        raise ValueError(f"the scheduler ({type(scheduler).__name__}) drives another optimizer than the one passed; "
                         "build it from that one")


def resolve_accumulation(config: TrainConfig, loader: Iterable[Any], world_size: int = 1) -> TrainConfig:
    """The config with grad_accum_steps (each rank's) derived from global_batch_size or global_batch_tokens, where one
    is given."""
    if not (config.global_batch_size or config.global_batch_tokens):
        return config
    rows, length = batch_shape(loader)
    name, total = ("global_batch_size", config.global_batch_size) if config.global_batch_size else \
        ("global_batch_tokens", config.global_batch_tokens)
    size = rows if name == "global_batch_size" or not rows or not length else rows * length
    if not size or (name == "global_batch_tokens" and not length):
        raise ValueError(f"TrainConfig.{name} is {total}, but {type(loader).__name__} neither says the size of a batch "
                         "nor can be read twice to find out; set grad_accum_steps instead")
    if total % (size * world_size):
        unit = "sequences" if name == "global_batch_size" else f"tokens ({rows} sequences of {length})"
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        raise ValueError(f"TrainConfig.{name} is {total}; it must be a multiple of the loader's batch of {size} {unit}"
                         f"{ranks}")
    return dataclasses.replace(config, global_batch_size=0, global_batch_tokens=0,
                               grad_accum_steps=total // (size * world_size))


def batch_shape(loader: Iterable[Any]) -> tuple[int | None, int | None]:
    """(sequences, positions) of a batch: what the loader says of itself, else what its first batch looks like."""
    rows, length = getattr(loader, "batch_size", None), getattr(getattr(loader, "dataset", None), "seq_len", None)
    if isinstance(rows, int) and isinstance(length, int):
        return rows, length
    peeked = peek_batches(loader, 1)
    largest = max(tensors_of(peeked), key=torch.Tensor.numel, default=None)
    if largest is None or largest.dim() < 1:
        return (rows if isinstance(rows, int) else None), None
    return rows if isinstance(rows, int) else largest.size(0), largest.size(1) if largest.dim() > 1 else None


def planned_steps(config: TrainConfig, loader: Iterable[Any], world_size: int = 1) -> int | None:
    """How many optimizer steps the limits amount to, or None where that cannot be known beforehand.

    Expects a config from `resolve_accumulation`.
    """
    bounds = [config.max_steps] if config.max_steps else []
    try:
        num_batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        num_batches = 0
    if config.max_epochs and num_batches:
        # Windows run across epoch ends; only the very last one can be short.
        taken = config.grad_accum_steps * batches_per_turn(loader, world_size)
        bounds.append(math.ceil(config.max_epochs * num_batches / taken))
    tokens = tokens_per_step(config, loader, world_size)
    if config.max_tokens and tokens:
        bounds.append(math.ceil(config.max_tokens / tokens))
    return min(bounds) if bounds else None


def tokens_per_step(config: TrainConfig, loader: Iterable[Any], world_size: int = 1) -> int | None:
    """Targets of a full step of all ranks, where the loader says its batch size and sequence length."""
    batch_size, length = getattr(loader, "batch_size", None), getattr(getattr(loader, "dataset", None), "seq_len", None)
    return batch_size * length * config.grad_accum_steps * world_size if batch_size and length else None


def eval_batches(data: Any, max_batches: int) -> int | None:
    """Batches of one evaluation, of the longest set where there are several; None where that is not known."""
    loaders = list(data.values()) if isinstance(data, Mapping) else [data]
    try:
        longest = max((len(loader) for loader in loaders), default=0)
    except TypeError:
        return max_batches or None
    return min(longest, max_batches) if max_batches else longest


def check_limits(config: TrainConfig) -> None:
    """Refuses a run that would never end."""
    if not (config.max_steps or config.max_epochs or config.max_tokens or config.max_seconds):
        raise ValueError("TrainConfig sets no limit, so training would never end; set max_steps, max_epochs, "
                         "max_tokens or max_seconds")


def find_tokenizer(given: Any, loader: Any, model: nn.Module) -> Tokenizer | None:
    """The argument, else the training data's, else the model's."""
    for candidate in (given, getattr(getattr(loader, "dataset", None), "tokenizer", None),
                      getattr(model, "tokenizer", None)):
        if candidate is not None:
            return as_tokenizer(candidate)
    return None


def adopt_hyperparameters(optimizer: Optimizer, saved: Mapping[str, Any], config: TrainConfig) -> None:
    """After a resume: what the user changed in the config wins over what the restored optimizer remembers. For an
    optimizer that was built from the config."""
    for group in optimizer.param_groups:
        if saved.get("betas") != list(config.betas):
            group["betas"] = config.betas
        if saved.get("weight_decay") != config.weight_decay and group["weight_decay"]:
            group["weight_decay"] = config.weight_decay
    if isinstance(optimizer, AdamW) and "seed" in saved:
        optimizer.rounding_seed = saved["seed"]  # like every other generator, it goes on as it began


def re_anchor(scheduler: LambdaLR, saved_lr: float | None, lr: float | None) -> None:
    """After a resume: the next update has the learning rate of today's schedule (another length, another peak) at the
    step reached, not the one that the checkpoint remembers. Changes no bit if the config is the same.

    Args:
        saved_lr, lr: the peaks then and now; None: the user's own optimizer, whose peaks stay.
    """
    if lr is not None and saved_lr and lr != saved_lr:
        scheduler.base_lrs = [base * (lr / saved_lr) for base in scheduler.base_lrs]
    scheduler._last_lr = [base * factor(scheduler.last_epoch)
                          for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, base, now in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler._last_lr):
        group["initial_lr"], group["lr"] = base, now


def model_config_of(model: nn.Module) -> Any:
    """The model's own config as JSON-ready data, if it has one in a form that can be written down."""
    config = getattr(model, "config", None)
    to_json = getattr(config, "to_json_string", None)  # Hugging Face's, whose fields may hold a torch.dtype
    if callable(to_json):
        return json.loads(to_json(use_diff=False))
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else None


def checkpoint_metadata(state: TrainState, config: TrainConfig, precision: torch.dtype,
                        tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run, besides the files: JSON-ready."""
    counters, module = state.counters, unwrap(state.model)
    measured = counters.last_eval_step == state.step and not state.window.micro_step
    return {
        "config": to_dict(config), "model_class": type(module).__name__, "model_config": model_config_of(module),
        "precision": str(precision), "tokenizer": None if tokenizer is None else tokenizer_to_dict(tokenizer),
        "val_loss": counters.last_val_loss if measured else None, "tokens_seen": counters.tokens_seen,
    }


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def breakable_generation(model: nn.Module, tokenizer: Tokenizer, interruption: Interruption,
                         callbacks: Sequence[Any] = (), within: Callable[..., Any] = _call) -> Callable[..., list[str]]:
    """(prompts, **options) -> texts for callbacks; a signal ends it between two tokens with Interrupted. The weights
    are the average that one of `callbacks` keeps, if one does. `within` is the spread model's (replicas.Spread)."""
    def run(prompts: Sequence[str], **options: Any) -> list[str]:
        texts = [""] * len(prompts)
        for row, piece in generate(model, list(prompts), tokenizer=tokenizer, stream=True, **options):
            texts[row] += piece
            if interruption:
                raise Interrupted(interruption.requested)
        return texts

    def run_on_average(prompts: Sequence[str], **options: Any) -> Any:
        with averaged_weights(callbacks):
            return within(run, prompts, **options)

    return run_on_average


def problem_of(path: Path, team: Team = ALONE) -> str:
    """What is wrong with a checkpoint, or an empty text; the same on every rank. Each reads a share of the ranks'
    files, so that no single one has to read them all, and rank 0 the common ones too."""
    try:
        trees = list(read_manifest(path).trees)
        ranks = [name for name in trees if is_rank_tree(name)]
        mine = ranks[team.rank::team.world_size] + ([name for name in trees if name not in ranks] if team.leads else [])
        problems = verify_checkpoint(path, names=mine)
    except CheckpointError as error:
        problems = [str(error)]
    finder = int(team.agree([float(team.world_size - team.rank) if problems else 0.0])[0])
    return team.tell("; ".join(problems), team.world_size - finder) if finder else ""


def newest_checkpoint(root: Path, team: Team, *, log: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, as all ranks see it; each newer one that does not is logged."""
    if team.is_alone:
        return latest_checkpoint(root, log=log)
    names = team.tell("\n".join(path.name for path in reversed(list_checkpoints(root) if team.leads else [])))
    for name in names.split():
        problem = problem_of(root / name, team)
        if not problem:
            return root / name
        log(f"CHECKPOINT NOT USED: {str(root / name)!r} is damaged: {problem}")
    return None


def restore(state: TrainState, path: Path) -> None:
    """Loads a checkpoint into the state, on every rank its own part; they verify it together.

    A number of ranks other than the one that wrote it goes on with the same samples; generators of ranks from 1 on are
    then seeded by (the run's seed, the step, the rank).

    Raises:
        CheckpointError: on every rank, what one of them found.
        ValueError: the checkpoint belongs to another model, optimizer or data.
    """
    team = state.team
    problem = "" if team.is_alone else problem_of(path, team)
    if problem:
        raise CheckpointError(problem)
    manifest = read_manifest(path)
    trees = load_checkpoint(path, whole=False, hashed=team.is_alone)
    source = tree_of_generators(manifest, team)
    if source not in ("rng", None):
        trees["rng"] = load_checkpoint(path, [source], hashed=False)[source]["rng"]
    state.restore(trees)
    if source is None:
        seed_all(rank_seed(manifest.metadata.get("config", {}).get("seed", 0) + state.step, team.rank))


def rewind(state: TrainState, root: Path, team: Team = ALONE) -> Path | None:
    """Back to the newest good checkpoint before the present step; the batches that `state.blamed` names are passed over
    from then on. Returns it, or None where there is none: the run is then asked to stop."""
    step, skipped, rewinds, blamed = state.step, state.stream.skipped, state.counters.rewinds, state.blamed
    names = team.tell("\n".join(path.name for path in reversed(list_checkpoints(root) if team.leads else [])
                                if int(path.name.removeprefix("step-").rstrip("~")) < step))
    good = next((root / name for name in names.split() if not problem_of(root / name, team)), None)
    if good is None:
        state.request_stop(f"step {step} was to be undone, and {str(root)!r} has no good checkpoint from before it; "
                           "set save_every_steps")
        return None
    restore(state, good)
    state.stream.skipped, state.counters.rewinds, state.blamed = skipped, rewinds + 1, None
    if blamed is not None:
        state.stream.skip(*blamed)
    return good


def describe_parameters(model: nn.Module) -> str:
    """'10.8 M' or '10.8 M, 1.2 M of them trained'."""
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    return format_count(total) + ("" if trained == total else f", {format_count(trained)} of them trained")


def size_of(trees: Any) -> int:
    """Bytes of all tensors in a tree."""
    if isinstance(trees, torch.Tensor):
        return trees.numel() * trees.element_size()
    if isinstance(trees, Mapping):
        return sum(map(size_of, trees.values()))
    if isinstance(trees, Sequence) and not isinstance(trees, (str, bytes)):
        return sum(map(size_of, trees))
    return 0
