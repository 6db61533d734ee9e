"""The gate on every Triton kernel of the package: machine code here, bytes in a process of the interpreter's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from triton_gate import DEVICES, run_interpreted

from bench.gate_subject import Subject
from bench.gate_subjects import ours

KERNELS = Path(__file__).parents[1] / "kernels"
SUBJECTS = ours()


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def test_every_kernel_is_a_subject() -> None:
    launched = {name for path in KERNELS.glob("*.py") for name in re.findall(r"(\w+_kernel)\[", path.read_text())}
    assert launched == {subject.kernel for subject in SUBJECTS}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_machine_code_for_an_h100_keeps_the_rules(subject: Subject) -> None:
    assert not subject.faults(subject.compile("sm_90", True), "sm_90")


def test_bytes_are_the_minimum() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_gate_of_every_kernel.py"))


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("target", list(DEVICES))
def test_machine_code_for_every_target_keeps_the_rules(target: str, aligned: bool) -> None:
    found = [
        fault for subject in SUBJECTS for fault in subject.faults(subject.compile(target, aligned), target, aligned)
    ]
    assert not found, "\n".join(found)


def test_the_gate_sees_a_kernel_that_breaks_its_rules() -> None:
    subject = next(subject for subject in SUBJECTS if subject.kernel == "_update_kernel")
    code = subject.compile("sm_90", True)
    unaligned = subject.compile("sm_90", False)
    assert subject.faults(unaligned, "sm_90")  # narrow accesses
    for broken in ({"spills": 3}, {"num_float_atomics": 1}, {"occupancy": 1}, {"instructions_per_element": 1e4}):
        assert len(subject.faults(type(code)(**{**vars(code), **broken}), "sm_90")) == 1
