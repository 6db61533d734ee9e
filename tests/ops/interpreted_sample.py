"""The Triton ops.sample run by Triton's interpreter on CPU tensors: tokens, bytes, bounds, races.

Not collected by name: `test_sample_triton.py` runs this file in a process with TRITON_INTERPRET=1. By hand:
`TRITON_INTERPRET=1 pytest tests/ops/interpreted_sample.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from sample_problems import DTYPES, assert_equal_to_the_reference, compare_random_rows
from torch import Tensor
from triton_gate import count_bytes

from fasttrain import ops
from fasttrain.kernels import sample as kernels
from fasttrain.kernels import sample_filters as filters
from fasttrain.kernels import sample_masses as masses
from fasttrain.ops._row_parameters import RowParameters, row_parameters
from fasttrain.ops.sample import log2, open_uniform, philox_4x32_10, sample_reference, token_masses

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


def test_seventy_random_rows() -> None:
    compare_random_rows("triton", 0, 70, longest=1000)


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
    x = (torch.randn(2, 720, generator=torch.Generator().manual_seed(1)) * 2).round(decimals=1)  # ties
    row = parameters(2, **options)
    want = kernels.sample(x, *row)
    assert torch.equal(want[0], sample_reference(x, row)[0])
    for form in ((1, 1), (8, 1)):
        assert all(torch.equal(a, b) for a, b in zip(want, kernels.sample(x, *row, form=form)))
    tokens, nothing = kernels.sample(x, *row, return_logprobs=False)
    assert torch.equal(tokens, want[0]) and nothing.numel() == 0


def logits_that_are(kind: str, B: int, V: int) -> Tensor:
    x = torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    if kind == "peaked":
        x[:, 17] = 12.0
        x[:, 290:299] = 9.0
    return x * {"peaked": 1.0, "wide": 3.0, "nearly flat": 0.01}[kind]


READ = [
    *(("peaked", options) for options in FILTERS),
    *((kind, {"top_p": p}) for kind in ("wide", "nearly flat") for p in (0.5, 0.999)),
]


@pytest.mark.parametrize(("kind", "options"), READ, ids=str)
@pytest.mark.parametrize("return_logprobs", [False, True])
def test_logits_are_read_once_and_of_filtered_rows_once_more(
    kind: str, return_logprobs: bool, options: dict[str, Any]
) -> None:
    """And the group that was drawn, and no others. Also: no access outside a tensor, no element written by one program
    and touched by another."""
    B, V = 2, 1501
    padded = torch.full((B, V + 300), math.nan)
    padded[:, :V] = logits_that_are(kind, B, V)
    row = parameters(B, **options)
    with count_bytes() as traffic:
        kernels.sample(padded[:, :V], *row, filtered=bool(options), return_logprobs=return_logprobs)
    passes = 2 if options else 1
    assert B * V * 4 < traffic.loaded["logits"] <= B * (passes * V + 256) * 4
    if not options:
        assert traffic.launches == ["groups_kernel", "draw_kernel"]
        groups = B * -(-V // 256)
        assert traffic.total - traffic.loaded["logits"] <= 4 * 4 * groups + 10 * 8 * B
    elif options.get("top_k") == 5 or (kind == "peaked" and "top_k" not in options):
        assert traffic.stored["entries"] <= 8 * B * 20  # tokens that can be left, about 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_a_vocabulary_cut_by_count_a_tenth_is_read_again(dtype: torch.dtype) -> None:
    V, k = 128256, 50
    x = torch.randn(1, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    with count_bytes() as traffic:
        kernels.sample(x, *parameters(1, top_k=k))
    again = traffic.by_kernel["list_kernel"] - traffic.stored["entries"]
    assert again <= k * 256 * x.element_size() * 1.1 + 4 * V / 256


def test_tokens_alone_are_drawn_where_nobody_asks_for_log_probabilities() -> None:
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(4))
    with count_bytes() as traffic:
        tokens = ops.sample(x, seed=2, impl="triton")
    assert traffic.launches == ["groups_kernel", "draw_kernel"]
    assert torch.equal(tokens, ops.sample(x, seed=2, impl="reference"))


def test_promising_no_filter_saves_kernels_and_changes_nothing() -> None:
    x = torch.randn(4, 900)
    row = parameters(4, temperature=0.7)
    with_, without = kernels.sample(x, *row, filtered=True), kernels.sample(x, *row, filtered=False)
    assert all(torch.equal(a, b) for a, b in zip(with_, without))


# --- The estimated masses, and the draws that they must not decide


@triton.jit
def estimates_kernel(shares, maxima, largest_logits, scales, estimates, G: tl.constexpr):
    row = tl.program_id(0)
    at = row * G + tl.arange(0, G)
    largest, scale = tl.load(largest_logits + row), tl.load(scales + row)
    exponents = masses.exponents_of(tl.load(maxima + at), largest, scale)
    tl.store(estimates + at, masses.estimated_mass(tl.load(shares + at), exponents))


def assert_estimates_hold(x: Tensor, temperature: float) -> None:
    B, G = x.size(0), x.size(1) // 256
    scale = parameters(B, temperature=temperature).scale.contiguous()
    maxima, shares = torch.empty(2, B, G).unbind()
    kernels.groups_kernel[(B, 1)](x, scale, maxima, shares, x.stride(0), x.size(1), G, GROUPS=G)
    largest = x.float().amax(1)
    got = torch.empty(B, G, dtype=torch.float64)
    estimates_kernel[(B,)](shares, maxima, largest, scale, got, G=G)
    exact = token_masses(x.float(), largest[:, None], scale).view(B, G, 256).sum(2).double()
    assert torch.equal(maxima, x.float().view(B, G, 256).amax(2))
    assert bool(((got - exact).abs() <= got * masses.ERROR.value + 256).all())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-6, 1e-30, 3.0, 50.0, 1e30])
def test_an_estimated_mass_is_as_near_to_the_exact_one_as_the_draw_takes_it_to_be(temperature: float) -> None:
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randn(4096, generator=generator) * s for s in (0.0, 1e-30, 1e-3, 0.3, 3.0, 10.0, 40.0, 1e4, 1e30)]
    rows += [rows[4] + offset for offset in (1e3, -3e4, 1e30)]
    far = torch.rand(4096, generator=generator) - 28.5  # near the least masses that are not 0
    far[7] = 0
    steps = torch.linspace(-29, 0, 4096)  # a group's tokens alike, every size of group
    rows += [far, steps, steps.flip(0), steps.view(256, 16).t().reshape(-1), far.clone(), steps.clone()]
    rows[-2][300:] = -math.inf
    rows[-1][::3] = -math.inf
    x = torch.stack(rows)
    for dtype in DTYPES:
        assert_estimates_hold(x.to(dtype).clamp(max=torch.finfo(dtype).max), temperature)


class Disturbed:
    """`groups_kernel`, whose shares then move up and down, as another device's exp2 and order of sums could move them.
    Up in half of the rows, or of each row's groups."""

    amount = 1.3e-5  # with what rounding did here it stays below the claimed error, 1.53e-5

    def __init__(self, by: str) -> None:
        self.kernel, self.dim = kernels.groups_kernel, {"row": 0, "group": 1}[by]

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(logits: Tensor, scales: Tensor, maxima: Tensor, shares: Tensor, *rest: Any, **options: Any) -> None:
            self.kernel[grid](logits, scales, maxima, shares, *rest, **options)
            sign = 1 - 2 * (torch.arange(shares.size(self.dim)) % 2)
            factor = 1 + self.amount * (sign[:, None] if self.dim == 0 else sign).double()
            shares.copy_(shares.double() * factor)

        return launch


