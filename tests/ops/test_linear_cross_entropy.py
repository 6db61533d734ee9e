"""ops.linear_cross_entropy: the compiled CPU path and the reference, on every instruction set this CPU has.

The truth is the formula in float64; the error allowed is what plain PyTorch makes in float32, times a factor. The
workspace is made so small that every problem takes several chunks, the last one shorter than the others.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain import backend_info, ops
from fasttrain import products as matrix_products
from fasttrain.backend import extension
from fasttrain.ops.cross_entropy import Terms
from fasttrain.ops.linear_cross_entropy import linear_cross_entropy_reference

chunks = sys.modules["fasttrain.ops._linear_chunks"]
_C = extension()
needs_extension = pytest.mark.skipif(_C is None, reason="the compiled extension is not installed")
ISAS = _C.available_isas() if _C else []
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension)]
TERMS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 3.0},
    {"ignore_index": 1, "label_smoothing": 1.0},
]
Results = tuple[Tensor, Tensor, Tensor, Tensor | None]
pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_chunks")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MIN_ROWS", 7)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", {"cpu": 1, "cuda": 1})


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def head(N: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets; the logits spread by about 4, every third row without a target."""
    generator = torch.Generator().manual_seed(N + D + V)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[1::3] = -100
    return hidden.to(dtype), (weight * 4 / D**0.5).to(dtype), bias.to(dtype), targets


