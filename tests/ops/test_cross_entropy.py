"""ops.cross_entropy: the compiled CPU kernel and the reference, on every instruction set this CPU has.

The truth is the formula in float64; the error allowed is what plain PyTorch makes in the same dtype, times a factor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain import backend_info, ops
from fasttrain.backend import extension
from fasttrain.ops.cross_entropy import Terms, cross_entropy_reference

_C = extension()
needs_extension = pytest.mark.skipif(_C is None, reason="the compiled extension is not installed")
ISAS = _C.available_isas() if _C else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TERMS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 5.0},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 3.0},
    {"ignore_index": 1, "label_smoothing": 1.0},
]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def problem(
    N: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 4.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(N, V, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[1::3] = -100
    return logits, targets


def loss_and_gradient(
    logits: Tensor, targets: Tensor, upstream: Tensor | float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = ops.cross_entropy(leaf, targets, **options)
    (loss * upstream).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def assert_as_exact_as_pytorch(logits: Tensor, targets: Tensor, upstream: Tensor | float = 1.0, **options: Any) -> None:
    got = loss_and_gradient(logits, targets, upstream, impl="cpp", **options)
    plain = loss_and_gradient(logits, targets, upstream, impl="reference", **options)
    truth = loss_and_gradient(logits.double(), targets, upstream, impl="reference", **options)
    assert got[0].dtype == plain[0].dtype and got[1].dtype == logits.dtype and got[1].shape == logits.shape
    # float32 rounding of a value of this size, for cases in which PyTorch happens to be exact
    for ours, theirs, exact, unit in zip(got, plain, truth, (2**-24, torch.finfo(logits.dtype).eps / 2)):
        allowed = 4 * (theirs.double() - exact).abs().max() + 8 * unit * exact.abs().max() + 1e-7 * float(unit < 1e-6)
        error = (ours.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3g} against {allowed:.3g} allowed"


@needs_extension
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_are_as_exact_as_pytorchs(
    isa: str, reduction: str, dtype: torch.dtype, terms: dict[str, Any]
) -> None:
    for N, V in [(1, 1), (5, 2), (4, 15), (3, 16), (7, 33), (6, 1000), (9, 5003)]:
        logits, targets = problem(N, V, dtype, seed=V)
        targets[targets == -100] = terms.get("ignore_index", -100)
        upstream = torch.linspace(-1, 2, N) if reduction == "none" else 0.37
        assert_as_exact_as_pytorch(logits, targets, upstream, reduction=reduction, **terms)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_span_several_blocks_and_are_streamed(isa: str, dtype: torch.dtype) -> None:
    """Above 8 MB the gradient leaves by aligned streaming stores; an odd V puts every row at another offset."""
    logits, targets = problem(90 if dtype == torch.float32 else 170, 25_003, dtype)
    for reduction in ("mean", "none"):
        assert_as_exact_as_pytorch(logits, targets, reduction=reduction, label_smoothing=0.1, z_loss=1e-3)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_semantics_are_those_of_pytorchs_cross_entropy(impl: str, reduction: str, smoothing: float) -> None:
    logits, targets = problem(8, 50)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    for labels in (targets, torch.full_like(targets, -100)):  # some ignored, all ignored
        leaf = logits.clone().requires_grad_()
        expected = F.cross_entropy(leaf, labels, **options)
        expected.sum().backward()
        loss, gradient = loss_and_gradient(logits, labels, impl=impl, **options)
        torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
        torch.testing.assert_close(gradient, leaf.grad, equal_nan=True)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_extension)])
def test_no_rows_give_nan_mean_and_zero_sum(impl: str) -> None:
    logits, targets = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    assert ops.cross_entropy(logits, targets, impl=impl).isnan()
    assert ops.cross_entropy(logits, targets, impl=impl, reduction="sum") == 0
    assert ops.cross_entropy(logits, targets, impl=impl, reduction="none").shape == (0,)


@needs_extension
def test_special_values_behave_as_in_pytorch(isa: str) -> None:
    V, inf = 5000, float("inf")
    logits, _ = problem(7, V)
    logits[0, 2500] = float("nan")
    logits[1, 17] = inf
    logits[2, :4000] = -inf  # whole blocks of a masked vocabulary, before any finite value
    logits[3] = -inf
    logits[4, 100:] = -inf
    logits[5] = -1000.0  # exp(-1000) is 0 in every float format
    logits[5, :4097] = -inf
    logits[6] *= 1e30
    targets = torch.tensor([0, 17, 4500, 0, 50, 4998, 3])
    for reduction in ("none", "sum"):
        leaf = logits.clone().requires_grad_()
        expected = F.cross_entropy(leaf, targets, reduction=reduction)
        expected.sum().backward()
        loss, gradient = loss_and_gradient(logits, targets, impl="cpp", reduction=reduction)
        torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
        torch.testing.assert_close(gradient, leaf.grad, equal_nan=True)


@needs_extension
def test_gradient_of_a_confident_prediction_keeps_its_digits(isa: str) -> None:
    """p_target - 1 by subtraction would be 0 or noise here."""
    logits = torch.zeros(2, 100)
    logits[0, 3], logits[1, 3] = 20.0, 40.0
    targets = torch.tensor([3, 3])
    _, gradient = loss_and_gradient(logits, targets, impl="cpp", reduction="sum")
    rest = 99 * torch.exp(-torch.tensor([20.0, 40.0], dtype=torch.float64))  # by hand: float64 PyTorch has lost it too
    torch.testing.assert_close(gradient[:, 3].double(), -rest / (1 + rest), rtol=1e-5, atol=0)


@needs_extension
@pytest.mark.parametrize("layout", ["transposed", "sliced columns", "every other row", "expanded", "offset"])
def test_any_strides(layout: str) -> None:
    base, targets = problem(12, 301)
    views = {
        "transposed": base.t().contiguous().t(),
        "sliced columns": torch.cat([base, base], 1)[:, 301:],
        "every other row": base.repeat_interleave(2, 0)[::2],
        "expanded": base[:1].expand(12, 301),
        "offset": torch.cat([torch.zeros(1), base.flatten()])[1:].view(12, 301),
    }
    view = views[layout]
    for reduction in ("mean", "none"):
        leaf, dense = (
            view.detach().requires_grad_(),
            view.detach().clone(memory_format=torch.contiguous_format).requires_grad_(),
        )
        for x, impl in ((leaf, "cpp"), (dense, "reference")):
            ops.cross_entropy(x, targets, impl=impl, reduction=reduction).sum().backward()
        torch.testing.assert_close(leaf.grad, dense.grad)
    strided_targets = torch.stack([targets, targets], 1)[:, 0]
    assert ops.cross_entropy(base, strided_targets, impl="cpp") == ops.cross_entropy(base, targets, impl="cpp")


@needs_extension
def test_offsets_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Rows 2^30 + 8 elements apart in a sparse file: a 32-bit offset would wrap and read other memory."""
    stride, V = 2**30 + 8, 300
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + V, dtype=torch.float32)
    logits = flat.as_strided((4, V), (stride, 1))
    dense, targets = problem(4, V)
    logits.copy_(dense)
    for reduction in ("mean", "none"):
        leaf = logits.detach().requires_grad_()
        loss = ops.cross_entropy(leaf, targets, impl="cpp", reduction=reduction)
        expected, _ = loss_and_gradient(dense, targets, impl="reference", reduction=reduction)
        torch.testing.assert_close(loss.detach(), expected)


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_over_a_retained_graph_and_after_the_gradient_was_overwritten(reduction: str) -> None:
    logits, targets = problem(6, 77)
    leaf = logits.clone().requires_grad_()
    loss = ops.cross_entropy(leaf, targets, impl="cpp", reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    expected = first.clone()
    first.fill_(float("nan"))  # the caller owns what it was given
    (second,) = torch.autograd.grad(loss, leaf, grad_outputs=torch.tensor(3.0))
    torch.testing.assert_close(second, 3 * expected)


@needs_extension
def test_an_expanded_upstream_gradient_is_read_correctly() -> None:
    logits, targets = problem(6, 77)
    leaf = logits.clone().requires_grad_()
    losses = ops.cross_entropy(leaf, targets, impl="cpp", reduction="none")
    (got,) = torch.autograd.grad(losses, leaf, torch.tensor(2.0).expand(6))
    _, expected = loss_and_gradient(logits, targets, 2.0, impl="reference", reduction="none")
    torch.testing.assert_close(got, expected)


@needs_extension
def test_the_logits_are_never_written_to() -> None:
    logits, targets = problem(5, 500)
    leaf, before = logits.requires_grad_(), logits.detach().clone()
    version = leaf._version
    for reduction in ("mean", "none"):
        ops.cross_entropy(leaf, targets, impl="cpp", reduction=reduction).sum().backward()
    assert torch.equal(leaf.detach(), before) and leaf._version == version


@needs_extension
def test_the_result_does_not_depend_on_the_number_of_threads(isa: str) -> None:
    logits, targets = problem(64, 3001)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(loss_and_gradient(logits, targets, impl="cpp", label_smoothing=0.1))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


@needs_extension
def test_no_tensor_of_logits_size_is_made_beyond_the_gradient() -> None:
    """Resident memory at the peak of forward and backward, in a process of its own."""
    code = """
import torch
from fasttrain import ops
N, V = 512, 50304
logits, targets = torch.randn(N, V, requires_grad=True), torch.randint(0, V, (N,))
ops.cross_entropy(logits[:4], targets[:4], impl="cpp").backward()
logits.grad = None
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
ops.cross_entropy(logits, targets, impl="cpp").backward()
print((status("VmHWM") - before) / (N * V * 4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.15


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_in_float64(reduction: str) -> None:
    logits, targets = problem(5, 9, torch.float64, spread=2.0)
    leaf = logits.requires_grad_()
    for terms in TERMS[:-1]:

        def loss(x: Tensor, terms: dict[str, Any] = terms) -> Tensor:
            return ops.cross_entropy(x, targets, impl="cpp", reduction=reduction, **terms)

        assert torch.autograd.gradcheck(loss, (leaf,), nondet_tol=1e-12)  # a second backward recomputes


@needs_extension
def test_double_backward_is_refused_clearly() -> None:
    logits, targets = problem(3, 9)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference'"):
        torch.autograd.grad(ops.cross_entropy(logits.requires_grad_(), targets, impl="cpp"), logits, create_graph=True)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registered_ops_pass_opcheck(dtype: torch.dtype) -> None:
    logits, targets = problem(4, 33, dtype)
    terms = (-100, 0.1, 1e-3, 5.0)
    op = torch.ops.fasttrain
    _, lse = op.cross_entropy_forward(logits, targets, *terms)
    torch.library.opcheck(op.cross_entropy_forward, (logits.clone().requires_grad_(), targets, *terms))
    torch.library.opcheck(op.cross_entropy_fused, (logits, targets, torch.tensor(0.5), *terms))
    torch.library.opcheck(op.cross_entropy_backward, (torch.ones(4), logits, targets, lse, *terms))


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction: str) -> None:
    logits, targets = problem(6, 129)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return (ops.cross_entropy(x * 2, y, reduction=reduction, label_smoothing=0.1) * 3).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for N in (6, 4):
        eager_leaf, compiled_leaf = (logits[:N].clone().requires_grad_() for _ in range(2))
        expected, got = step(eager_leaf, targets[:N]), compiled(compiled_leaf, targets[:N])
        expected.backward()
        got.backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(compiled_leaf.grad, eager_leaf.grad)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_extension)])
@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**60)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_an_index_error_that_names_it(impl: str, bad: int, reduction: str) -> None:
    logits, targets = problem(8, 50)
    targets[5] = bad
    with pytest.raises(IndexError, match=rf"targets\[5\] is {bad}.*\[0, 50\).*ignore_index=-100"):
        ops.cross_entropy(logits.requires_grad_(), targets, impl=impl, reduction=reduction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"logits have shape \(2, 3, 4\).*flatten"),
        ({"logits": torch.zeros(8, 5, dtype=torch.int64)}, "logits are torch.int64.*float32"),
        ({"logits": torch.zeros(8, 0)}, "at least one class"),
        ({"logits": torch.zeros(8, 5, device="meta")}, "targets are on cpu and logits on meta"),
        ({"targets": torch.zeros(7, dtype=torch.int64)}, r"targets have shape \(7,\).*\(8,\)"),
        ({"targets": torch.zeros(8)}, "targets are torch.float32.*int64"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"label_smoothing": float("nan")}, "label_smoothing is nan"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"softcap": 0.0}, "softcap is 0.0.*None"),
        ({"reduction": "avg"}, "reduction is 'avg'.*'mean'"),
        ({"impl": "cuda"}, "impl is 'cuda'.*reference"),
        ({"impl": "triton"}, "impl='triton' cannot serve.*CUDA"),
    ],
)
def test_bad_input_is_refused_with_the_rule(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(8, 5), "targets": torch.zeros(8, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=message):
        ops.cross_entropy(arguments.pop("logits"), arguments.pop("targets"), **arguments)


def test_int32_targets_and_any_ignore_index() -> None:
    logits, targets = problem(8, 50)
    expected = ops.cross_entropy(logits, targets)
    assert torch.equal(ops.cross_entropy(logits, targets.int()), expected)
    assert torch.equal(ops.cross_entropy(logits, targets.where(targets >= 0, -7), ignore_index=-7), expected)


def test_backend_info_says_what_runs_and_why_not_the_compiled_kernel() -> None:
    choice = backend_info()["cross_entropy"]["cpu"]
    assert (
        (choice.impl, choice.reason) == ("cpp", "")
        if _C
        else (choice.impl == "reference" and "not installed" in choice.reason)
    )


def run_with(environment: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_the_environment_variable_forces_an_implementation() -> None:
    code = (
        "import torch; from fasttrain import ops; x = torch.ones(2, 3, requires_grad=True); "
        "print(ops.cross_entropy(x, torch.tensor([0, 1])).grad_fn.name())"
    )
    assert "GradientInForward" not in run_with({"FASTTRAIN_IMPL": "reference"}, code).stdout
    bad = run_with({"FASTTRAIN_IMPL": "gpu"}, code)
    assert bad.returncode != 0 and "FASTTRAIN_IMPL is 'gpu'" in bad.stderr


def test_the_reference_states_the_formula() -> None:
    """By hand, term by term, so that the reference itself is held to something."""
    logits, targets = problem(5, 11, torch.float64)
    x = 2.0 * torch.tanh(logits / 2.0)
    lse = torch.log(torch.exp(x).sum(1))
    target = torch.stack([x[i, max(int(t), 0)] for i, t in enumerate(targets)])
    losses = 0.7 * (lse - target) + 0.3 * (lse - x.mean(1)) + 0.01 * lse**2
    losses[targets == -100] = 0
    got = cross_entropy_reference(logits, targets, Terms(-100, 0.3, 0.01, 2.0), "none")
    torch.testing.assert_close(got, losses)