def nearly_tied(B: int, V: int) -> tuple[Tensor, Tensor]:
    """Rows in which the quotients of the first two groups differ by up to 1e-5 of themselves, and their seeds."""
    seed, G = torch.arange(B), V // 256
    x = torch.randn(B, V, generator=torch.Generator().manual_seed(8)) * 2
    masses = token_masses(x, x.amax(1, keepdim=True), parameters(B).scale).view(B, G, 256).sum(2)
    zero = torch.zeros(B, 1, dtype=torch.int64)
    r0, r1, _, _ = philox_4x32_10((torch.arange(G), zero + 1, zero + 5, zero), (seed[:, None], zero))
    quotients = -log2(open_uniform(r0, r1)) / masses
    (best, second), group = quotients.topk(2, largest=False).values.T, quotients.argsort(1)[:, 1]
    wanted = best * (1 + torch.linspace(-1e-5, 1e-5, B, dtype=torch.float64))
    shift = torch.zeros(B, G, dtype=torch.float64).scatter_(1, group[:, None], (second / wanted).log()[:, None])
    return (x.double() + shift.repeat_interleave(256, 1)).float(), seed


def assume_error(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    for module in (kernels, filters):
        monkeypatch.setattr(module, "ERROR", tl.constexpr(error))


def test_a_near_tie_of_groups_is_decided_by_their_exact_masses(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seed = nearly_tied(24, 1024)
    row = parameters(24, seed=seed)
    want = sample_reference(x, row)[0]
    monkeypatch.setattr(kernels, "groups_kernel", Disturbed("group"))
    assert torch.equal(kernels.sample(x, *row, filtered=False, return_logprobs=False)[0], want)
    # A bound that is too small would not have seen it coming.
    assume_error(monkeypatch, masses.ERROR.value / 1000)
    assert not torch.equal(kernels.sample(x, *row, filtered=False, return_logprobs=False)[0], want)


@pytest.mark.parametrize("return_logprobs", [False, True])
def test_a_share_that_falls_between_two_tokens_is_decided_by_the_exact_total(
    monkeypatch: pytest.MonkeyPatch, return_logprobs: bool
) -> None:
    B, V = 16, 300
    x = torch.randn(B, V, generator=torch.Generator().manual_seed(9)) * 4
    weights = token_masses(x, x.amax(1, keepdim=True), parameters(B).scale).sort(1, descending=True).values.double()
    reached = weights.cumsum(1)[:, 1] / weights.sum(1)  # by the first two tokens
    top_p = reached * (1 + torch.linspace(-1e-5, 1e-5, B).double())
    row = parameters(B, seed=torch.arange(B) + 192, top_p=top_p)  # some draw the token at the edge
    want = sample_reference(x, row)
    monkeypatch.setattr(kernels, "groups_kernel", Disturbed("row"))
    got = kernels.sample(x, *row, return_logprobs=return_logprobs)
    assert torch.equal(got[0], want[0])
    if return_logprobs:
        assert torch.equal(got[1], want[1])
    assume_error(monkeypatch, masses.ERROR.value / 1000)
    got = kernels.sample(x, *row, return_logprobs=return_logprobs)
    assert not torch.equal(*((got[1], want[1]) if return_logprobs else (got[0], want[0])))


def test_a_token_in_doubt_costs_a_third_pass_only_if_it_could_be_drawn() -> None:
    """In nearly flat rows some always are, and are seldom of the group that is drawn."""
    B, V = 6, 2000
    x = logits_that_are("nearly flat", B, V)
    row = parameters(B, seed=torch.arange(B), top_p=0.7)
    with count_bytes() as traffic, pytest.MonkeyPatch.context() as patch:
        assume_error(patch, 1e-3)  # leaves about 4 tokens of each row open
        tokens, _ = kernels.sample(x, *row, return_logprobs=False)
    assert torch.equal(tokens, sample_reference(x, row)[0])
    assert traffic.loaded["doubtful_masses"] >= B // 2 * -(-V // 256) * 8
    assert traffic.loaded["logits"] <= (B * (2 * V + 256 * 2) + 4 * V) * 4


def test_any_number_of_groups_can_be_compared_by_exact_masses(monkeypatch: pytest.MonkeyPatch) -> None:
    assume_error(monkeypatch, 0.9)
    compare_random_rows("triton", 2, 10, longest=5003)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_either_sign_and_masked_neighbours_are_listed(dtype: torch.dtype) -> None:
    row = [-0.0, 0.0, -math.inf, 0.0, -0.0, -math.inf, -math.inf, -1e-7, -1.0, -0.0, -math.inf]
    x = torch.tensor([row, row[::-1], [-1.0] * 3 + row[:8]]).to(dtype)
    for options in ({"top_k": 1}, {"top_k": 4}, {"top_p": 0.7}):
        assert_equal_to_the_reference("triton", x, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_at_the_ends_of_the_numbers_are_listed(dtype: torch.dtype) -> None:
    least, most = torch.finfo(dtype).min, torch.finfo(dtype).max
    x = torch.tensor([[least] * 7, [most] * 7, [least, most] * 3 + [0.0], [-math.inf, least] * 3 + [-math.inf]])
    for options in ({"top_k": 3}, {"top_p": 0.7}, {"temperature": 1e-30, "top_p": 0.5}):
        assert_equal_to_the_reference("triton", x.to(dtype), **options)


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
    arguments = (x, 0.8, 0, 1.0, 0.0, 1, 2, *[None] * 6)
    torch.library.opcheck(torch.ops.fasttrain_interpreted.sample_tokens, arguments, test_utils=tests)


def test_a_stride_beyond_two_to_the_31_is_computed_in_64_bits(tmp_path: Any) -> None:
    stride, V = 2**30 + 8, 300
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + V, dtype=torch.float32)
    logits = flat.as_strided((4, V), (stride, 1))
    dense = torch.randn(4, V)
    logits.copy_(dense)
    got = kernels.sample(logits, *parameters(4, top_k=9))
    assert torch.equal(got[0], sample_reference(dense, parameters(4, top_k=9))[0])
