"""The Triton cross-entropy run by Triton's interpreter on CPU tensors: results, bytes, bounds, races.

Not collected by name: `test_cross_entropy_triton.py` runs this file in a process with TRITON_INTERPRET=1. By hand:
`TRITON_INTERPRET=1 pytest tests/ops/interpreted_cross_entropy.py`. The truth is the reference in float64; the error
allowed is the one that the reference makes in the dtype under test.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_gate import MemoryFault, count_bytes

from fasttrain.kernels import cross_entropy as kernels
from fasttrain.ops.cross_entropy import Terms, cross_entropy_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100
PLAIN = {"ignore_index": IGNORE, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
EVERYTHING = {"ignore_index": IGNORE, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}


def rows(num_rows: int, num_classes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, num_classes, generator=generator) * 3).to(dtype)
    return logits, torch.randint(0, num_classes, (num_rows,), generator=generator)


def reference(logits: Tensor, targets: Tensor, terms: dict[str, Any], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradient of sum(weights * losses) from the plain PyTorch reference, in the logits' dtype."""
    leaf = logits.detach().clone().requires_grad_()
    losses = cross_entropy_reference(leaf, targets, Terms(**terms), "none")
    (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf)
    return losses.detach(), gradient


def assert_as_good(got: Tensor, yardstick: Tensor, truth: Tensor, slack: float) -> None:
    """`got` errs no more than twice what the yardstick errs, plus `slack` of the largest true value or of 1.

    Of 1 because losses and gradients are differences of numbers of that size.
    """
    assert got.dtype == yardstick.dtype and got.shape == truth.shape
    assert not got.isnan().any()
    allowed = 2 * (yardstick.double() - truth).abs().max() + slack * truth.abs().max().clamp(min=1.0)
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("terms", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("num_classes", [1, 2, 7, 127, 1000, 5003, 33000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_err_no_more_than_pytorch(
    dtype: torch.dtype, num_classes: int, terms: dict[str, Any], poisoned_memory: None
) -> None:
    logits, targets = rows(4, num_classes, dtype)
    targets[1] = IGNORE
    weights = torch.tensor([1.0, 3.0, -0.5, 0.25])
    losses, gradient = reference(logits, targets, terms, weights)
    true_losses, true_gradient = reference(logits.double(), targets, terms, weights.double())
    _, true_scaled = reference(logits.double(), targets, terms, torch.full((4,), 0.5, dtype=torch.float64))
    _, scaled = reference(logits, targets, terms, torch.full((4,), 0.5))

    got_losses, lse = kernels.cross_entropy_forward(logits, targets, **terms)
    got_gradient = kernels.cross_entropy_backward(weights, logits, targets, lse, **terms)
    fused_losses, fused_lse, fused_gradient = kernels.cross_entropy_fused(logits, targets, torch.tensor(0.5), **terms)
    assert_as_good(got_losses, losses, true_losses, 3e-7)
    assert_as_good(fused_losses, losses, true_losses, 3e-7)
    assert_as_good(got_gradient, gradient, true_gradient, 2e-6)  # through lse, which is rounded to float32
    assert_as_good(fused_gradient, scaled, true_scaled, 3e-7)
    assert lse[1] == fused_lse[1] == got_losses[1] == fused_losses[1] == 0
    assert not got_gradient[1].any() and not fused_gradient[1].any()


@pytest.mark.parametrize("num_classes", [1000, 33_000])
def test_ignored_rows_are_not_read(num_classes: int) -> None:
    logits, targets = rows(4, num_classes)
    targets[[0, 2]] = IGNORE
    logits[[0, 2]] = float("nan")
    with count_bytes() as traffic:
        losses, _, gradient = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
        kernels.cross_entropy_backward(torch.ones(4), logits, targets, torch.logsumexp(logits, 1), **PLAIN)
    assert losses[0] == losses[2] == 0 and not gradient[[0, 2]].any()
    passes = 2 + (kernels.one_load_shape(num_classes, 4) is None)
    assert traffic.loaded["logits"] == passes * logits[[1, 3]].nbytes + 2 * 4  # and twice one logit, the target's


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("num_classes", [32000, 50304, 70_000])
def test_bytes_moved_are_the_declared_minimum(num_classes: int, dtype: torch.dtype) -> None:
    logits, targets = rows(2, num_classes, dtype)
    fits = kernels.one_load_shape(num_classes, logits.element_size()) is not None
    assert fits == (num_classes * logits.element_size() <= 128 << 10)
    with count_bytes() as fused:
        _, lse, _ = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
    with count_bytes() as forward:
        kernels.cross_entropy_forward(logits, targets, **PLAIN)
    with count_bytes() as backward:
        kernels.cross_entropy_backward(torch.ones(2), logits, targets, lse, **PLAIN)
    assert fused.launches == ["_one_load_kernel" if fits else "_streaming_kernel"]
    for traffic, passes in ((fused, 2 if fits else 3), (forward, 1), (backward, 2)):
        assert passes * logits.nbytes <= traffic.total <= 1.02 * passes * logits.nbytes


@pytest.mark.parametrize("num_classes", [1000, 33_000])
@pytest.mark.parametrize("bad", [-1, "V", 1 << 40, -(1 << 40)])
def test_a_target_out_of_range_makes_its_row_nan_and_reads_nothing_outside(bad: int | str, num_classes: int) -> None:
    logits, targets = rows(3, num_classes)
    want = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
    targets[1] = num_classes if bad == "V" else bad
    with count_bytes():
        losses, lse, gradient = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
        again, _ = kernels.cross_entropy_forward(logits, targets, **PLAIN)
        backward = kernels.cross_entropy_backward(torch.ones(3), logits, targets, lse, **PLAIN)
    for tensor in (losses, again, gradient, backward):
        assert tensor[1].isnan().all() and not tensor[[0, 2]].isnan().any()
    assert torch.equal(gradient[[0, 2]], want[2][[0, 2]])


@pytest.mark.parametrize("num_classes", [3000, 33_000])
def test_masked_classes_get_no_probability_and_a_masked_block_no_nan(num_classes: int) -> None:
    logits, targets = rows(2, num_classes)
    logits[0, :-10] = float("-inf")  # every block but the last
    logits[1, 5:] = torch.finfo(torch.float32).min  # the other way to mask
    targets[:] = torch.tensor([num_classes - 1, 2])
    true_losses, true_gradient = reference(logits.double(), targets, PLAIN, torch.ones(2))
    losses, lse, gradient = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
    backward = kernels.cross_entropy_backward(torch.ones(2), logits, targets, lse, **PLAIN)
    torch.testing.assert_close(losses.double(), true_losses)
    for got in (gradient, backward):
        torch.testing.assert_close(got.double(), true_gradient, rtol=1e-5, atol=1e-7)
        assert not got[0, :-10].any()


@pytest.mark.parametrize("num_classes", [3000, 33_000])
def test_rows_without_a_distribution_are_nan_as_in_pytorch(num_classes: int) -> None:
    logits, targets = rows(4, num_classes)
    logits[0] = float("-inf")
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    want, want_gradient = reference(logits, targets, PLAIN, torch.ones(4))
    losses, _, gradient = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
    assert torch.equal(losses.isnan(), want.isnan()) and losses.isnan().tolist() == [True, True, True, False]
    assert torch.equal(gradient.isnan(), want_gradient.isnan())


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("num_classes", [3000, 33_000])
def test_large_logits_lose_nothing(num_classes: int, offset: float) -> None:
    logits, targets = rows(2, num_classes)
    logits = logits + offset
    ones = torch.ones(2)
    losses, gradient = reference(logits, targets, PLAIN, ones)
    true_losses, true_gradient = reference(logits.double(), targets, PLAIN, ones)
    got, _, got_gradient = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
    assert_as_good(got, losses, true_losses, 3e-7)
    assert_as_good(got_gradient, gradient, true_gradient, 3e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_true_class_of_a_confident_row_keeps_its_gradient(dtype: torch.dtype) -> None:
    logits = torch.full((2, 1000), -8.0).to(dtype)
    targets = torch.tensor([3, 3])
    logits[:, 3] = torch.tensor([8.0, 6.0]).to(dtype)  # p is 0.9999 and 0.999
    gradient, truth = (reference(x, targets, PLAIN, torch.ones(2))[1][:, 3] for x in (logits, logits.double()))
    got = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)[2][:, 3]
    assert_as_good(got, gradient, truth, 1e-7)
    assert (got < 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("terms", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_reading_the_row_once_or_twice_gives_the_same(
    dtype: torch.dtype, terms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets = rows(3, 9001, dtype)
    once = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **terms)
    results = []
    for shape in (kernels.Shape(128, 1024), kernels.Shape(128, 4096)):
        monkeypatch.setattr(kernels, "one_load_shape", lambda *_, **__: None)
        monkeypatch.setattr(kernels, "streaming_shape", lambda *_, shape=shape, **__: shape)
        results.append(kernels.cross_entropy_fused(logits, targets, torch.ones(()), **terms))
    for twice in results:
        for got, want in zip(twice[:2], once[:2]):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(twice[2], once[2], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda logits: torch.cat([logits, torch.full_like(logits, float("nan"))], 1)[
            :, : logits.size(1)
        ],  # gaps between rows
        lambda logits: logits.t().contiguous().t(),  # the classes are not adjacent
        lambda logits: torch.cat([logits.new_full((1, logits.size(1)), float("nan")), logits])[
            1:
        ],  # the first row is skipped
    ],
    ids=["row stride", "transposed", "offset"],
)
@pytest.mark.parametrize("num_classes", [1003, 4096])
def test_layout_of_the_logits_does_not_matter(make: Any, num_classes: int) -> None:
    logits, targets = rows(3, num_classes, torch.bfloat16)
    view = make(logits)
    assert torch.equal(view, logits)
    want = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
    with count_bytes():
        got = kernels.cross_entropy_fused(view, targets, torch.ones(()), **PLAIN)
        backward = kernels.cross_entropy_backward(torch.ones(3), view, targets, want[1], **PLAIN)
    for mine, theirs in zip(got, want):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(backward, want[2], rtol=0.01, atol=1e-6)


def test_rows_further_apart_than_32_bits_count() -> None:
    stride = (1 << 30) + 8  # two of them are more than 2^31 elements; the memory between the rows is never touched
    logits = torch.empty(2 * stride + 512, dtype=torch.bfloat16).as_strided((3, 512), (stride, 1))
    packed, targets = rows(3, 512, torch.bfloat16)
    for row in range(3):
        logits[row].copy_(packed[row])
    want = kernels.cross_entropy_fused(packed, targets, torch.ones(()), **PLAIN)
    with count_bytes() as traffic:
        got = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
        backward = kernels.cross_entropy_backward(torch.ones(3), logits, targets, got[1], **PLAIN)
        losses, _ = kernels.cross_entropy_forward(logits, targets, **PLAIN)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want))
    torch.testing.assert_close(losses, want[0])
    torch.testing.assert_close(backward, want[2], rtol=0.01, atol=1e-6)
    assert traffic.launches == ["_one_load_kernel", "_backward_kernel", "_streaming_kernel"]


def test_gradients_of_losses_may_be_an_expanded_scalar() -> None:
    logits, targets = rows(3, 300)
    _, lse = kernels.cross_entropy_forward(logits, targets, **PLAIN)
    expanded = kernels.cross_entropy_backward(torch.tensor(2.0).expand(3), logits, targets, lse, **PLAIN)
    assert torch.equal(expanded, kernels.cross_entropy_backward(torch.full((3,), 2.0), logits, targets, lse, **PLAIN))


def test_no_rows_is_no_launch() -> None:
    logits, targets = torch.empty(0, 10), torch.empty(0, dtype=torch.int64)
    with count_bytes() as traffic:
        losses, lse, gradient = kernels.cross_entropy_fused(logits, targets, torch.ones(()), **PLAIN)
        assert kernels.cross_entropy_backward(losses, logits, targets, lse, **PLAIN).shape == (0, 10)
        kernels.scale_inplace(gradient, torch.ones(()))
    assert losses.shape == lse.shape == (0,) and gradient.shape == (0, 10) and traffic.launches == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_by_one_moves_nothing_and_by_another_number_each_byte_twice(dtype: torch.dtype) -> None:
    gradient = torch.randn(7, 1001).to(dtype)
    before = gradient.clone()
    with count_bytes() as traffic:
        kernels.scale_inplace(gradient, torch.tensor(1.0))
    assert torch.equal(gradient, before) and traffic.loaded["grads"] == traffic.stored["grads"] == 0
    with count_bytes() as traffic:
        kernels.scale_inplace(gradient, torch.tensor(0.3))
    assert torch.equal(gradient, (before.float() * torch.tensor(0.3)).to(dtype))
    assert traffic.loaded["grads"] == traffic.stored["grads"] == gradient.nbytes


def test_wrong_arguments_are_named() -> None:
    logits, targets = rows(2, 10)
    with pytest.raises(ValueError, match=r"float64.*float32, bfloat16 and float16"):
        kernels.cross_entropy_forward(logits.double(), targets, **PLAIN)
    with pytest.raises(ValueError, match=r"targets are torch.int32.*int64"):
        kernels.cross_entropy_forward(logits, targets.int(), **PLAIN)
    with pytest.raises(ValueError, match=r"strides \(1, 2\).*contiguous"):
        kernels.scale_inplace(torch.ones(2, 2).t(), torch.ones(()))


def test_a_uniform_row_costs_the_logarithm_of_the_number_of_classes() -> None:
    losses, lse = kernels.cross_entropy_forward(torch.zeros(1, 999), torch.tensor([5]), **PLAIN)
    assert losses.item() == pytest.approx(math.log(999)) and lse.item() == pytest.approx(math.log(999))


def test_the_gate_sees_a_kernel_that_would_read_past_its_rows() -> None:
    _, targets = rows(2, 10)
    holey = torch.zeros(2, 20)[:, :10]
    with count_bytes(), pytest.raises(Exception, match=MemoryFault.__name__):
        kernels._streaming_kernel[(2,)](
            holey,
            targets,
            None,
            torch.empty(2),
            torch.empty(2),
            None,
            20,
            IGNORE,
            0.0,
            0.0,
            0.0,
            V=16,
            BLOCK=64,
            GROUP=4,
            ALIGNED=True,
            WITH_GRADIENT=False,
            SMOOTHED=False,
            Z_LOSS=False,
            SOFTCAPPED=False,
            SOFTWARE_BF16=False,
        )
