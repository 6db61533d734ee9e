"""The training loop: `fit` is the schedule, `train_step` is one optimizer update. Read this file first.

    from fasttrain.training_loop import fit, TrainState, BatchStream
    fit(TrainState(model, optimizer, BatchStream(loader)), TrainConfig(max_steps=1000))

is a whole training run, and `fit` is short enough to copy into a script and change. The loop knows no model, writes
no file and prints nothing: what to evaluate, where to save and what to show are functions and callbacks passed in.

One step is exact whatever the micro-batches look like: gradients of *summed* losses are accumulated and divided once
by the number of targets in the whole window. The verdict on NaN and infinity falls before the update, on the device.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .batch_stream import BatchStream
from .batches import most_elements, num_rows, split_rows, to_device
from .callbacks import Hooks
from .config import TrainConfig
from .dealing import blank, is_blank
from .evaluation import EvalResult
from .losses import LossFunction, batch_loss
from .ops.adamw import AdamW, global_norm
from .state import Drawn, TrainState
from .update import apply_update
from .utils import (
    Interrupted,
    PhaseClock,
    device_of,
    draw_state,
    is_out_of_memory,
    on_host,
    peak_memory_bytes,
    set_draw_state,
)

__all__ = ["BatchStream", "Parts", "TrainState", "fit", "train_step"]


def _nothing(state: TrainState) -> None:
    """What one process has to agree on with others."""


def _never(state: TrainState) -> bool:
    """What happens on other ranks only."""
    return False


def _no_figures() -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Parts:
    """The functions that a loop is assembled from; every default is the plain choice."""

    loss_fn: LossFunction = batch_loss
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    hooks: Hooks = field(default_factory=Hooks)
    clock: PhaseClock = field(default_factory=PhaseClock)
    evaluate: Callable[[], EvalResult] | None = None
    """Scores the model on the validation data."""
    save: Callable[[], None] | None = None
    """Writes a checkpoint of the state."""
    rewind: Callable[[], None] | None = None
    """Goes back to the last good checkpoint and passes over the batches since then that a callback blamed."""
    interrupted: Callable[[], Any] = bool
    """True once the process was asked to end; asked after every micro-batch. (`bool()` is False.)"""
    agree: Callable[[TrainState], None] = _nothing
    """Makes requests, the wish to stop, signals and the time the same on all ranks; called after each step."""
    reduce: Callable[[TrainState], None] = _nothing
    """Makes the window's loss, number of targets and gradients those of all ranks."""
    rejoin: Callable[[TrainState, Any, bool], None] | None = None
    """Where ranks wait for each other inside a pass (fsdp): goes through one that adds nothing, with the batch given,
    for a rank whose memory ran out; True: through the rest of the pass that it ran out in. None: nobody waits."""
    again: Callable[[TrainState], bool] = _never
    """Whether the window has to be computed again, on all ranks, because memory ran out on one."""
    figures: Callable[[], dict[str, Any]] = _no_figures
    """What a record says of the single ranks; called at each record, on all of them."""
    norm: Callable[[list[Tensor]], Tensor] = global_norm
    """The 2-norm of all gradients, for optimizers that do not compute it themselves."""


