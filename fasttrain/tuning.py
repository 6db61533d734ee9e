"""optimize="auto": tries switches on the user's own model and batch, and keeps what is faster *and* equal.

Every candidate runs the same forward and backward as the plain model, in turn with it, so that a busy machine slows
both. Loss and gradients are compared in each round; a difference above the printed tolerance refuses the candidate
however fast it is. Nothing of the trying remains: gradients, buffers and generators are put back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import to_device
from .optimizations import Optimization, compile_model
from .training_loop import Parts
from .utils import device_of, draw_state, format_duration, set_draw_state, undisturbed

TOLERANCE = 1e-3
"""Largest accepted difference of a gradient, relative to its parameter's largest element."""
_GAIN = 1.03
_ROUNDS = 5


@dataclass(frozen=True)
class Candidate:
    """A switch that can be turned on and off again."""

    name: str
    what: str
    turn_on: Callable[[nn.Module], tuple[nn.Module, Callable[[], None]]]
    """Takes the model; returns the model to call and what turns the switch off."""


def tune(model: nn.Module, batch: Any, parts: Parts, candidates: list[Candidate] | None = None, *,
         log: Callable[[str], None] = print) -> tuple[nn.Module, list[Optimization]]:
    """The model to train, and a decision with its measurement for each candidate, tried one after the other on top of
    what was kept before."""
    batch = to_device(batch, device_of(model))
    decisions = []
    for candidate in default_candidates() if candidates is None else candidates:
        log(f"optimize='auto': trying {candidate.what}")
        model, decision = _try(model, candidate, batch, parts)
        decisions.append(decision)
    return model, decisions


def default_candidates() -> list[Candidate]:
    """torch.compile, and half the threads (hyper-threads and busy machines often do better with fewer)."""
    threads = torch.get_num_threads()
    fewer = [Candidate("threads", f"{threads // 2} instead of {threads} threads", _threads(threads // 2))]
    return [Candidate("torch.compile", "torch.compile", _compiled), *(fewer if threads > 1 else [])]


def _threads(count: int) -> Callable[[nn.Module], tuple[nn.Module, Callable[[], None]]]:
    def turn_on(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        return model, lambda: torch.set_num_threads(before)
    return turn_on


def _compiled(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    compiled, decision = compile_model(model)
    return compiled, decision.restore


def _try(model: nn.Module, candidate: Candidate, batch: Any, parts: Parts) -> tuple[nn.Module, Optimization]:
    times: tuple[list[float], list[float]] = ([], [])
    worst = 0.0
    with undisturbed(model):
        model.train()
        generators = draw_state(device_of(model))
        for _ in range(_ROUNDS):
            set_draw_state(generators, device_of(model))
            seconds, wanted = _measure(model, batch, parts)
            times[0].append(seconds)
            try:
                switched, turn_off = candidate.turn_on(model)
            except Exception as error:
                return model, Optimization(candidate.name, False, f"could not be turned on: {error}")
            try:
                set_draw_state(generators, device_of(model))
                if not times[1]:
                    _measure(switched, batch, parts)  # compiles
                    set_draw_state(generators, device_of(model))
                seconds, got = _measure(switched, batch, parts)
            except Exception as error:
                return model, Optimization(candidate.name, False,
                                           f"failed on this model ({type(error).__name__}: {str(error)[:200]})")
            finally:
                turn_off()
            times[1].append(seconds)
            worst = max(worst, _difference(wanted, got))
    before, after = (statistics.median(each) for each in times)
    measured = f"{candidate.what}: {format_duration(before)} -> {format_duration(after)} a pass, gradients equal to " \
               f"{worst:.0e} (tolerance {TOLERANCE:.0e})"
    if not worst <= TOLERANCE:
        return model, Optimization(candidate.name, False, f"{measured}: not the same computation")
    if before < _GAIN * after:
        return model, Optimization(candidate.name, False, f"{measured}: not faster")
    kept, turn_off = candidate.turn_on(model)
    return kept, Optimization(candidate.name, True, measured, turn_off)


def _measure(model: nn.Module, batch: Any, parts: Parts) -> tuple[float, list[Tensor]]:
    """(seconds, loss and gradients) of one pass."""
    for p in model.parameters():
        p.grad = None
    start = time.perf_counter()
    with parts.autocast():
        loss_sum, _ = parts.loss_fn(model, batch)
    loss_sum.backward()  # type: ignore[no-untyped-call]
    if loss_sum.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, [loss_sum.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    if len(wanted) != len(got):
        return float("inf")
    return max(float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30) for a, b in zip(wanted, got))
