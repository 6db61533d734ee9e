"""The bytes of every Triton kernel, counted in the interpreter, against what cannot be avoided.

Not collected by name: `test_gate_of_every_kernel.py` runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest

from bench.gate_subject import Subject
from bench.gate_subjects import ours


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("subject", ours(), ids=lambda subject: subject.name)
def test_no_byte_is_moved_that_could_be_avoided(subject: Subject) -> None:
    assert subject.minimum <= subject.bytes_per_unit() <= subject.bytes_allowed()