def run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, upstream: Tensor | float = 1.0, **options: Any
) -> Results:
    """Loss and the three gradients; the leaves keep the strides of what is passed."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
    loss = ops.linear_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2], **options)  # type: ignore[arg-type]
    (loss * upstream).sum().backward()
    return loss.detach(), leaves[0].grad, leaves[1].grad, None if leaves[2] is None else leaves[2].grad  # type: ignore[return-value,union-attr]


def assert_as_exact_as_pytorch(
    *tensors: Any, upstream: Tensor | float = 1.0, impl: str = "cpp", **options: Any
) -> None:
    got = run(*tensors, upstream, impl=impl, **options)
    plain = run(*tensors, upstream, impl="reference", **options)
    truth = run(
        *(None if t is None or not t.is_floating_point() else t.double() for t in tensors[:3]),
        tensors[3],
        upstream,
        impl="reference",
        **options,
    )
    for ours, theirs, exact in zip(got, plain, truth):
        if exact is None:
            continue
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        unit = torch.finfo(ours.dtype).eps / 2
        allowed = 4 * (theirs.double() - exact).abs().max() + 8 * unit * exact.abs().max() + 1e-7 * float(unit < 1e-6)
        error = (ours.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3g} against {allowed:.3g} allowed"


@needs_extension
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_as_exact_as_pytorchs(
    isa: str, reduction: str, with_bias: bool, terms: dict[str, Any]
) -> None:
    for N, D, V in [(1, 1, 1), (5, 3, 2), (33, 16, 63), (20, 40, 1003)]:
        hidden, weight, bias, targets = head(N, D, V)
        targets[targets == -100] = terms.get("ignore_index", -100)
        upstream = torch.linspace(-1, 2, N) if reduction == "none" else 0.37
        assert_as_exact_as_pytorch(
            hidden, weight, bias if with_bias else None, targets, upstream=upstream, reduction=reduction, **terms
        )


@needs_extension
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("by", ["onednn", "fasttrain"])
def test_products_by_other_kernels_are_as_exact(
        monkeypatch: pytest.MonkeyPatch, by: str, reduction: str, with_bias: bool) -> None:
    """On processors where they are the faster ones; here on any. The last has several slices."""
    if by == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(matrix_products, "fastest", lambda: (by, "for the test"))
    monkeypatch.setattr(matrix_products, "MIN_MULTIPLICATIONS", 0)
    for N, D, V in [(1, 1, 1), (33, 16, 63), (20, 40, 2500), (150, 20, 7300)]:
        hidden, weight, bias, targets = head(N, D, V)
        upstream = torch.linspace(-1, 2, N) if reduction == "none" else 0.37
        with torch.profiler.profile() as profile:
            assert_as_exact_as_pytorch(
                hidden, weight, bias if with_bias else None, targets, upstream=upstream, reduction=reduction
            )
        used = "mkldnn::_linear_pointwise" if by == "onednn" else "fasttrain::product_"
        assert any(event.key == used for event in profile.key_averages())


@needs_extension
@pytest.mark.parametrize(
    "types",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_16_bit_and_mixed_inputs_are_computed_in_float32(
    types: tuple[torch.dtype, torch.dtype], reduction: str
) -> None:
    hidden, weight, bias, targets = head(40, 24, 301)
    upstream = torch.linspace(-1, 2, 40) if reduction == "none" else 0.37
    tensors = hidden.to(types[0]), weight.to(types[1]), bias.to(types[0]), targets
    assert_as_exact_as_pytorch(*tensors, upstream=upstream, reduction=reduction, z_loss=1e-3)


@needs_extension
def test_the_weights_gradient_is_summed_in_float32() -> None:
    """Summed in bfloat16, a thousand chunks' worth of rows would stop counting at about 256 of them."""
    hidden, weight = torch.ones(3000, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    targets = torch.zeros(3000, dtype=torch.int64)
    assert run(hidden, weight, None, targets, impl="cpp", reduction="sum")[2].flatten().tolist() == [
        -1504.0,
        1504.0,
    ]  # 1500, rounded once


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_semantics_are_those_of_pytorchs_linear_and_cross_entropy(impl: str, reduction: str, smoothing: float) -> None:
    hidden, weight, bias, targets = head(20, 8, 50)
    for labels in (targets, torch.full_like(targets, -100), targets.abs() % 50):  # some ignored, all ignored, none
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        expected = F.cross_entropy(F.linear(*leaves), labels, reduction=reduction, label_smoothing=smoothing)
        expected.sum().backward()
        got = run(hidden, weight, bias, labels, impl=impl, reduction=reduction, label_smoothing=smoothing)
        for ours, theirs in zip(got, [expected.detach(), *(leaf.grad for leaf in leaves)]):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_give_nan_mean_zero_sum_and_zero_gradients(impl: str) -> None:
    hidden, weight, _, targets = head(0, 4, 7)
    loss, grad_hidden, grad_weight, _ = run(hidden, weight, None, targets, impl=impl, reduction="sum")
    assert loss == 0 and grad_hidden.shape == (0, 4) and not grad_weight.any()
    assert run(hidden, weight, None, targets, impl=impl)[0].isnan()
    assert run(hidden, weight, None, targets, impl=impl, reduction="none")[0].shape == (0,)


@needs_extension
@pytest.mark.parametrize("layout", ["transposed", "sliced columns", "every other row", "expanded", "offset"])
@pytest.mark.parametrize("which", [0, 1])
def test_any_strides(layout: str, which: int) -> None:
    tensors = list(head(15, 12, 31))
    base = tensors[which]
    tensors[which] = {
        "transposed": base.t().contiguous().t(),
        "sliced columns": torch.cat([base, base], 1)[:, 12:],
        "every other row": base.repeat_interleave(2, 0)[::2],
        "expanded": base[:1].expand_as(base),
        "offset": torch.cat([torch.zeros(1), base.flatten()])[1:].view_as(base),
    }[layout]
    dense = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    for reduction in ("mean", "none"):
        got = run(*tensors, impl="cpp", reduction=reduction)
        for ours, theirs in zip(got, run(*dense, impl="reference", reduction=reduction)):
            torch.testing.assert_close(ours, theirs)
    tensors[3] = torch.stack([tensors[3], tensors[3]], 1)[:, 0]
    assert run(*tensors, impl="cpp")[0] == run(*tensors[:3], dense[3], impl="cpp")[0]


@needs_extension
def test_a_transposed_parameter_takes_over_its_gradient_without_a_copy() -> None:
    hidden, weight, _, targets = head(15, 12, 31)
    for parameter in (weight, weight.t().contiguous().t()):
        leaf = parameter.detach().requires_grad_()
        op = torch.ops.fasttrain.linear_cross_entropy_fused
        options = (torch.float32, [False, True, False], -100, 0.0, 0.0, 0.0, None)
        grad_weight = op(hidden, leaf, None, targets, torch.ones(()), *options)[2]
        assert grad_weight.stride() == leaf.stride()


@needs_extension
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_that_are_wanted_are_computed(wanted: tuple[bool, ...], reduction: str) -> None:
    *tensors, targets = head(20, 8, 50)
    leaves = [tensor.requires_grad_(want) for tensor, want in zip(tensors, wanted)]
    full = run(*(leaf.detach() for leaf in leaves), targets, impl="reference", reduction=reduction)[1:]
    names = products(
        lambda: (
            ops.linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], impl="cpp", reduction=reduction)
            .sum()
            .backward()
        )
    )
    for leaf, want, expected in zip(leaves, wanted, full):
        if want:
            torch.testing.assert_close(leaf.grad, expected)
        else:
            assert leaf.grad is None
    chunks = 2  # 13 rows with a target, 7 at a time
    forward = chunks if reduction == "mean" else 2 * chunks  # "none" multiplies again in the backward
    assert names == forward + chunks * sum(wanted[:2])


