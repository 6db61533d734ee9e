"""The Triton linear cross-entropy run by Triton's interpreter on CPU tensors: the kernels, and the op around them.

Not collected by name: `test_linear_cross_entropy_triton.py` runs this file in a process with TRITON_INTERPRET=1. The
truth is the reference in float64.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_gate import count_bytes

from fasttrain import ops
from fasttrain.kernels import linear_cross_entropy as kernels
from fasttrain.ops.cross_entropy import Terms
from fasttrain.ops.linear_cross_entropy import linear_cross_entropy_reference

chunks = sys.modules["fasttrain.ops._linear_chunks"]
gradient_filter = sys.modules["fasttrain.ops._gradient_filter"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100
PLAIN = {"ignore_index": IGNORE, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
EVERYTHING = {"ignore_index": IGNORE, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def head(N: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N + D + V)
    hidden, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, D), (V, D), (V,)))
    return hidden, (weight / D**0.5 * 3).to(dtype), bias, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(("N", "D", "V"), [(1, 1, 1), (3, 5, 7), (130, 64, 300), (65, 200, 129), (20, 33, 1000)])
def test_losses_agree_with_float64(N: int, D: int, V: int, terms: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = head(N, D, V, dtype)
    targets[1::4] = IGNORE
    for offset in (None, bias):
        truth = linear_cross_entropy_reference(
            hidden.double(),
            weight.double(),
            targets,
            None if offset is None else offset.double(),
            Terms(**terms),
            "none",
        )
        with count_bytes():
            losses, lse = kernels.linear_cross_entropy_forward(hidden, weight, offset, targets, **terms)
        torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-5)
        assert not losses[1::4].any() and not lse[1::4].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_logits_are_never_written(smoothing: float) -> None:
    N, D, V = 128, 64, 2048
    hidden, weight, _, targets = head(N, D, V, torch.float16)
    with count_bytes() as traffic:
        kernels.linear_cross_entropy_forward(hidden, weight, None, targets, **{**PLAIN, "label_smoothing": smoothing})
    tiles = V // kernels.tile_shape(2).classes
    assert sum(traffic.stored.values()) == N * tiles * (12 if smoothing else 8) + N * (4 + 4 + 4)
    assert traffic.loaded["weight"] == weight.nbytes and traffic.launches == ["_tile_kernel", "_combine_kernel"]


def test_tiles_of_rows_without_a_target_are_not_multiplied() -> None:
    hidden, weight, _, targets = head(3 * kernels.tile_shape(2).rows, 16, 300, torch.float16)
    targets[: 2 * kernels.tile_shape(2).rows] = IGNORE
    with count_bytes() as traffic:
        losses, _ = kernels.linear_cross_entropy_forward(hidden, weight, None, targets, **PLAIN)
    assert traffic.loaded["weight"] == weight.nbytes and losses[targets != IGNORE].all()  # by one of three row tiles
    shuffled = torch.randperm(len(targets))  # the op multiplies in float32 here, by smaller tiles
    with count_bytes() as traffic, torch.no_grad():
        got = ops.linear_cross_entropy(hidden[shuffled], weight, targets[shuffled], impl="triton", reduction="none")
    row_tiles = kernels.tile_shape(2).rows // kernels.tile_shape(4).rows
    assert traffic.loaded["weight"] == row_tiles * 2 * weight.nbytes
    torch.testing.assert_close(got, losses[shuffled], rtol=1e-2, atol=1e-2)


def test_a_target_out_of_range_is_nan_and_its_neighbours_are_not() -> None:
    hidden, weight, _, targets = head(4, 8, 200)
    targets[1], targets[2] = 200, -1
    with count_bytes():
        losses, _ = kernels.linear_cross_entropy_forward(hidden, weight, None, targets, **PLAIN)
    assert losses.isnan().tolist() == [False, True, True, False]


def test_a_tile_of_masked_classes_gives_no_nan() -> None:
    hidden, weight, bias, targets = head(3, 8, 300)
    bias[:200] = float("-inf")
    targets[:] = 250
    truth = linear_cross_entropy_reference(hidden, weight, targets, bias, Terms(**PLAIN), "none")
    torch.testing.assert_close(kernels.linear_cross_entropy_forward(hidden, weight, bias, targets, **PLAIN)[0], truth)


def test_strided_input_and_wrong_types() -> None:
    hidden, weight, _, targets = head(5, 16, 100)
    want, _ = kernels.linear_cross_entropy_forward(hidden, weight, None, targets, **PLAIN)
    wide = torch.stack([hidden, hidden], 1)[:, 0]
    got, _ = kernels.linear_cross_entropy_forward(
        wide, weight.t().contiguous().t(), None, torch.stack([targets] * 2, 1)[:, 0], **PLAIN
    )
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"float32 and weight torch.float16.*one type"):
        kernels.linear_cross_entropy_forward(hidden, weight.half(), None, targets, **PLAIN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "terms", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}], ids=["plain", "everything"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_op_gives_loss_and_gradients_of_the_reference(
    reduction: Any, terms: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MIN_ROWS", 4)  # three chunks
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", {"cpu": 1, "cuda": 1})
    *tensors, targets = head(11, 24, 300, dtype)
    targets[2::3] = IGNORE
    results = []
    for impl, kind in (("triton", dtype), ("reference", torch.float64)):
        hidden, weight, bias = (tensor.detach().to(kind).requires_grad_() for tensor in tensors)
        loss = ops.linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, impl=impl, **terms)
        (loss * torch.linspace(-1, 2, loss.numel() or 1).view(loss.shape)).sum().backward()
        results.append([loss.detach(), hidden.grad, weight.grad, bias.grad])
    for got, want in zip(*results):
        torch.testing.assert_close(
            got.double(),
            want.double(),
            rtol=2 * torch.finfo(dtype).eps + 1e-5,
            atol=1e-5 + 0.1 * torch.finfo(dtype).eps,
        )
    with torch.no_grad():
        loss = ops.linear_cross_entropy(
            *tensors[:2], targets, bias=tensors[2], reduction=reduction, impl="triton", **terms
        )
    torch.testing.assert_close(loss.double(), results[1][0].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_filter_leaves_out_what_the_reference_leaves_out(
    reduction: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_filter, "BLOCK_ROWS", 16)
    monkeypatch.setattr(chunks, "BLOCK_ROWS", 16)
    monkeypatch.setattr(chunks, "MIN_ROWS", 32)  # two chunks
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", {"cpu": 1, "cuda": 1})
    *tensors, targets = head(70, 40, 200, dtype)
    tensors[0][::7] *= 8  # confident rows: dead, or nearly
    targets[2::3] = IGNORE
    for eps, transposed in ((0.0, False), (0.02, False), (0.02, True), (10.0, False)):
        results = []
        for impl, kind in (("triton", dtype), ("reference", torch.float32)):
            hidden, weight, bias = (tensor.detach().to(kind) for tensor in tensors)
            if transposed:
                weight = weight.t().contiguous().t()
            leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
            with count_bytes():
                loss, skipped = ops.linear_cross_entropy(
                    *leaves[:2],
                    targets,
                    bias=leaves[2],
                    reduction=reduction,
                    impl=impl,
                    filter_eps=eps,
                    return_skipped_mass=True,
                )
                (loss * torch.linspace(-1, 2, loss.numel() or 1).view(loss.shape)).sum().backward()
            results.append([loss.detach(), skipped, *(leaf.grad for leaf in leaves)])
        for got, want in zip(*results):
            assert got is not None and want is not None and got.shape == want.shape
            error = float((got.double() - want.double()).norm())
            assert error <= (1e-5 if dtype == torch.float32 else 0.05) * float(want.double().norm()) + 1e-6
