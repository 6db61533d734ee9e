"""Products by other kernels than PyTorch's: the same function and gradients, none where they may not be touched."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fasttrain import products
from fasttrain.backend import CPP_PROBLEM, extension
from fasttrain.config import TrainConfig
from fasttrain.optimizations import apply_optimizations

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
needs_cpp = pytest.mark.skipif(bool(CPP_PROBLEM), reason="the compiled extension is not installed")
OPS = {"onednn": "mkldnn::_linear_pointwise", "fasttrain": "fasttrain::product_"}


@pytest.fixture(params=[pytest.param("onednn", marks=needs_onednn), pytest.param("fasttrain", marks=needs_cpp)])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose kernels multiply, whatever this processor is."""
    kernels: str = request.param
    monkeypatch.setattr(products, "fastest", lambda: (kernels, "a test says so"))
    return kernels


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512, 96), (4, 130, 96)], ids=str)
@pytest.mark.usefixtures("by")
def test_value_and_gradients_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 200, bias=bias)
    ours = copy.deepcopy(plain)
    assert products.use_fast_products(ours) == 1
    x = torch.randn(shape)
    upstream = torch.randn(200, *shape[:-1]).movedim(0, -1)  # not contiguous
    results = []
    for layer in (plain, ours, copy.deepcopy(plain).double()):
        leaf = x.to(layer.weight.dtype, copy=True).requires_grad_()
        y = layer(leaf)
        (y * upstream).sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for want, got, truth in zip(*results):
        error, allowed = (got - truth).abs().max(), (want - truth).abs().max()
        assert error <= 4 * allowed + 1e-6


def test_all_three_products_are_by_the_kernels_that_were_chosen(by: str) -> None:
    layer = nn.Linear(256, 256)
    products.use_fast_products(layer)
    with torch.profiler.profile() as profile:
        layer(torch.randn(256, 256, requires_grad=True)).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[OPS[by]] == 3 and not {"aten::mm", "aten::addmm"} & set(counts)


def test_small_products_autocast_and_other_types_take_the_plain_path(by: str) -> None:
    layer = nn.Linear(256, 256)
    products.use_fast_products(layer)

    def used(x: torch.Tensor) -> bool:
        with torch.profiler.profile() as profile:
            layer(x)
        return any(event.key == OPS[by] for event in profile.key_averages())

    assert used(torch.randn(256, 256))
    assert not used(torch.randn(2, 256))
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(torch.randn(256, 256))
        assert layer(torch.randn(256, 256)).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert used(torch.randn(256, 256)) == (by != "onednn")


def test_only_plain_float32_layers_are_changed_and_restore_undoes_it() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).double())
    assert products.use_fast_products(model) == 1 and products.use_fast_products(model) == 0
    assert [("forward" in vars(layer)) for layer in model] == [True, False, False]
    clone = copy.deepcopy(model)
    assert clone[0].forward.__self__ is clone[0], "a copy would compute with the original's weights"
    products.restore(model)
    assert not any("forward" in vars(layer) for layer in model)


def test_a_pickled_layer_comes_back_as_a_plain_one() -> None:
    layer = nn.Linear(3, 2)
    products.use_fast_products(layer)
    x = torch.randn(4, 3)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.usefixtures("by")
def test_a_second_derivative_is_refused_and_not_silently_zero() -> None:
    layer = nn.Linear(256, 256)
    products.use_fast_products(layer)
    x = torch.randn(256, 256, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("processor", "width", "by", "why"), [
    (("AuthenticAMD", 26), "AVX512", "onednn", "AVX-512, which MKL does not use"),
    (("AuthenticAMD", 25), "AVX512", "fasttrain", "not made for this AMD"),
    (("AuthenticAMD", 25), "AVX2", "fasttrain", "not made for this AMD"),
    (("GenuineIntel", 6), "AVX512", "torch", "MKL is made for this processor"),
    (("", 0), "AVX2", "torch", "not known"),
])  # fmt: skip
def test_the_report_says_whose_kernels_and_why(
        monkeypatch: pytest.MonkeyPatch, processor: tuple[str, int], width: str, by: str, why: str) -> None:
    products.fastest.cache_clear()
    monkeypatch.setattr(products, "_processor", lambda: processor)
    monkeypatch.setattr(products, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    model = nn.Sequential(nn.Linear(4, 4))
    try:
        _, decisions = apply_optimizations(model, TrainConfig(), torch.device("cpu"), own_loss=True)
    finally:
        products.fastest.cache_clear()
    decision = next(d for d in decisions if d.name == "matrix products")
    if by == "onednn" and not torch.backends.mkldnn.is_available():
        by, why = "torch", "no oneDNN"
    assert decision.on == (by != "torch") and why in decision.reason and (by == "torch" or by in decision.reason)
    assert ("forward" in vars(model[0])) == decision.on
    decision.restore()
    assert "forward" not in vars(model[0])


@pytest.mark.usefixtures("by")
def test_a_compiled_layer_is_one_graph_of_the_plain_product() -> None:
    layer = nn.Linear(256, 128)
    plain = copy.deepcopy(layer)
    products.use_fast_products(layer)
    x = torch.randn(512, 256)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)