def fit(state: TrainState, config: TrainConfig, parts: Parts | None = None) -> str:
    """Trains until a limit of `config`, the data, a callback or a signal ends it.

    Returns "completed", "stopped" (a callback, or nonfinite="stop") or "interrupted". The phases of a step come in a
    fixed order: step, log, evaluate, best and stop, save.
    """
    parts = parts or Parts()
    hooks, clock = parts.hooks, parts.clock
    state.model.train()
    adopt_clipping(state, config)
    interrupted = bool(parts.interrupted())
    saved_step = state.step if state.step else -1
    # A signal may have cut off the evaluation that was due where the checkpoint was taken.
    owed = due("eval", state, config) if state.step else config.eval_at_start
    if parts.evaluate is not None and owed and state.counters.last_eval_step != state.step:
        interrupted = not run_evaluation(state, config, parts, parts.evaluate)
    while not (interrupted or state.stop_reason or limit_reached(state, config, clock)):
        if not train_step(state, config, parts):  # the data are over, or a signal came inside the window
            interrupted = bool(parts.interrupted())
            break
        hooks.fire("on_step", state)
        parts.agree(state)
        if state.take_request("rewind"):
            rewind(state, config, parts)
            continue
        if due("log", state, config):
            log(state, config, parts)
        if parts.evaluate is not None and (state.take_request("evaluate") or due("eval", state, config)):
            interrupted = not run_evaluation(state, config, parts, parts.evaluate)
        interrupted = interrupted or bool(parts.interrupted())
        if state.stop_reason or interrupted or limit_reached(state, config, clock):
            break  # the last checkpoint comes after the last evaluation
        if parts.save is not None and (state.take_request("save") or due("save", state, config)):
            save(state, config, parts, parts.save)
            saved_step = state.step
    settle(state, config, parts)
    if not interrupted:
        if state.counters.interval_targets or state.counters.interval_nonfinite:
            log(state, config, parts)
        if parts.evaluate is not None and state.counters.last_eval_step != state.step:
            interrupted = not run_evaluation(state, config, parts, parts.evaluate)
            saved_step = -1  # a checkpoint of this step does not know its validation loss yet
    if parts.save is not None and (saved_step != state.step or state.window.micro_step):
        save(state, config, parts, parts.save)
    clock.mark("other")
    return "interrupted" if interrupted else "stopped" if state.stop_reason else "completed"


def train_step(state: TrainState, config: TrainConfig, parts: Parts) -> bool:
    """One optimizer step over `grad_accum_steps` micro-batches, or over what is left when the data end.

    Continues a window that a checkpoint left open. False if no step was taken: no data, or interrupted inside the
    window (whose gradients then stay in place).
    """
    device, window, clock = device_of(state.model), state.window, parts.clock
    while window.micro_step < config.grad_accum_steps:
        clock.mark("other")
        epoch = state.stream.epoch
        batch = state.stream.next_batch()
        clock.mark("data")
        if state.stream.epoch != epoch:
            parts.hooks.fire("on_epoch_end", state, epoch)
        if batch is None:
            if window.micro_step == 0 or parts.interrupted():
                return False
            break  # the data end inside a window: a shorter step, exact because targets are counted
        batch = to_device(batch, device)
        clock.mark("transfer")
        accumulate(state, parts, Drawn(batch, draw_state(device)))
        clock.mark("forward_backward")
        if parts.interrupted() and window.micro_step < config.grad_accum_steps:
            return False
    while parts.again(state):
        redo_in_smaller_pieces(state, parts, window.out_of_memory or "(on another rank)")
    parts.reduce(state)
    parts.hooks.fire("on_gradients", state)
    settle(state, config, parts)  # the verdict on the step before decides this one's learning rate
    apply_update(state, config.max_grad_norm, parts.norm)
    if on_host(device):  # reading host memory waits for nothing, so there is no reason to lag behind
        settle(state, config, parts)
    clock.mark("optimizer")
    return True


def accumulate(state: TrainState, parts: Parts, drawn: Drawn) -> None:
    """Adds one micro-batch to the window: gradients of its summed loss, that sum, and the number of targets. Where
    memory does not suffice, the window so far is done again in smaller pieces."""
    state.window.drawn.append(drawn)
    try:
        loss_sum, num_targets = forward_backward(state, parts, drawn.batch)
    except Exception as error:
        if parts.rejoin is not None or not is_out_of_memory(error):
            raise
        problem = str(error)
    else:
        state.window.add(loss_sum, num_targets, most_elements(drawn.batch))
        return
    # Outside of the handler: the traceback held the failed pass's activations.
    redo_in_smaller_pieces(state, parts, problem)


def forward_backward(state: TrainState, parts: Parts, batch: Any) -> tuple[Tensor, Tensor]:
    """(loss sum, number of targets) of a micro-batch; sums over its pieces where there are several."""
    sums: tuple[Tensor, Tensor] | None = None
    count = state.counters.num_pieces
    pieces = split_rows(batch, count) if count > 1 else [batch]
    if parts.rejoin is not None:  # as many passes on every rank, whatever its batch
        pieces += (count - len(pieces)) * [pieces[-1] if is_blank(pieces[-1]) else blank(pieces[-1])]
    compute = one_pass if parts.rejoin is None else functools.partial(shared_pass, rejoin=parts.rejoin)
    for index, piece in enumerate(pieces):
        state.window.pieces_left = len(pieces) - 1 - index
        loss_sum, num_targets = compute(state, parts, piece)
        sums = (loss_sum, num_targets) if sums is None else (sums[0] + loss_sum, sums[1] + num_targets)
    assert sums is not None
    return sums


