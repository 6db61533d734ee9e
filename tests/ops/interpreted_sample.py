"""The Triton ops.sample run by Triton's interpreter on CPU tensors: tokens, bytes, bounds, races.

Not collected by name: `test_sample_triton.py` runs this file in a process with TRITON_INTERPRET=1. By hand:
`TRITON_INTERPRET=1 pytest tests/ops/interpreted_sample.py`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sample_problems import DTYPES, assert_equal_to_the_reference, compare_random_rows
from triton_gate import count_bytes

from fasttrain import ops
from fasttrain.kernels import sample as kernels
from fasttrain.ops._row_parameters import RowParameters, row_parameters
from fasttrain.ops.sample import sample_reference

# numpy remarks on what float32 does by itself: -inf for a far token, NaN in a row that is about to be refused.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]
NOTHING: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3, "position": 5}
EVERYTHING = {"top_k": 700, "top_p": 0.8, "min_p": 0.01}
FILTERS: list[dict[str, Any]] = [{}, {"min_p": 0.05}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}, EVERYTHING]


def parameters(batch: int, **options: Any) -> RowParameters:
    return row_parameters(batch, torch.device("cpu"), NOTHING | options)


def test_a_hundred_random_rows() -> None:
    compare_random_rows("triton", 0, 100, longest=1000)


@pytest.mark.slow
def test_a_thousand_random_rows() -> None:
    compare_random_rows("triton", 1, 1000, longest=5003)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_rows_that_span_programs_and_lists_that_span_blocks(options: dict[str, Any]) -> None:
    x = torch.randn(2, 5003, generator=torch.Generator().manual_seed(0)) * 2
    for row, dtype in zip(x, DTYPES):
        assert_equal_to_the_reference("triton", row[None].to(dtype), **options)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_launch_shape_changes_nothing(options: dict[str, Any]) -> None:
    x = (torch.randn(2, 1100, generator=torch.Generator().manual_seed(1)) * 2).round(decimals=1)  # ties
    want = sample_reference(x, parameters(2, **options))
    for num_groups in (1, 2, 8):
        got = kernels.sample(x, *parameters(2, **options), num_groups=num_groups)
        assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_logits_are_read_twice_and_the_drawn_group_once_more(options: dict[str, Any]) -> None:
    """Also: no access outside a tensor, no element written by one program and touched by another."""
    B, V = 2, 3001
    padded = torch.full((B, V + 300), math.nan)
    padded[:, :V] = torch.randn(B, V)
    filtered = bool({"top_k", "top_p", "temperature"} & options.keys())
    with count_bytes() as traffic:
        kernels.sample(padded[:, :V], *parameters(B, **options), filtered=filtered)
    assert 2 * B * V * 4 < traffic.loaded["logits"] <= B * (2 * V + 256) * 4
    small = 12 * B * -(-V // 256)  # values per group of 256
    if not filtered:
        assert traffic.total - traffic.loaded["logits"] <= 8 * small
        assert set(traffic.launches) == {"_maxima_kernel", "_bounds_kernel", "_masses_kernel", "_draw_kernel"}
    elif options.get("top_k") == 5 or "temperature" in options:
        assert traffic.stored["list_ranks"] <= 8 * B * 10  # of 3001 tokens only those that can be among the first 5


def test_promising_no_filter_saves_kernels_and_changes_nothing() -> None:
    x = torch.randn(4, 900)
    row = parameters(4, min_p=0.1, temperature=0.7)
    with_, without = kernels.sample(x, *row, filtered=True), kernels.sample(x, *row, filtered=False)
    assert all(torch.equal(a, b) for a, b in zip(with_, without))


@pytest.mark.parametrize(("bad", "found"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "nothing but -inf")])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_a_row_without_a_distribution_raises(bad: float, found: str, options: dict[str, Any]) -> None:
    x = torch.zeros(3, 300)
    if bad == -math.inf:
        x[1] = bad
    else:
        x[1, 270] = bad
    with pytest.raises(ValueError, match=f"row 1 holds {found}"):
        ops.sample(x, impl="triton", **options)


def test_parameters_are_checked() -> None:
    for wrong, message in (({"top_p": 1.5}, "top_p is 1.5"), ({"seed": torch.tensor([-1, 0])}, "seed is -1")):
        with pytest.raises(ValueError, match=message):
            ops.sample(torch.zeros(2, 5), impl="triton", **wrong)


def test_registered_ops_pass_opcheck() -> None:
    x = torch.randn(2, 40)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fasttrain_interpreted.sample, (x, 0.8, 5, 0.9, 0.0, 1, 2), test_utils=tests)


def test_a_stride_beyond_two_to_the_31_is_computed_in_64_bits(tmp_path: Any) -> None:
    stride, V = 2**30 + 8, 300
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + V, dtype=torch.float32)
    logits = flat.as_strided((4, V), (stride, 1))
    dense = torch.randn(4, V)
    logits.copy_(dense)
    got = kernels.sample(logits, *parameters(4, top_k=9))
    assert torch.equal(got[0], sample_reference(dense, parameters(4, top_k=9))[0])