def exact(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, add: bool) -> Tensor:
    want = a.double() @ b.double()
    return want + (out.double() if add else 0 if bias is None else bias.double())


@needs_cpp
@pytest.mark.parametrize("isa", extension().available_isas() if extension() else [])  # type: ignore[union-attr]
@pytest.mark.parametrize("layout", ["rows rows", "rows columns", "columns rows", "columns columns"])
def test_a_product_is_as_exact_as_pytorchs_for_any_size_and_layout(isa: str, layout: str) -> None:
    """Sizes around those of a tile, a packed block, a part and a slab, each with a neighbour of the others."""
    module = extension()
    before = module.isa()  # type: ignore[union-attr]
    of_a, of_b = layout.split()
    generator = torch.Generator().manual_seed(0)
    module.set_isa(isa)  # type: ignore[union-attr]
    try:
        for m, k, n in [(1, 1, 1), (5, 7, 15), (6, 8, 16), (7, 9, 17), (13, 257, 33), (241, 256, 31), (400, 300, 1025),
                        (2, 4097, 3), (61, 5000, 40), (500, 3, 700)]:  # fmt: skip
            a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
            a = a.t().contiguous().t() if of_a == "columns" else a
            b = b.t().contiguous().t() if of_b == "columns" else b
            for bias, add in ((None, False), (torch.randn(n), False), (None, True)):
                wide = torch.randn(m, n + 3)
                out, rest = wide[:, :n], wide[:, n:].clone()  # rows with a gap
                want, plain = exact(out, a, b, bias, add), (out if add else 0 if bias is None else bias) + a @ b
                torch.ops.fasttrain.product_(out, a, b, bias, add)
                error, allowed = (out - want).abs().max(), (plain - want).abs().max()
                assert error <= 4 * allowed + 1e-6, (m, k, n)
                assert torch.equal(wide[:, n:], rest), "wrote beside the result"
    finally:
        module.set_isa(before)  # type: ignore[union-attr]


@needs_cpp
def test_a_product_does_not_depend_on_the_number_of_threads_and_keeps_nan_to_its_rows() -> None:
    a, b = torch.randn(100, 4500), torch.randn(4500, 200)
    a[7, 3] = float("nan")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(products.multiply("fasttrain", a, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other.view(torch.int32), results[0].view(torch.int32)) for other in results)
    assert results[0].isnan().any(1).nonzero().flatten().tolist() == [7]


@needs_cpp
def test_what_a_product_cannot_take_is_refused() -> None:
    out, a, b = torch.zeros(4, 6), torch.randn(4, 5), torch.randn(5, 6)
    product = torch.ops.fasttrain.product_
    for message, arguments in {
        "must be float32": (out.double(), a, b, None, False),
        r"b must be \(5, 6\)": (out, a, b[:3], None, False),
        r"out must be \(4, 6\)": (out[:, :5], a, b, None, False),
        "in one piece each": (out, torch.randn(8, 10)[::2, ::2], b, None, False),
        "out's rows": (torch.zeros(6, 4).t(), a, b, None, False),
        "goes with no sum": (out, a, b, torch.zeros(6), True),
        "of nothing": (out, a[:, :0], b[:0], None, False),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            product(*arguments)
    assert not out.any()
    product(out[:0], a[:0], b, None, False)
    torch.library.opcheck(product, (out, a, b, None, False))
