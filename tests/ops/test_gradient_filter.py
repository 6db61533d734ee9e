"""Gradient filtering of ops.linear_cross_entropy: what it leaves out, what it saves, and the bound on what it costs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain import ops, products
from fasttrain.backend import extension

chunks = sys.modules["fasttrain.ops._linear_chunks"]
gradient_filter = sys.modules["fasttrain.ops._gradient_filter"]
_C = extension()
needs_extension = pytest.mark.skipif(_C is None, reason="the compiled extension is not installed")
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension)]
TERMS: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}]
pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_blocks")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chunks, gradient_filter):
        monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    monkeypatch.setattr(chunks, "MIN_ROWS", 9)  # two blocks of four
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", {"cpu": 1, "cuda": 1})


@pytest.fixture(params=_C.available_isas() if _C else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def head(
    N: int = 37, D: int = 8, V: int = 1030, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets: every third row without a target, every second one confident."""
    generator = torch.Generator().manual_seed(N + D + V)
    hidden, weight, bias = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((N, D), (V, D), (V,)))
    targets = torch.randint(0, V, (N,), generator=generator)
    hidden[::2] = 6 * weight[targets[::2]] / weight[targets[::2]].norm(dim=1, keepdim=True)
    targets[1::3] = -100
    return hidden, weight * 2, bias, targets


