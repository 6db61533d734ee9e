"""Rows cut over processes, in one process: the reference and the C++ kernels on every instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shard_problems import CUTS, TERMS, assert_shards_give_whole_rows, by_shards
from triton_gate import run_interpreted

from fasttrain.backend import extension
from fasttrain.ops._shard_rows import ELSEWHERE, IGNORED, local_targets, shard_gradient, shard_statistics
from fasttrain.ops.cross_entropy import Terms

_C = extension()
ISAS = _C.available_isas() if _C else []
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["reference", *ISAS])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "reference":
        yield "reference"
        return
    before = _C.isa()
    _C.set_isa(request.param)
    yield "cpp"
    _C.set_isa(before)


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_shards_give_the_losses_and_gradients_of_whole_rows(impl: str, dtype: torch.dtype, terms: Terms) -> None:
    for cut in CUTS:
        for in_place in (False, True):
            assert_shards_give_whole_rows(impl, cut, dtype, terms, in_place)


def test_a_local_id_that_equals_ignore_index_is_still_a_target() -> None:
    targets = torch.tensor([100, -100, 200, 299, 300])
    assert local_targets(targets, 200, 100, -100).tolist() == [ELSEWHERE, IGNORED, 0, 99, ELSEWHERE]
    logits = torch.randn(1, 300, dtype=torch.float64)
    losses, _ = by_shards("reference", logits, torch.tensor([100]), torch.ones(1), TERMS[0], (200, 100), False)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, torch.tensor([100]))[None])


def test_a_sure_model_keeps_the_digits_of_its_loss(impl: str) -> None:
    logits = torch.tensor([[0.0, 0.0, 30.0, 0.0, 0.0]])
    for cut in ((2, 3), (3, 2), (5,)):
        losses, gradient = by_shards(impl, logits, torch.tensor([2]), torch.ones(1), TERMS[0], cut, False)
        rest = 4 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))  # 3.7e-13
        torch.testing.assert_close(gradient[0, 2].double(), -rest / (1 + rest), rtol=1e-2, atol=0)
        torch.testing.assert_close(losses[0], torch.log1p(rest), rtol=1e-2, atol=0)


def test_a_shard_of_masked_classes_leaves_the_others_exact(impl: str) -> None:
    logits = torch.randn(3, 6)
    logits[:, :2] = -torch.inf
    targets, local = torch.tensor([2, 5, 4]), torch.full((3,), ELSEWHERE)
    losses, gradient = by_shards(impl, logits, targets, torch.ones(3), TERMS[0], (2, 4), True)
    torch.testing.assert_close(losses.float(), torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert not gradient[:, :2].any() and gradient.isfinite().all()
    assert shard_statistics(impl, logits[:, :2].clone(), local, TERMS[0])[0].tolist() == [-torch.inf] * 3


def test_a_row_with_nan_or_infinity_spoils_no_other(impl: str) -> None:
    for bad in (torch.nan, torch.inf):
        logits = torch.randn(3, 40)
        logits[1, 7] = bad
        losses, gradient = by_shards(impl, logits, torch.tensor([1, 30, 39]), torch.ones(3), TERMS[0], (20, 20), False)
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().any() and gradient[[0, 2]].isfinite().all()


@pytest.mark.skipif(_C is None, reason="the compiled extension is not installed")
def test_strided_logits_are_read_where_they_lie() -> None:
    whole, targets = torch.randn(9, 50), torch.randint(0, 20, (9,))
    view, lse, scale = whole[::2, 10:40], torch.full((5,), 4.0, dtype=torch.float64), torch.ones(())
    for function in (shard_statistics, lambda *a: shard_gradient(*a[:3], lse, scale.expand(5), a[3], 50)):
        torch.testing.assert_close(
            function("cpp", view, targets[::2].contiguous(), TERMS[1]),
            function("reference", view.clone(), targets[::2], TERMS[1]),
            rtol=1e-4,
            atol=1e-6,
        )


def test_interpreted_tests_pass() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_shard_rows.py"))
