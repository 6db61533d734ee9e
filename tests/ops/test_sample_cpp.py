"""The compiled ops.sample: the reference's tokens and log-probabilities, bit for bit, on every instruction set here."""

from __future__ import annotations

import functools
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_problems import assert_equal_to_the_reference, compare_random_rows
from torch import Tensor

from fasttrain import backend_info, ops
from fasttrain.backend import extension

_C = extension()
pytestmark = [
    pytest.mark.skipif(_C is None, reason="the compiled extension is not installed"),
    pytest.mark.usefixtures("poisoned_memory"),
]
ISAS = _C.available_isas() if _C else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MANY = {"top_k": 3000, "top_p": 0.5, "min_p": 0.01}
FILTERS: list[dict[str, Any]] = [
    {}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9}, MANY,
    {"temperature": 2.0, "top_p": 0.999}, {"temperature": 0.0}, {"top_p": 0.0},
]  # fmt: skip


@pytest.fixture(params=ISAS, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_two_thousand_random_rows(isa: str) -> None:
    compare_random_rows("cpp", 0, 2_000)


@pytest.mark.slow
def test_a_hundred_thousand_random_rows(isa: str) -> None:
    compare_random_rows("cpp", 1, 100_000)


@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 255, 256, 257, 4095, 50257, 128256, 262144])
def test_every_vocabulary_size_and_type(isa: str, V: int) -> None:
    x = torch.randn(2, V, generator=torch.Generator().manual_seed(V)) * 3
    for dtype in DTYPES:
        for options in FILTERS if V < 5000 else FILTERS[V % 2 :: 4]:
            assert_equal_to_the_reference("cpp", x.to(dtype), seed=torch.arange(2), position=V, **options)


def test_a_flat_row_whose_total_exceeds_what_float64_counts_exactly(isa: str) -> None:
    x = torch.zeros(1, 262144)  # 2^58
    for options in ({}, {"top_p": 0.9}, {"top_k": 100_000}, {"top_p": 0.3}, {"top_k": 3, "top_p": 0.5}):
        assert_equal_to_the_reference("cpp", x, seed=3, **options)
    x[0, ::3] += 1e-3
    assert_equal_to_the_reference("cpp", x, seed=3, top_p=0.7)
    assert_equal_to_the_reference("cpp", x, seed=3, top_k=150_000, top_p=0.99)


def test_logits_that_cluster_where_halving_an_interval_is_slow(isa: str) -> None:
    """Subnormal steps above zero, neighbouring floats, and many ties at the cut itself."""
    tiny = (torch.arange(1, 3001, dtype=torch.int32)).view(torch.float32)  # the smallest subnormals
    neighbours = (torch.arange(3000, dtype=torch.int32) + 0x3F800000).view(torch.float32)
    ties = torch.cat((torch.full((2000,), -1.0), torch.linspace(-5, 1, 1000)))
    for row in (torch.cat((tiny, torch.tensor([1.0]))), neighbours, ties, ties.flip(0)):
        x = row[torch.randperm(len(row), generator=torch.Generator().manual_seed(0))].expand(20, -1)
        few = {"top_p": 0.01, "temperature": 1e-4}
        for options in ({"top_p": 0.5}, {"top_k": 700}, {"top_k": 1500, "top_p": 0.8}, few):
            assert_equal_to_the_reference("cpp", x, seed=torch.arange(20), **options)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_row_of_floats(data: st.DataObject) -> None:
    value = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0, -math.inf])
    row = data.draw(st.lists(value, min_size=1, max_size=40))
    if all(v == -math.inf for v in row):
        row[0] = 0.0
    options = {
        "temperature": data.draw(st.floats(0, 2.0**66, width=32)),
        "top_k": data.draw(st.integers(0, 45)),
        "top_p": data.draw(st.floats(0, 1)),
        "min_p": data.draw(st.floats(0, 1)),
        "seed": data.draw(st.integers(0, 2**63 - 1)),
        "position": data.draw(st.integers(0, 2**63 - 1)),
    }
    assert_equal_to_the_reference("cpp", torch.tensor([row]), **options)


@pytest.mark.parametrize("seed", [4, torch.tensor([4, 5, 6])], ids=["numbers", "rows"])
def test_tokens_are_the_same_without_log_probabilities_which_are_not_made(seed: int | Tensor) -> None:
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(3)) * 3
    for options in FILTERS:
        with_them, _ = ops.sample(x, seed=seed, return_logprobs=True, **options)
        with torch.profiler.profile(profile_memory=True) as profile:
            tokens = ops.sample(x, seed=seed, **options)
        assert torch.equal(tokens, with_them)
        made = [event.self_cpu_memory_usage for event in profile.key_averages() if event.key.startswith("fasttrain::")]
        assert made == [tokens.nbytes]