@needs_extension
def test_without_grad_there_is_one_product_per_chunk() -> None:
    hidden, weight, _, targets = head(20, 8, 50)
    leaf = weight.requires_grad_()
    with torch.no_grad():
        assert products(lambda: ops.linear_cross_entropy(hidden, leaf, targets, impl="cpp")) == 2
    assert products(lambda: ops.linear_cross_entropy(hidden, leaf.detach(), targets, impl="cpp")) == 2


@needs_extension
def test_rows_without_a_target_are_in_no_product() -> None:
    hidden, weight, _, targets = head(28, 8, 50)
    targets[:] = 3
    full = products(lambda: run(hidden, weight, None, targets, impl="cpp"))
    targets[::2] = -100
    assert full == 12 and products(lambda: run(hidden, weight, None, targets, impl="cpp")) == 6
    hidden[::2] = float("nan")  # not even read
    assert not any(result.isnan().any() for result in run(hidden, weight, None, targets, impl="cpp")[:3])


@needs_extension
def test_where_counting_takes_waiting_the_first_chunk_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events on a GPU, played on a CPU: rows without a target go last, their chunks are left out."""
    hidden, weight, bias, targets = head(28, 8, 50)
    want = run(hidden, weight, bias, targets, impl="cpp")  # 18 rows with a target, 7 at a time
    asked: list[int] = []
    monkeypatch.setattr(chunks, "_rows_with_target", lambda targets, ignore_index: None)
    monkeypatch.setattr(chunks, "_may_count_late", lambda targets: True)
    monkeypatch.setattr(chunks, "_count_late", lambda y, i: lambda: asked.append(1) or int((y != i).sum()))
    got = []
    assert products(lambda: got.append(run(hidden, weight, bias, targets, impl="cpp"))) == 9 and asked == [1]
    for ours, theirs in zip(got[0], want):
        torch.testing.assert_close(ours, theirs)
    asked.clear()
    run(hidden[:7], weight, bias, targets[:7], impl="cpp")  # one chunk: nobody waits
    assert not asked


def products(call: Any) -> int:
    """How many matrix products a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events())


@needs_extension
def test_a_tied_weight_gets_both_gradients() -> None:
    _, weight, _, targets = head(20, 8, 50)
    ids = torch.arange(20) % 50
    gradients = []
    for impl in ("cpp", "reference"):
        leaf = weight.detach().clone().requires_grad_()
        for _ in range(2):  # and a second backward adds to the first
            ops.linear_cross_entropy(F.embedding(ids, leaf).tanh(), leaf, targets, impl=impl).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_over_a_retained_graph_and_after_the_gradients_were_overwritten(reduction: str) -> None:
    *tensors, targets = head(20, 8, 50)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    loss = ops.linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], impl="cpp", reduction=reduction).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.fill_(float("nan"))  # the caller owns what it was given
    second = torch.autograd.grad(loss, leaves, grad_outputs=torch.tensor(3.0))
    for got, want in zip(second, expected):
        torch.testing.assert_close(got, 3 * want)


@needs_extension
def test_an_upstream_gradient_is_not_rounded_to_the_gradients_type() -> None:
    hidden, weight, _, targets = head(8, 8, 50, torch.bfloat16)
    factor = 1.0 + 2**-8  # halfway between two bfloat16s: rounded to even it would be 1
    plain, scaled = (run(hidden, weight, None, targets, upstream, impl="cpp")[2] for upstream in (1.0, factor))
    assert torch.equal(scaled, (plain.float() * factor).bfloat16()) and not torch.equal(scaled, plain)


