"""Utilities: random state that comes back exactly, wrappers that come off, numbers that people can read."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain.utils import (
    Interruption,
    PhaseClock,
    capture_rng,
    device_of,
    format_bytes,
    format_count,
    format_duration,
    peak_rss_bytes,
    preserve_rng,
    restore_rng,
    seed_all,
    unwrap,
)


def draw() -> list[float]:
    """Every kind of draw, with the ones that keep half a result for the next call."""
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()),
            float(torch.rand(())), float(torch.randn(3).sum())]


def test_restored_generators_draw_the_same_again_through_tensors_alone() -> None:
    seed_all(5)
    draw()  # gauss and randn now hold a cached value
    states = capture_rng()
    assert all(isinstance(state, torch.Tensor) for state in states.values())
    first = draw()
    draw()
    restore_rng({name: state.clone() for name, state in states.items()})
    assert draw() == first


def test_seeding_covers_all_three_and_differs_by_seed() -> None:
    draws = []
    for seed in (3, 3, 2**40):
        seed_all(seed)
        draws.append(draw())
    assert draws[0] == draws[1]
    assert all(one != other for one, other in zip(draws[0], draws[2]))
    with pytest.raises(ValueError, match="seed is -1"):
        seed_all(-1)


def test_preserving_holds_also_through_an_exception() -> None:
    seed_all(1)
    expected = draw()
    seed_all(1)
    with pytest.raises(KeyError), preserve_rng():
        draw()
        raise KeyError
    assert draw() == expected


def test_an_incomplete_state_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks 'numpy'"):
        restore_rng({name: state for name, state in capture_rng().items() if name != "numpy"})


def test_unwrap_takes_off_compile_and_data_parallel_but_not_the_users_own_attributes() -> None:
    inner = nn.Linear(2, 2)
    assert unwrap(torch.compile(nn.DataParallel(inner))) is inner  # type: ignore[arg-type]

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = inner

    holder = Holder()
    assert unwrap(holder) is holder


def test_device_of_reads_parameters_then_buffers() -> None:
    assert device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    norm = nn.BatchNorm1d(2, affine=False, device="meta")
    assert device_of(norm).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (999, "999"), (1000, "1.00 K"), (12345, "12.3 K"), (999_600, "1.00 M"), (1.25e9, "1.25 B"),
    (2.5, "2.50")])
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(("value", "text"), [(10, "10 B"), (1536, "1.50 KiB"), (10 * 2**30, "10.0 GiB")])
def test_bytes(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (0.05, "50.0 ms"), (4, "4.0 s"), (75, "1 min 15 s"), (3725, "1 h 02 min"), (90_000, "1 d 01 h"),
    (float("inf"), "?")])
def test_durations(value: float, text: str) -> None:
    assert format_duration(value) == text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with Linux's own figure")
def test_peak_memory_is_the_kernels_figure_in_bytes() -> None:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_rss_bytes() == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_the_clocks_phases_add_up_to_the_whole() -> None:
    clock = PhaseClock()
    for phase in ("data", "work", "data"):
        time.sleep(0.003)
        clock.mark(phase)
    total = clock.elapsed()
    assert set(clock.seconds) == {"data", "work"}
    assert clock.seconds["data"] >= 0.006
    assert sum(clock.seconds.values()) == pytest.approx(total, abs=1e-3)


def test_a_signal_sets_the_flag_and_the_old_handler_comes_back() -> None:
    seen = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        interruption = Interruption()
        with interruption.watch():
            assert not interruption
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption and interruption.requested == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)


def test_watching_outside_the_main_thread_changes_nothing() -> None:
    handlers = []

    def work() -> None:
        with Interruption().watch():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