def test_the_number_of_threads_changes_nothing() -> None:
    x = torch.randn(23, 20_000, generator=torch.Generator().manual_seed(1)) * 3
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.sample(x, seed=torch.arange(23), top_p=0.8, impl="cpp", return_logprobs=True))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


LONG = 4 * 2**15 + 77  # logits that are worth several threads


def long_row(name: str) -> Tensor:
    """(1, LONG). In `sample is light` and `sample is heavy` the first eight tokens of each group, from which the cut is
    guessed, are unlike the others."""
    row = torch.randn(1, LONG, generator=torch.Generator().manual_seed(2)) * {"peaked": 6.0, "flat": 0.3}.get(name, 3.0)
    first = torch.arange(LONG) % 256 < 8
    if name == "sample is light":
        row[:, first] -= 9
    elif name == "sample is heavy":
        row[:, first] += 9
    elif name == "few values":
        row.round_()
    elif name == "one part":
        row[:, : LONG // 2] = -math.inf
    return row


LONG_ROWS = ["normal", "peaked", "flat", "sample is light", "sample is heavy", "few values", "one part"]
LONG_FILTERS: list[dict[str, Any]] = [
    {}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 900, "top_p": 0.9}, {"min_p": 0.01}, {"temperature": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("name", LONG_ROWS)
def test_several_threads_at_one_row_draw_the_reference_s_token(name: str, isa: str) -> None:
    row = long_row(name)
    for options in LONG_FILTERS:
        wanted = ops.sample(row, seed=3, impl="reference", return_logprobs=True, **options)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            got = ops.sample(row, seed=3, impl="cpp", return_logprobs=True, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted)), (options, threads)


def flat_row(name: str) -> Tensor:
    """(1, LONG), its mass spread over so many tokens that a sample of them tells where top-p cuts; mostly."""
    row = torch.randn(1, LONG, generator=torch.Generator().manual_seed(4)) * 0.3
    first = torch.arange(LONG) % 256 < 8  # of these the sample is made
    if name == "few values":
        row.mul_(8).round_().div_(8)
    elif name == "one value":
        row.fill_(-0.0)[0, ::2] = 0.0
    elif name == "two values, the larger rare":
        row = torch.where(row > 0.9, 1.0, 0.0)
    elif name == "masked":
        row[torch.rand(1, LONG, generator=torch.Generator().manual_seed(5)) < 0.7] = -math.inf
        row[:, : LONG // 3] = -math.inf
    elif name == "sample is light":
        row[:, first] -= 0.5
    elif name == "sample is heavy":
        row[:, first] += 0.5
    elif name == "bfloat16":
        row = row.bfloat16()
    return row


FLAT_ROWS = ["normal", "few values", "one value", "two values, the larger rare", "masked", "sample is light",
             "sample is heavy", "bfloat16"]  # fmt: skip
SHARES = (1e-9, 0.003, 0.2, 0.5, 0.9, 0.97, 0.9999, 1 - 2.0**-24)


@functools.cache
def wanted_of_flat(name: str, options: tuple[tuple[str, float], ...]) -> tuple[Tensor, Tensor]:
    return ops.sample(flat_row(name), seed=9, impl="reference", return_logprobs=True, **dict(options))  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("name", FLAT_ROWS)
def test_top_p_cuts_a_flat_row_where_the_reference_does(name: str, isa: str) -> None:
    """The log-probability tells the survivors' total, so that one token more or less shows."""
    row = flat_row(name)
    tried: list[dict[str, Any]] = [{"top_p": p} for p in SHARES]
    tried += [{"top_p": 0.9, "min_p": 0.3}, {"top_p": 0.6, "top_k": 90_000}, {"top_p": 0.9, "temperature": 30.0}]
    for options in tried:
        wanted = wanted_of_flat(name, tuple(options.items()))
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            got = ops.sample(row, seed=9, impl="cpp", return_logprobs=True, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted)), (options, threads)


@pytest.mark.parametrize("V", [300, 5000, LONG])
@pytest.mark.parametrize("ties", [3, 200, 256, 257, 290])
def test_a_small_top_k_counts_ties_by_id(V: int, ties: int, isa: str) -> None:
    """As many tokens share the largest logit, the others the next: each k ends among the former or among the latter."""
    generator = torch.Generator().manual_seed(V + ties)
    row = torch.full((1, V), -1.5)
    row[0, torch.randperm(V, generator=generator)[:ties]] = 0.25
    row[0, torch.randperm(V, generator=generator)[: V // 5]] = -math.inf
    tried: list[dict[str, Any]] = [{"top_k": k} for k in (2, 50, 127, 128, 129, 256)]
    tried += [{"top_k": 50, "top_p": p} for p in (1e-9, 0.5, 0.9, 1 - 2.0**-24)] + [{"top_k": 128, "min_p": 0.2}]
    threads = (1, 3) if V == LONG else (1,)
    for options in tried:
        for count in threads:
            torch.set_num_threads(count)
            assert_equal_to_the_reference("cpp", row.expand(8, -1), seed=torch.arange(8), **options)
            assert_equal_to_the_reference("cpp", row, seed=11, **options)


def test_several_threads_at_one_row_find_what_is_not_finite() -> None:
    torch.set_num_threads(4)
    for place in (0, LONG // 4, LONG // 2 + 1, LONG - 1):
        for bad, name in ((math.nan, "NaN"), (math.inf, r"\+inf")):
            row = long_row("normal")
            row[0, place] = bad
            with pytest.raises(ValueError, match=f"row 0 holds {name}"):
                ops.sample(row, impl="cpp")
    with pytest.raises(ValueError, match="nothing but -inf"):
        ops.sample(torch.full((1, LONG), -math.inf), impl="cpp")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_draws_without_its_parents_threads() -> None:
    """Those of PyTorch's pool are not there after a fork, and who waits for them waits for ever."""
    torch.set_num_threads(2)
    row = long_row("normal")
    want = ops.sample(row, seed=3, top_k=50, impl="cpp")
    child = os.fork()
    if child == 0:  # leaves by _exit whatever happens: pytest must not go on twice
        status = 1
        try:
            signal.alarm(60)
            status = 0 if torch.equal(ops.sample(row, seed=3, top_k=50, impl="cpp"), want) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("layout", ["transposed", "sliced columns", "every other row", "expanded", "offset"])
def test_any_strides_and_the_logits_are_only_read(layout: str) -> None:
    base = torch.randn(12, 301, generator=torch.Generator().manual_seed(0)) * 3
    views = {
        "transposed": base.t().contiguous().t(),
        "sliced columns": torch.cat([base, base], 1)[:, 301:],
        "every other row": base.repeat_interleave(2, 0)[::2],
        "expanded": base[:1].expand(12, 301),
        "offset": torch.cat([torch.zeros(1), base.flatten()])[1:].view(12, 301),
    }
    before = views[layout].clone()
    leaf = views[layout].detach().requires_grad_()
    for options in FILTERS:
        assert_equal_to_the_reference("cpp", leaf, seed=torch.arange(12), **options)
    assert torch.equal(leaf.detach(), before) and leaf._version == 0


def test_offsets_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Rows 2^30 + 8 elements apart in a sparse file: a 32-bit offset would wrap and read other memory."""
    stride, V = 2**30 + 8, 300
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + V, dtype=torch.float32)
    logits = flat.as_strided((4, V), (stride, 1))
    dense = torch.randn(4, V)
    logits.copy_(dense)
    assert torch.equal(ops.sample(logits, seed=5, impl="cpp"), ops.sample(dense, seed=5, impl="reference"))


def test_the_first_bad_row_is_named_whatever_the_threads() -> None:
    x = torch.zeros(40, 8192)
    x[13, 77], x[31] = math.nan, -math.inf
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with pytest.raises(ValueError, match="row 13 holds NaN"):
            ops.sample(x, seed=torch.arange(40), impl="cpp")


def test_nan_is_found_in_every_place(isa: str) -> None:
    for V in (1, 7, 300):
        for place in range(V):
            x = torch.zeros(1, V)
            x[0, place] = math.nan
            with pytest.raises(RuntimeError, match="NaN"):
                torch.ops.fasttrain.sample(x, 1.0, 0, 1.0, 0.0, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registered_ops_pass_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40).to(dtype)
    rows = (torch.rand(3), None, None, torch.rand(3), torch.arange(3), torch.arange(3))
    for op in (torch.ops.fasttrain.sample, torch.ops.fasttrain.sample_tokens_by_numbers):
        torch.library.opcheck(op, (x, 0.8, 5, 0.9, 0.0, 1, 2))
    for op in (torch.ops.fasttrain.sample_rows, torch.ops.fasttrain.sample_tokens):
        torch.library.opcheck(op, (x, 1.0, 5, 0.9, 0.0, 1, 2, *rows))


def test_compiles_without_a_graph_break() -> None:
    def draw(x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "position": position}
        tokens, logprobs = ops.sample(x * 2, return_logprobs=True, **options)
        return tokens + 1, logprobs

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for B in (3, 5):
        x = torch.randn(B, 500)
        for position in range(3):
            want, got = draw(x, torch.tensor(position)), compiled(x, torch.tensor(position))
            assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_auto_takes_the_compiled_kernel() -> None:
    choice = backend_info()["sample"]["cpu"]
    assert (choice.impl, choice.reason) == ("cpp", "")