@needs_extension
def test_a_weight_changed_before_the_backward_is_noticed() -> None:
    hidden, weight, _, targets = head(8, 8, 50)
    loss = ops.linear_cross_entropy(hidden.requires_grad_(), weight, targets, impl="cpp")
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_in_float64(reduction: str) -> None:
    *tensors, targets = head(9, 3, 6, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for terms in TERMS[:-1]:

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor, terms: dict[str, Any] = terms) -> Tensor:
            return ops.linear_cross_entropy(
                hidden, weight, targets, bias=bias, impl="cpp", reduction=reduction, **terms
            )

        assert torch.autograd.gradcheck(loss, leaves, nondet_tol=1e-12)


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused_clearly(reduction: str) -> None:
    hidden, weight, _, targets = head(9, 3, 6)
    loss = ops.linear_cross_entropy(hidden.requires_grad_(), weight, targets, impl="cpp", reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference'"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@needs_extension
@pytest.mark.parametrize("with_bias", [False, True])
def test_registered_ops_pass_opcheck(with_bias: bool) -> None:
    hidden, weight, bias, targets = head(9, 3, 6)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_() if with_bias else None, targets]
    needs, terms = [True, True, with_bias], (-100, 0.1, 1e-3, 5.0)
    op = torch.ops.fasttrain
    torch.library.opcheck(op.linear_cross_entropy_forward, (*leaves, torch.float32, *terms, None, False))
    torch.library.opcheck(
        op.linear_cross_entropy_fused, (*leaves, torch.tensor(0.5), torch.float32, needs, *terms, None)
    )
    detached = [None if leaf is None else leaf.detach() for leaf in leaves]
    torch.library.opcheck(
        op.linear_cross_entropy_backward, (*detached, torch.ones(9), torch.float32, needs, *terms, None)
    )
    torch.library.opcheck(op.cross_entropy_fused_, (torch.randn(9, 6), targets, torch.tensor(0.5), *terms))


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(reduction: str, autocast: bool) -> None:
    hidden, weight, bias, targets = head(40, 8, 50)

    def step(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return (
                ops.linear_cross_entropy(h * 2, w, y, bias=bias, reduction=reduction, label_smoothing=0.1) * 3
            ).sum()

    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # its limit of variants counts those of the other parameters too
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for N, w in ((40, weight), (28, weight), (28, weight.t().contiguous().t())):
        results = []
        for call in (step, compiled):
            leaves = [hidden[:N].clone().requires_grad_(), w.detach().requires_grad_()]
            loss = call(*leaves, targets[:N])
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)


@needs_extension
def test_autocast_multiplies_in_its_type_and_float16_on_a_cpu_stays_float32() -> None:
    hidden, weight, _, targets = head(40, 24, 301)
    exact = run(hidden, weight, None, targets, impl="cpp")
    for dtype, narrow in ((torch.bfloat16, True), (torch.float16, False)):
        with torch.autocast("cpu", dtype):
            got = run(hidden, weight, None, targets, impl="cpp")
            leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
            theirs = F.cross_entropy(F.linear(*leaves).float(), targets)
            theirs.backward()
        assert got[0].dtype == torch.float32 and got[2].dtype == torch.float32
        if not narrow:
            assert all(torch.equal(a, b) for a, b in zip(got[:3], exact[:3]))
            continue
        assert not torch.equal(got[2], exact[2])
        for ours, plain, truth in zip(got, (theirs.detach(), *(leaf.grad for leaf in leaves)), exact):
            assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6


@needs_extension
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    *tensors, targets = head(64, 16, 501)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(*tensors, targets, impl="cpp"))
    torch.set_num_threads(threads)
    for result in results[1:]:  # the products' sums may be split differently
        for got, want in zip(result, results[0]):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


