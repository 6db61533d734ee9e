"""`count_bytes` on kernels whose traffic and faults are known. Run by test_triton_gate.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_gate import count_bytes


@triton.jit
def copy(source, target, numel, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at + SHIFT, mask=at < numel), mask=at < numel)


@triton.jit
def everyone_writes(target, BLOCK: tl.constexpr):
    tl.store(target + tl.arange(0, BLOCK), tl.program_id(0))


@triton.jit
def reads_what_another_writes(values):
    here = tl.program_id(0)
    tl.store(values + here + 1, tl.load(values + here) + 1)


@triton.jit
def everyone_adds(total):
    tl.atomic_add(total, 1)


def test_bytes_are_counted_per_argument_and_masked_lanes_are_not() -> None:
    source, target = torch.arange(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
    with count_bytes() as traffic:
        copy[(4,)](source, target, 90, SHIFT=0, BLOCK=32)
    assert torch.equal(target[:90], source[:90]) and not target[90:].any()
    assert traffic.loaded == {"source": 90 * 8} and traffic.stored == {"target": 90 * 8}
    assert traffic.total == 2 * 90 * 8 and traffic.launches == ["copy"]


def test_nothing_is_counted_after_the_context() -> None:
    source, target = torch.arange(32), torch.zeros(32, dtype=torch.int64)
    with count_bytes() as traffic:
        pass
    copy[(1,)](source, target, 32, SHIFT=0, BLOCK=32)
    assert traffic.total == 0 and torch.equal(source, target)


@pytest.mark.parametrize("shift", [1, -1])
def test_one_element_out_of_bounds_is_a_fault(shift: int) -> None:
    memory = torch.zeros(34)
    with count_bytes(), pytest.raises(Exception, match=r"MemoryFault.*outside (source|every argument)"):
        copy[(1,)](memory[1:33], torch.zeros(32), 32, SHIFT=shift, BLOCK=32)


def test_the_gap_between_two_rows_is_out_of_bounds() -> None:
    rows = torch.zeros(4, 16)[:, :8]
    with count_bytes(), pytest.raises(Exception, match=r"MemoryFault.*outside source"):
        copy[(1,)](rows, torch.zeros(16), 16, SHIFT=0, BLOCK=16)


def test_two_programs_that_write_one_element_are_a_race() -> None:
    with count_bytes(), pytest.raises(Exception, match="race on target: program 1 writes"):
        everyone_writes[(2,)](torch.zeros(8, dtype=torch.int32), BLOCK=8)


def test_a_program_that_reads_what_another_writes_is_a_race() -> None:
    with count_bytes(), pytest.raises(Exception, match="race on values: program 1 reads"):
        reads_what_another_writes[(2,)](torch.zeros(3))


def test_one_program_may_write_twice_and_two_launches_may_share_memory() -> None:
    target = torch.zeros(8, dtype=torch.int32)
    with count_bytes() as traffic:
        everyone_writes[(1,)](target, BLOCK=8)
        everyone_writes[(1,)](target, BLOCK=8)
    assert traffic.stored["target"] == 64


def test_atomics_are_no_race_and_count_as_a_read_and_a_write() -> None:
    total = torch.zeros(1, dtype=torch.int32)
    with count_bytes() as traffic:
        everyone_adds[(5,)](total)
    assert total.item() == 5 and traffic.loaded["total"] == traffic.stored["total"] == 20
