"""The Triton gate itself: that it sees what it is there to see, on kernels made to have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from triton_gate import DEVICES, Compiled, compile_for, modelled_time, occupancy, run_interpreted

SIGNATURE = {"source": "*bf16", "target": "*bf16", "numel": "i32"}
TARGETS = list(DEVICES)


@triton.jit
def scaled_copy(source, target, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(
        target + at, tl.exp2(tl.load(source + at, mask=at < numel).to(tl.float32)).to(tl.bfloat16), mask=at < numel
    )


@triton.jit
def looped_copy(source, target, numel, BLOCK: tl.constexpr):
    for start in tl.range(0, numel, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(
            target + at, tl.exp2(tl.load(source + at, mask=at < numel).to(tl.float32)).to(tl.bfloat16), mask=at < numel
        )


@triton.jit
def adds_floats(source, target, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(target, tl.sum(tl.load(source + at, mask=at < numel).to(tl.float32), 0))


@triton.jit
def scaled_by_a_scalar(source, target, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(source).to(tl.float32)
    tl.store(
        target + at, (tl.load(source + at, mask=at < numel).to(tl.float32) * scale).to(tl.bfloat16), mask=at < numel
    )


@triton.jit
def holds_too_much(source, target, numel, BLOCK: tl.constexpr):
    held = ()
    for step in tl.static_range(24):
        held = held + (tl.load(source + step * BLOCK + tl.arange(0, BLOCK)).to(tl.float32),)  # noqa: RUF005
    total = held[0]
    for step in tl.static_range(1, 24):
        total += held[step]
    scale = tl.sum(total, 0)
    for step in tl.static_range(24):
        tl.store(target + step * BLOCK + tl.arange(0, BLOCK), (held[step] * scale).to(tl.bfloat16))


@pytest.fixture(autouse=True, scope="module")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def compiled(kernel: Any, target: str, *, block: int = 2048, num_warps: int = 8, **options: Any) -> Compiled:
    signature = SIGNATURE | ({"target": "*fp32"} if kernel is adds_floats else {})
    return compile_for(kernel, signature, {"BLOCK": block}, target, element_size=2, num_warps=num_warps, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_a_simple_kernel_is_clean_and_its_numbers_are_plausible(target: str) -> None:
    result = compiled(scaled_copy, target)
    assert result.spills == result.local_bytes == result.num_float_atomics == 0
    assert result.wide_share == 1.0
    assert result.special_per_element == pytest.approx(1.0)  # one exp2 per element and no other
    assert 3 < result.instructions_per_element < 20
    assert result.occupancy == 8  # 256 threads: by threads, not by its few registers


@pytest.mark.parametrize("target", TARGETS)
def test_lost_alignment_is_seen_as_narrow_accesses(target: str) -> None:
    assert compiled(scaled_copy, target, aligned=False).wide_share == 0.0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_loading_a_scalar_is_not_a_narrow_access(target: str) -> None:
    assert compiled(scaled_by_a_scalar, target).wide_share == 1.0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_loop_is_counted_per_element_of_one_iteration(target: str) -> None:
    straight, looped = compiled(scaled_copy, target), compiled(looped_copy, target)
    assert looped.special_per_element == pytest.approx(1.0)
    assert looped.instructions_per_element < 1.5 * straight.instructions_per_element


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_spills_are_seen(target: str) -> None:
    result = compiled(holds_too_much, target, num_warps=8, max_registers=64)
    assert result.registers <= 64 and result.spills > 0 and result.local_bytes > 0


def test_spills_are_seen_on_amd() -> None:
    result = compiled(holds_too_much, "gfx942", block=16384, num_warps=16)
    assert result.spills > 0 and result.local_bytes > 0


@pytest.mark.parametrize("target", TARGETS)
def test_float_atomics_are_seen(target: str) -> None:
    assert compiled(adds_floats, target).num_float_atomics > 0


def test_occupancy_is_the_scarcest_of_registers_shared_memory_and_threads() -> None:
    h100, mi300 = DEVICES["sm_90"], DEVICES["gfx942"]
    assert occupancy(h100, 64, 1024, 0) == 1
    assert occupancy(h100, 80, 256, 0) == 3 and occupancy(h100, 81, 256, 0) == 2  # registers come by the eight
    assert occupancy(h100, 16, 128, 0) == 16 and occupancy(h100, 16, 32, 0) == 32
    assert occupancy(h100, 16, 128, 100 << 10) == 2
    assert occupancy(mi300, 128, 512, 0) == 2 and occupancy(mi300, 32, 256, 40 << 10) == 1


def test_the_model_names_the_resource_that_binds() -> None:
    def code(instructions: float, special: float) -> Compiled:
        return Compiled("sm_90", 32, 0, 0, 0, 1.0, instructions, special, 8, 0)

    assert modelled_time(3.35e12, 1e9, code(1, 1)) == (pytest.approx(1.0), "memory")
    assert modelled_time(4e9, 1e9, code(100, 1))[1] == "issue"
    assert modelled_time(4e9, 1e9, code(20, 8))[1] == "special"


def test_interpreted_tests_pass() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_triton_gate.py"))


def test_a_failing_interpreted_test_fails_with_its_output(tmp_path: Path) -> None:
    (tmp_path / "interpreted_lie.py").write_text("def test_lie():\n    assert 1 == 2, 'a lie'\n")
    with pytest.raises(AssertionError, match="a lie"):
        run_interpreted(tmp_path / "interpreted_lie.py")


def test_an_interpreted_file_without_tests_fails(tmp_path: Path) -> None:
    (tmp_path / "interpreted_nothing.py").write_text("")
    with pytest.raises(AssertionError, match="exited with 5"):
        run_interpreted(tmp_path / "interpreted_nothing.py")