MEASURE_MEMORY = """
import sys, torch
from fasttrain import ops
from fasttrain.products import fastest, multiply
multiply(fastest()[0], torch.randn(256, 256), torch.randn(256, 256))  # oneDNN's own fixed memory
N, V, D = 1792, 16384, 16
def leaf(*shape): return torch.randn(*shape).requires_grad_()
hidden, weight, targets = leaf(N, D), leaf(V, D), torch.randint(0, V, (N,))
def step(): return ops.linear_cross_entropy(hidden, weight, targets, impl=sys.argv[1], reduction=sys.argv[2]).sum()
ops.linear_cross_entropy(hidden[:4], weight[:40], targets[:4] % 40).backward()
hidden.grad = weight.grad = None
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step().backward()
print((status("VmHWM") - before) / (64 << 20))
"""


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_stays_within_the_budget(reduction: str) -> None:
    """Resident memory at the peak of forward and backward, in units of 64 MiB; the logits would be 1.75."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, "cpp", reduction], capture_output=True, text=True, check=True
    )
    results = (16384 * 16 + 1792 * 16) * 4 / (64 << 20)
    assert 0.85 < float(done.stdout) - results < 1.1  # MKL takes 1 MiB of its own, oneDNN 8


@pytest.mark.parametrize(
    ("num_rows", "num_classes", "rows"),
    [
        (1024, 50304, 256),  # four equal chunks, not three of 333 and one of 25
        (1000, 50304, 256),
        (290, 50304, 290),
        (64, 128256, 64),
        (4096, 262144, 128),
        (0, 1000, 1),
        (100_000, 1000, 14288),
    ],
)
def test_chunks_are_equal_and_fit_the_budget(
    num_rows: int, num_classes: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert chunks.rows_per_chunk(num_rows, num_classes, 4, "cpu") == rows
    assert rows * num_classes * 4 <= 64 << 20 or rows == 128


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_an_index_error_that_names_it(impl: str, bad: int, reduction: str) -> None:
    hidden, weight, _, targets = head(20, 8, 50)
    targets[15] = bad
    with pytest.raises(IndexError, match=rf"targets\[15\] is {bad}.*\[0, 50\).*ignore_index=-100"):
        ops.linear_cross_entropy(hidden.requires_grad_(), weight, targets, impl=impl, reduction=reduction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden has shape \(2, 3, 4\).*flatten"),
        ({"hidden": torch.zeros(8, 5, dtype=torch.int64)}, "hidden is torch.int64.*float32"),
        ({"weight": torch.zeros(9, 4)}, r"weight has shape \(9, 4\).*D = 5"),
        ({"weight": torch.zeros(0, 5)}, "at least one class"),
        ({"weight": torch.zeros(9, 5, device="meta")}, "weight is on meta and hidden on cpu"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\).*\(9,\)"),
        ({"targets": torch.zeros(7, dtype=torch.int64)}, r"targets have shape \(7,\).*\(8,\)"),
        ({"targets": torch.zeros(8)}, "targets are torch.float32.*int64"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"softcap": 0.0}, "softcap is 0.0.*None"),
        ({"reduction": "avg"}, "reduction is 'avg'.*'mean'"),
        ({"impl": "triton"}, "impl='triton' cannot serve.*CUDA"),
    ],
)
def test_bad_input_is_refused_with_the_rule(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(8, 5),
        "weight": torch.zeros(9, 5),
        "targets": torch.zeros(8, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(
            arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments
        )


def test_backend_info_says_what_runs() -> None:
    choice = backend_info()["linear_cross_entropy"]["cpu"]
    assert (choice.impl, choice.reason) == ("cpp", "") if _C else choice.impl == "reference"


def test_the_reference_is_the_logits_cross_entropy() -> None:
    hidden, weight, bias, targets = head(9, 3, 6, torch.float64)
    got = linear_cross_entropy_reference(hidden, weight, targets, bias, Terms(-100, 0.3, 0.01, 2.0), "none")
    logits = hidden @ weight.t() + bias
    torch.testing.assert_close(
        got, ops.cross_entropy(logits, targets, label_smoothing=0.3, z_loss=0.01, softcap=2.0, reduction="none")
    )


@needs_extension
def test_offsets_beyond_two_to_the_31(tmp_path: Any) -> None:
    """Rows 2^30 + 8 elements apart in sparse files: a 32-bit offset would wrap and read other memory."""
    stride, dense = 2**30 + 8, head(4, 6, 4)
    far = []
    for name, tensor in zip(("hidden", "weight"), dense):
        flat = torch.from_file(str(tmp_path / name), shared=True, size=3 * stride + 6, dtype=torch.float32)
        far.append(flat.as_strided((4, 6), (stride, 1)).copy_(tensor))
    got, want = (
        ops.linear_cross_entropy(hidden, weight, dense[3], impl=impl)
        for impl, hidden, weight in (("cpp", *far), ("reference", *dense[:2]))
    )
    torch.testing.assert_close(got, want)