def one_pass(state: TrainState, parts: Parts, batch: Any) -> tuple[Tensor, Tensor]:
    """Forward and backward of one piece: (loss sum, number of targets)."""
    with parts.autocast():
        loss_sum, num_targets = parts.loss_fn(state.model, batch)
    (loss_sum if state.scaler is None else state.scaler.scale(loss_sum)).backward()  # type: ignore[no-untyped-call]
    return loss_sum.detach(), num_targets


def shared_pass(state: TrainState, parts: Parts, batch: Any,
                rejoin: Callable[[TrainState, Any, bool], None]) -> tuple[Tensor, Tensor]:
    """The same where the other ranks wait for this one inside of it: when memory runs out, it stays with them until the
    window is over, computing nothing, and then all of them do the window again."""
    window, failed = state.window, False
    if not window.out_of_memory:
        try:
            return one_pass(state, parts, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            window.out_of_memory, failed = str(error), True
    rejoin(state, batch, failed)  # outside of the handler: the traceback held the failed pass's activations
    device = device_of(state.model)
    return torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)


def redo_in_smaller_pieces(state: TrainState, parts: Parts, problem: str) -> None:
    """Computes the open window again with every micro-batch divided twice as finely, and keeps it so for the rest of
    the run. The failed pass may have added some of its gradients, so all of the window's start anew; one denominator
    for the whole window makes the pieces' sum the same step."""
    window, counters, device = state.window, state.counters, device_of(state.model)
    drawn, rows = window.drawn, max(num_rows(drawn.batch) for drawn in window.drawn)
    rows = rows if parts.rejoin is None else int(state.team.agree([rows])[0])  # all ranks do it, and decide alike
    complete = window.micro_step == len(drawn) - (parts.rejoin is None)
    if 2 * counters.num_pieces > max(rows, 1) or not complete:
        why = f"one sequence of {rows} at a time is still too much" if complete else \
            "the window was opened before a resume and cannot be done again"
        raise torch.OutOfMemoryError(f"out of memory in step {state.step + 1}, and {why}; use shorter sequences, "
                                     f"smaller batches or activation_checkpointing='full'. The allocator: {problem}")
    counters.num_pieces *= 2
    parts.hooks.fire("on_event", state, "out_of_memory", {
        "pieces": counters.num_pieces, "sequences": -(-rows // counters.num_pieces), "problem": problem})
    if device.type == "cuda":
        torch.cuda.empty_cache()
    state.optimizer.zero_grad(set_to_none=True)
    window.clear()
    for each in drawn:
        set_draw_state(each.generators, device)
        accumulate(state, parts, each)


def settle(state: TrainState, config: TrainConfig, parts: Parts) -> None:
    """Books the latest step: counters, the scheduler (real updates only), the policy for non-finite steps.

    The loop calls this when the next step's work is already queued on the device, so the wait costs nothing there.
    """
    if state.pending is None:
        return
    loss_sum, num_targets, norm, skipped = state.pending.read()
    state.judged, state.pending = state.pending.drawn, None
    counters = state.counters
    counters.tokens_before, counters.tokens_seen = counters.tokens_seen, counters.tokens_seen + int(num_targets)
    counters.last_was_empty = not num_targets
    counters.last_grad_norm, counters.last_lr = norm, float(state.optimizer.param_groups[0]["lr"])
    counters.last_loss = loss_sum / num_targets if num_targets else math.nan
    if not skipped:
        counters.interval_loss += loss_sum
        counters.interval_targets += int(num_targets)
        counters.nonfinite_in_a_row = 0
        if state.scheduler is not None and not isinstance(state.scheduler, ReduceLROnPlateau):
            state.scheduler.step()
    elif not num_targets:
        counters.empty_steps += 1
    else:
        counters.nonfinite_steps += 1
        counters.nonfinite_in_a_row += 1
        counters.interval_nonfinite += 1
        # An overflow of scaled float16 gradients is the scaler feeling for its scale, not a sick run.
        overflow = state.scaler is not None and math.isfinite(loss_sum)
        if config.nonfinite == "stop" and not overflow:
            state.request_stop(f"non-finite loss or gradient at step {state.step} (nonfinite='stop')")
        elif 0 < config.max_nonfinite_in_a_row <= counters.nonfinite_in_a_row:
            state.request_stop(f"{counters.nonfinite_in_a_row} non-finite steps in a row, the last step {state.step}")
        parts.hooks.fire("on_nonfinite", state)


def log(state: TrainState, config: TrainConfig, parts: Parts) -> None:
    """One record of plain numbers to the callbacks; the only place that waits for the device on purpose."""
    settle(state, config, parts)
    counters, clock = state.counters, parts.clock
    targets = counters.interval_targets
    counters.train_loss = counters.interval_loss / targets if targets else counters.last_loss
    record: dict[str, Any] = {
        "loss": counters.train_loss,
        "lr": counters.last_lr,
        "grad_norm": counters.last_grad_norm,
        "epoch": state.stream.epoch,
        "tokens": counters.tokens_seen,
        "nonfinite": counters.interval_nonfinite,
        "nonfinite_steps": counters.nonfinite_steps,
        "empty_steps": counters.empty_steps,
        "seconds": clock.elapsed(),
        "memory_bytes": peak_memory_bytes(device_of(state.model)),
        "phase_seconds": dict(clock.seconds),
        "ranks": state.team.world_size,
        "communication_seconds": state.team.seconds,
        **parts.figures(),
    }
    counters.interval_loss, counters.interval_targets, counters.interval_nonfinite = 0.0, 0, 0
    parts.hooks.fire("on_log", state, record)
    clock.mark("log")


def run_evaluation(state: TrainState, config: TrainConfig, parts: Parts, evaluate: Callable[[], EvalResult]) -> bool:
    """Evaluates, keeps the best, lets callbacks decide. False if a signal came meanwhile."""
    settle(state, config, parts)
    parts.hooks.fire("on_eval_start", state)
    parts.clock.mark("other")
    try:
        result = evaluate()
    except Interrupted:
        return False
    parts.clock.mark("eval")
    counters = state.counters
    counters.last_val_loss, counters.last_eval_step = result.loss, state.step
    if result.loss < counters.best_val_loss:
        counters.best_val_loss, counters.best_step = result.loss, state.step
    if isinstance(state.scheduler, ReduceLROnPlateau):
        state.scheduler.step(result.loss)
    parts.hooks.fire("on_eval", state, result)
    parts.clock.mark("log")
    return True


def rewind(state: TrainState, config: TrainConfig, parts: Parts) -> None:
    """Goes back to a checkpoint, or stops where there is none."""
    settle(state, config, parts)
    if parts.rewind is None:
        state.request_stop(f"a callback asked to rewind at step {state.step}, and there is no checkpoint_dir")
    else:
        parts.rewind()
    parts.clock.mark("other")


def save(state: TrainState, config: TrainConfig, parts: Parts, write: Callable[[], None]) -> None:
    settle(state, config, parts)
    parts.clock.mark("other")
    write()
    parts.clock.mark("save")


def limit_reached(state: TrainState, config: TrainConfig, clock: PhaseClock) -> bool:
    """Whether steps, tokens or seconds are used up (epochs are the stream's: it ends)."""
    if config.max_steps and state.step >= config.max_steps:
        return True
    if config.max_seconds and clock.elapsed() >= config.max_seconds:
        return True
    return bool(config.max_tokens) and state.tokens_seen_exactly(config.max_tokens) >= config.max_tokens


def adopt_clipping(state: TrainState, config: TrainConfig) -> None:
    """Our AdamW clips inside its own pass; an optimizer that was given its own max_grad_norm keeps it."""
    optimizer = state.optimizer
    if isinstance(optimizer, AdamW) and optimizer.max_grad_norm is None and config.max_grad_norm:
        optimizer.max_grad_norm = config.max_grad_norm


def due(what: Literal["log", "eval", "save"], state: TrainState, config: TrainConfig) -> bool:
    """Whether the latest step is one after which that phase comes: every so many tokens, else every so many steps."""
    if what in config.every_tokens:
        return state.passed_multiple(config.every_tokens[what])
    every: int = getattr(config, f"{what}_every_steps")
    return every > 0 and state.step % every == 0
