"""Proofs on the user's own model and data: that a resumed run is the same run, and that accumulation is exact.

Both work on the live objects and put everything back, so they can be called before a long run. They compare bits
(resume) or gradients (batch maths) and name the first thing that differs. Under several ranks all of them call, each
compares what it holds, and all return the same: what the lowest rank found that found anything.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import assembly
from .batch_stream import iter_is_self
from .batches import most_elements, num_rows, split_rows, tensors_of, to_device
from .callbacks import Hooks
from .config import TrainConfig
from .dealing import blank
from .distributed import Team
from .losses import LossFunction
from .replicas import Spread
from .saver import CheckpointSaver
from .shard_files import trees_of_rank
from .shards import local
from .state import TrainState, Window
from .storage import make_directory, private_directory
from .training_loop import Parts, fit
from .utils import device_of, preserve_rng, seed_all, unwrap


@dataclass(frozen=True)
class Verification:
    """The outcome of a proof; true if it succeeded."""

    ok: bool
    summary: str
    """One sentence: what was compared and what came out."""
    first_difference: str = ""
    """Name of the first thing that differs; empty if nothing does."""

    def __bool__(self) -> bool:
        return self.ok


def verify_resume(state: TrainState, config: TrainConfig, parts: Parts, steps: int,
                  shared: Path | None = None) -> Verification:
    """Trains `steps` steps twice from the present state, the second time with a save, a wipe of everything in memory
    and a load half-way, and compares every batch, weight, moment, generator and counter bit for bit.

    Args:
        parts: with the functions that several ranks need (`reduce`, `norm`).
        shared: a directory that all ranks see, for the save; None: one for temporary files.

    Raises:
        ValueError: fewer than 2 steps, data that can be read only once, an accumulation window that a run of another
            number of ranks left open, or a directory for the save that some rank does not see.
    """
    team = state.team
    if steps < 2:
        raise ValueError(f"verify_resume(steps={steps}): at least 2 are needed, one on either side of the save")
    if iter_is_self(state.stream.loader):
        raise ValueError(f"verify_resume needs data that can be read again; {type(state.stream.loader).__name__} is "
                         "used up by reading")
    if state.window.micro_step and not team.is_alone:
        raise ValueError("verify_resume begins between two steps, and a run of one process left micro-batch "
                         f"{state.window.micro_step} of a step open, whose sums are on rank 0 alone; train on first")
    parts = dataclasses.replace(parts, evaluate=None, save=None, hooks=Hooks())
    before = copy.deepcopy(state.capture())
    seen: list[list[str]] = [[], []]
    try:
        _train(state, config, parts, steps, seen[0])
        straight = copy.deepcopy(state.capture())
        state.restore(before)
        _train(state, config, parts, steps // 2, seen[1])
        with _folder(team, shared) as folder:
            _through_a_checkpoint(state, config, folder)
        _train(state, config, parts, steps - steps // 2, seen[1])
        resumed = copy.deepcopy(state.capture())
    finally:
        state.restore(before)
        state.stop_reason = ""
    how = "" if team.is_alone else f" on {team.world_size} ranks"
    batches = round(team.add([float(len(seen[0]))])[0])
    equal = f"{steps} steps{how} with and without a resume in between: the same {batches} batches, and weights, " \
            "optimizer, generators and counters equal bit for bit"
    return _joint(team, _compared(seen, straight, resumed, steps, equal))


def _compared(seen: Sequence[Sequence[str]], straight: Any, resumed: Any, steps: int, equal: str) -> Verification:
    """What differs first on this rank; `equal` is said where nothing does."""
    for index, (one, other) in enumerate(zip(*seen)):
        if one != other:
            return Verification(False, f"batch {index} after the start differs in the resumed run: the loader does not "
                                       "return to its place", f"batch {index}")
    different = first_difference(straight, resumed)
    if not different:
        return Verification(True, equal)
    return Verification(False, f"{different} differs after {steps} steps with a resume in between", different)


def _joint(team: Team, mine: Verification) -> Verification:
    """The lowest rank's that failed, on all ranks; this one's if none did."""
    failed = int(team.agree([0.0 if mine.ok else float(team.world_size - team.rank)])[0])
    if team.is_alone or not failed:
        return mine
    rank = team.world_size - failed
    return Verification(False, f"rank {rank}: {team.tell(mine.summary, rank)}", team.tell(mine.first_difference, rank))


@contextlib.contextmanager
def _folder(team: Team, shared: Path | None) -> Iterator[Path]:
    """A directory that rank 0 makes, all see, and nobody keeps."""
    with contextlib.ExitStack() as stack:
        made = ""
        if team.leads and (team.is_alone or shared is None):
            made = stack.enter_context(tempfile.TemporaryDirectory())
        elif team.leads and shared is not None:
            make_directory(shared)
            made = str(stack.enter_context(private_directory(shared, 0)))
        folder = Path(team.tell(made))
        blind = int(team.agree([0.0 if folder.is_dir() else float(team.rank + 1)])[0])
        if blind:
            raise ValueError(f"verify_resume saves where all ranks can load, and rank {blind - 1} does not see "
                             f"{str(folder)!r}; pass Trainer(..., checkpoint_dir=...) on a file system that all share")
        yield folder
        team.barrier("the end of a proof")  # before rank 0 removes what others may still read


def _through_a_checkpoint(state: TrainState, config: TrainConfig, folder: Path) -> None:
    """Saves, forgets, and loads."""
    said: list[str] = []
    saver = CheckpointSaver(folder, config, log=said.append, team=state.team)
    saver.save(state.step, trees_of_rank(state.capture(), state.team), {}, wait=True)
    if saver.newest is None:
        raise OSError("; ".join(said))
    _wipe(state)
    assembly.restore(state, saver.newest)


def verify_batch_math(state: TrainState, spread: Spread, loss_fn: LossFunction, batch: Any, *,
                      autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
                      num_parts: int = 0, tolerance: float = 1e-4) -> Verification:
    """Compares the gradient of one batch with that of the same batch in `num_parts` micro-batches (0: one row each).

    Dropout is off (its noise would differ). A difference above `tolerance`, relative to a parameter's largest
    gradient, is named: such a loss looks across the rows of a batch, or does not return (sum, count). Of several ranks
    one computes the whole batch and all of them the micro-batches, dealt as in training; ranks whose loader gives each
    another first batch compute their own, whole and in parts.

    Args:
        loss_fn: as `spread.loss(..., alone=True)` makes it.
    """
    team, model = state.team, unwrap(state.model)
    batch = to_device(batch, device_of(model))
    rows = round(-team.agree([-float(num_rows(batch))])[0])
    num_parts = min(num_parts or rows, rows)
    if num_parts < 2:
        raise ValueError(f"verify_batch_math needs a batch of at least 2 rows to divide; this one has {rows}")
    digest = float(int(_digest(batch)[:12], 16))
    same = sum(team.agree([digest, -digest])) == 0.0
    whole, parts = [batch], split_rows(batch, num_parts)
    if same:
        whole, parts = _dealt(team, whole), _dealt(team, parts)
    with _undisturbed(model):
        one, one_count = _gradient(state, spread, loss_fn, whole, autocast)
        other, other_count = _gradient(state, spread, loss_fn, parts, autocast)
    how = "" if team.is_alone else f" on {team.world_size} ranks"
    if one_count != other_count:
        return Verification(False, f"the batch has {one_count} targets, its {num_parts} micro-batches{how} "
                                   f"{other_count}", "number of targets")
    names = list(one)
    scales = team.agree([_largest(one[name]) for name in names])
    errors = team.agree([_largest(one[name] - other[name]) for name in names])
    relative = [error / scale if scale else error for error, scale in zip(errors, scales)]
    for name, error in zip(names, relative):
        if not error <= tolerance:
            return Verification(False, f"the gradient of {name!r} differs by {error:.2e} of its largest element "
                                       f"between one batch and {num_parts} micro-batches{how} (tolerance "
                                       f"{tolerance:.0e})", name)
    return Verification(True, f"one batch of {one_count} targets and {num_parts} micro-batches{how} give the same "
                              f"gradients: the largest relative difference is {max(relative, default=0.0):.1e}")


def _dealt(team: Team, batches: list[Any]) -> list[Any]:
    """This rank's of the batches, and one that counts for nothing where the others have one more."""
    mine = batches[team.rank::team.world_size]
    turns = -(-len(batches) // team.world_size)
    return mine + [blank(batches[0])] * (turns - len(mine))


def _largest(gradient: Tensor) -> float:
    return float(gradient.abs().max()) if gradient.numel() else 0.0


def first_difference(one: Any, other: Any, path: str = "") -> str:
    """Path of the first leaf that is not the same bit for bit, or an empty string."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _bytes_of(one) == _bytes_of(other)
        return "" if same else path
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if list(one) != list(other):
            return f"{path} (keys)"
        pairs: Sequence[tuple[Any, Any, Any]] = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return f"{path} (length)"
        pairs = [(index, a, b) for index, (a, b) in enumerate(zip(one, other))]
    else:
        return "" if one == other or (one != one and other != other) else path
    for key, a, b in pairs:
        different = first_difference(a, b, f"{path}.{key}" if path else str(key))
        if different:
            return different
    return ""


def _train(state: TrainState, config: TrainConfig, parts: Parts, steps: int, seen: list[str]) -> None:
    """`steps` more steps; appends a digest of every batch."""
    def watched(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        seen.append(_digest(batch))
        return parts.loss_fn(model, batch)

    # Ended as a signal would end it: a limit would close the log interval, which a killed run does not.
    last = state.step + steps
    limits = dataclasses.replace(config, max_steps=0, max_tokens=0, max_seconds=0.0)
    fit(state, limits, dataclasses.replace(parts, loss_fn=watched, interrupted=lambda: state.step >= last))
    state.stop_reason = ""


def _wipe(state: TrainState) -> None:
    """Makes the memory look like a new process's, so that whatever a checkpoint does not bring back shows.

    Buffers outside the state_dict (rotary tables and the like) stay: a new process has them from the constructor.
    """
    with torch.no_grad():
        for tensor in unwrap(state.model).state_dict().values():
            if isinstance(tensor, Tensor):
                tensor.zero_()
    state.optimizer.state.clear()
    seed_all(987654321)


def _gradient(state: TrainState, spread: Spread, loss_fn: LossFunction, batches: Sequence[Any],
              autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> tuple[dict[str, Tensor], int]:
    """(each parameter's gradient, of a spread one this rank's part, over the number of targets; that number)."""
    model, trial = unwrap(state.model), dataclasses.replace(state, window=Window())
    for p in model.parameters():
        p.grad = None
    for batch in batches:
        with autocast():
            loss_sum, num_targets = loss_fn(model, batch)
        loss_sum.backward()  # type: ignore[no-untyped-call]
        trial.window.add(loss_sum.detach(), num_targets, most_elements(batch))
    spread.reduce(trial)
    assert trial.window.num_targets is not None
    total = int(trial.window.num_targets)
    return {name: local(p.grad).double() / max(1, total) for name, p in model.named_parameters()
            if p.grad is not None}, total


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with preserve_rng():
            yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        for module, mode in modes:
            module.training = mode


def _digest(batch: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors_of(batch):
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    return local(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
