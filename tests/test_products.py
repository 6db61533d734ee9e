"""Linear layers by oneDNN: the same function and gradients, left alone where they may not be touched."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fasttrain import products
from fasttrain.config import TrainConfig
from fasttrain.optimizations import apply_optimizations

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512, 96), (4, 130, 96)], ids=str)
def test_value_and_gradients_are_those_of_the_plain_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 200, bias=bias)
    ours = copy.deepcopy(plain)
    assert products.use_onednn(ours) == 1
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


@needs_onednn
def test_the_product_is_oneDNNs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(256, 256)
    products.use_onednn(layer)
    with torch.profiler.profile() as profile:
        layer(torch.randn(256, 256, requires_grad=True)).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["mkldnn::_linear_pointwise"] == 3 and not {"aten::mm", "aten::addmm"} & set(counts)


@needs_onednn
def test_small_products_autocast_and_other_types_take_the_plain_path() -> None:
    layer = nn.Linear(256, 256)
    products.use_onednn(layer)

    def used(x: torch.Tensor) -> bool:
        with torch.profiler.profile() as profile:
            layer(x)
        return any(event.key == "mkldnn::_linear_pointwise" for event in profile.key_averages())

    assert used(torch.randn(256, 256))
    assert not used(torch.randn(2, 256))
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(torch.randn(256, 256))
        assert layer(torch.randn(256, 256)).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not used(torch.randn(256, 256))


def test_only_plain_float32_layers_are_changed_and_restore_undoes_it() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).double())
    assert products.use_onednn(model) == 1 and products.use_onednn(model) == 0
    assert [("forward" in vars(layer)) for layer in model] == [True, False, False]
    clone = copy.deepcopy(model)
    assert clone[0].forward.__self__ is clone[0], "a copy would compute with the original's weights"
    products.restore(model)
    assert not any("forward" in vars(layer) for layer in model)


def test_a_pickled_layer_comes_back_as_a_plain_one() -> None:
    layer = nn.Linear(3, 2)
    products.use_onednn(layer)
    x = torch.randn(4, 3)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@needs_onednn
def test_a_second_derivative_is_refused_and_not_silently_zero() -> None:
    layer = nn.Linear(256, 256)
    products.use_onednn(layer)
    x = torch.randn(256, 256, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_report_says_which_library_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    zen_5, zen_4, intel = ("AuthenticAMD", 26), ("AuthenticAMD", 25), ("GenuineIntel", 6)
    for processor, on in ((zen_5, True), (zen_4, False), (intel, False)):
        products.onednn_advantage.cache_clear()
        monkeypatch.setattr(products, "_processor", lambda processor=processor: processor)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        model = nn.Sequential(nn.Linear(4, 4))
        _, decisions = apply_optimizations(model, TrainConfig(), torch.device("cpu"), own_loss=True)
        decision = next(d for d in decisions if d.name == "oneDNN products")
        assert decision.on == (on and torch.backends.mkldnn.is_available()) and "AVX-512" in decision.reason
        decision.restore()
        assert "forward" not in vars(model[0])
    products.onednn_advantage.cache_clear()


@needs_onednn
def test_a_compiled_layer_is_one_graph_of_the_plain_product() -> None:
    layer = nn.Linear(256, 128)
    plain = copy.deepcopy(layer)
    products.use_onednn(layer)
    x = torch.randn(512, 256)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