def run(*tensors: Any, upstream: Tensor | float = 1.0, **options: Any) -> list[Tensor]:
    """Loss, skipped mass, and the three gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    loss, skipped = ops.linear_cross_entropy(
        *leaves[:2], tensors[3], bias=leaves[2], return_skipped_mass=True, **options
    )
    (loss * upstream).sum().backward()
    return [loss.detach(), skipped, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def assert_all_close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)


@needs_extension
@pytest.mark.parametrize("terms", TERMS, ids=["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cpp_leaves_out_what_the_reference_leaves_out(isa: str, reduction: str, terms: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        tensors = head(dtype=dtype)
        upstream = torch.linspace(-1, 2, 37, dtype=dtype) if reduction == "none" else 0.7
        for eps in (0.0, 1e-3, 0.03, 10.0):
            got, want = (
                run(*tensors, upstream=upstream, impl=impl, reduction=reduction, filter_eps=eps, **terms)
                for impl in ("cpp", "reference")
            )
            assert_all_close(got, want, tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_threshold_of_zero_changes_nothing(impl: str, reduction: str) -> None:
    tensors = head()
    exact, filtered = (run(*tensors, impl=impl, reduction=reduction, filter_eps=eps) for eps in (None, 0.0))
    assert_all_close(filtered, exact, 1e-13)
    assert not filtered[1].any() and filtered[1].shape == filtered[0].shape


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_skipped_mass_bounds_the_error_of_both_gradients(impl: str, reduction: str) -> None:
    hidden, weight, bias, targets = head()
    upstream = torch.linspace(-1, 2, 37, dtype=torch.float64) if reduction == "none" else torch.tensor(-3.0).double()
    exact = run(hidden, weight, bias, targets, upstream=upstream, impl=impl, reduction=reduction)
    for eps in (1e-4, 1e-3, 1e-2, 0.1, 2.0):
        got = run(hidden, weight, bias, targets, upstream=upstream, impl=impl, reduction=reduction, filter_eps=eps)
        mass = (got[1] * upstream.abs()).sum()
        errors = [(ours - theirs).norm() for ours, theirs in zip(got[2:], exact[2:])]
        assert 0 < errors[0] <= mass * weight.norm(dim=1).max()
        assert 0 < errors[1] <= mass * hidden.norm(dim=1).max()
        assert errors[2] < 1e-12 and torch.allclose(got[0], exact[0], rtol=1e-13)  # bias and loss are whole
    assert not got[2].any() and not got[3].any()  # a threshold above every element leaves nothing


@needs_extension
def test_what_is_left_out_does_not_depend_on_the_size_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = head()
    small = run(*tensors, impl="cpp", filter_eps=0.01)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", {"cpu": 1 << 30, "cuda": 1})
    assert_all_close(run(*tensors, impl="cpp", filter_eps=0.01), small, 1e-12)


@needs_extension
def test_a_peaked_distribution_saves_products_and_an_even_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = head()
    multiplied = 0
    original = gradient_filter.multiply

    def counting(by: products.By, a: Tensor, b: Tensor) -> Tensor:
        nonlocal multiplied
        multiplied += a.size(0) * a.size(1) * b.size(1)
        return original(by, a, b)

    monkeypatch.setattr(gradient_filter, "multiply", counting)
    dense = 2 * int((targets != -100).sum()) * weight.numel()
    shares = []
    for spread in (0.01, 1.0, 30.0):  # of the logits
        multiplied = 0
        run(hidden * spread, weight, bias * 0, targets, impl="cpp", filter_eps=1e-5)
        shares.append(multiplied / dense)
    assert shares[0] > 0.99 and 0.05 < shares[1] < 0.9 and shares[2] < 0.05


@needs_extension
def test_rows_without_a_target_and_rows_that_are_certain_are_in_no_product() -> None:
    hidden, weight, bias, targets = head()
    hidden[targets == -100] = float("nan")
    results = run(hidden, weight, bias, targets, impl="cpp", filter_eps=1e-3)
    assert all(torch.isfinite(result).all() for result in results)
    hidden[0] *= 1000
    targets[0] = (weight @ hidden[0]).argmax()
    grad_hidden = run(hidden, weight, bias, targets, impl="cpp", filter_eps=1e-3)[2]
    assert not grad_hidden[0].any() and grad_hidden[2].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_that_is_not_finite_is_not_filtered_away(impl: str) -> None:
    hidden, weight, bias, targets = head()
    hidden[3, 0] = float("nan")
    _, _, grad_hidden, grad_weight, _ = run(hidden, weight, bias, targets, impl=impl, filter_eps=0.5)
    assert grad_hidden[3].isnan().all() and grad_weight.isnan().any(1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_grad_the_mass_says_what_a_filter_would_skip(impl: str, reduction: str) -> None:
    tensors = head()
    want = run(*tensors, impl=impl, reduction=reduction, filter_eps=0.02)
    options: dict[str, Any] = {"bias": tensors[2], "impl": impl, "reduction": reduction, "return_skipped_mass": True}
    with torch.no_grad():
        assert_all_close([*ops.linear_cross_entropy(*tensors[:2], tensors[3], filter_eps=0.02, **options)], want[:2])
        loss, none = ops.linear_cross_entropy(*tensors[:2], tensors[3], **options)
    assert none.shape == loss.shape and not none.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_target_at_all(impl: str, rows: int) -> None:
    hidden, weight, bias, targets = head()
    loss, skipped, grad_hidden, grad_weight, _ = run(
        hidden[:rows], weight, bias, targets[:rows].fill_(-100), impl=impl, reduction="sum", filter_eps=0.1
    )
    assert not any(result.any() for result in (loss, skipped, grad_hidden, grad_weight))


@needs_extension
@pytest.mark.parametrize("layout", ["transposed", "bfloat16", "transposed bfloat16"])
def test_other_layouts_and_types_of_the_weight(layout: str) -> None:
    hidden, weight, bias, targets = head(dtype=torch.float32)
    weight = weight.bfloat16() if "bfloat16" in layout else weight
    weight = weight.t().contiguous().t() if "transposed" in layout else weight
    got, want = (run(hidden, weight, bias, targets, impl=impl, filter_eps=0.01) for impl in ("cpp", "reference"))
    assert got[3].stride() == weight.stride()
    assert_all_close(got, want, 0.01 if "bfloat16" in layout else 1e-4)


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction: str) -> None:
    hidden, weight, bias, targets = head()

    def step(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear_cross_entropy(
            h * 2, w, targets, bias=bias, reduction=reduction, filter_eps=0.02, return_skipped_mass=True
        )

    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
        loss, skipped = call(*leaves)
        (3 * loss).sum().backward()
        results.append([loss.detach(), skipped.detach(), *(leaf.grad for leaf in leaves)])
    assert_all_close(*results)  # type: ignore[arg-type]


@needs_extension
def test_registered_ops_pass_opcheck() -> None:
    *tensors, targets = head(9, 3, 6)
    leaves = [*(tensor.requires_grad_() for tensor in tensors), targets]
    needs, terms, op = [True, True, True], (-100, 0.1, 1e-3, 5.0, 0.05), torch.ops.fasttrain
    torch.library.opcheck(op.linear_cross_entropy_forward, (*leaves, torch.float64, *terms, True))
    scale = torch.tensor(0.5, dtype=torch.float64)
    torch.library.opcheck(op.linear_cross_entropy_fused, (*leaves, scale, torch.float64, needs, *terms))
    detached = [leaf.detach() for leaf in leaves]
    rows = torch.ones(9, dtype=torch.float64)
    torch.library.opcheck(op.linear_cross_entropy_backward, (*detached, rows, torch.float64, needs, *terms))


@pytest.mark.parametrize("eps", [-1e-3, float("nan"), float("inf")])
def test_a_threshold_that_is_none_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=rf"filter_eps is {eps}; it must be finite and not negative, or None"):
        ops.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2).long(), filter_eps=eps)
