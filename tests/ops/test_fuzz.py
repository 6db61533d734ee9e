"""Every public op under hypothesis: whatever comes in, the compiled path does what the reference does.

Shapes down to nothing, dtypes that are refused, any strides, other devices, NaN and infinities, targets and parameters
out of range, expanded upstream gradients. Both raise the same kind of error, or both give the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasttrain import AdamW, ops
from fasttrain.backend import CPP_PROBLEM

pytestmark = [
    pytest.mark.skipif(bool(CPP_PROBLEM), reason=CPP_PROBLEM or "-"),
    pytest.mark.usefixtures("poisoned_memory"),
]
FLOATS = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECIAL = [float("nan"), float("inf"), -float("inf"), -float("inf"), 0.0, -0.0, 1e4, -1e4, 1e-30]
LAYOUTS = ["contiguous", "contiguous", "transposed", "sliced", "offset", "expanded"]
few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory; `expanded` repeats the first row."""
    if layout == "transposed":
        return x.t().contiguous().t() if x.dim() == 2 else x
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 3, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":
        flat = torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])
        return flat[1:].view(x.shape)
    if layout == "expanded" and x.dim() == 2 and x.size(0):
        return x[:1].expand(x.shape)
    return x


@st.composite
def matrices(draw: Any, rows: st.SearchStrategy[int], columns: st.SearchStrategy[int], dtype: torch.dtype) -> Tensor:
    shape = (draw(rows), draw(columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0]))
    for _ in range(draw(st.integers(0, 3)) if x.numel() and draw(st.booleans()) else 0):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(SPECIAL))
    return laid_out(x.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def targets_of(draw: Any, count: int, num_classes: int) -> Tensor:
    inside = st.integers(0, max(num_classes - 1, 0)) | st.just(-100)
    outside = st.sampled_from([-1, num_classes, 2**40, -(2**62)])
    each = inside if draw(st.integers(0, 9)) else inside | outside
    length = count if draw(st.integers(0, 19)) else count + 1
    targets = torch.tensor(draw(st.lists(each, min_size=length, max_size=length)), dtype=torch.int64)
    dtype = draw(st.sampled_from([torch.int64] * 8 + [torch.int32, torch.float32]))
    if dtype == torch.int32:
        targets = targets.clamp(-(2**31), 2**31 - 1)
    return laid_out(targets.to(dtype), draw(st.sampled_from(["contiguous", "sliced"])))


@st.composite
def loss_options(draw: Any) -> dict[str, Any]:
    return {
        "ignore_index": draw(st.sampled_from([-100, -100, 0, 3])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, 1.5])),
        "z_loss": draw(st.sampled_from([0.0, 0.0, 1e-3])),
        "softcap": draw(st.sampled_from([None, None, 2.0, 30.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }


def outcome(call: Callable[[], list[Tensor | None]]) -> Any:
    """What a call gives, or the type of the error with which it is refused. Any other error is a fault."""
    try:
        return call()
    except (ValueError, IndexError) as error:
        return type(error)


def assert_alike(got: Any, want: Any, tolerances: list[float], size_of_summands: float = 1e-3) -> None:
    if isinstance(want, type) or isinstance(got, type):
        assert got == want
        return
    for one, other, tolerance in zip(got, want, tolerances):
        assert (one is None) == (other is None)
        if one is None:
            continue
        assert one.shape == other.shape and one.dtype == other.dtype
        size = float(other.double().nan_to_num(0, 0, 0).abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(
            one.double(), other.double(), rtol=tolerance, atol=tolerance * (size + size_of_summands), equal_nan=True
        )


def with_gradients(call: Callable[..., Tensor], upstream: str, *leaves: Tensor | None) -> list[Tensor | None]:
    inputs = [leaf.detach().requires_grad_(leaf.is_floating_point()) if leaf is not None else None for leaf in leaves]
    loss = call(*inputs)
    if upstream == "expanded":
        loss.backward(torch.full((), 0.3, dtype=loss.dtype).expand(loss.shape))
    elif upstream == "none":
        with torch.no_grad():
            return [call(*inputs)]
    else:
        (loss * torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
    return [loss.detach(), *(leaf.grad if leaf is not None else None for leaf in inputs)]


def tolerance_of(*dtypes: torch.dtype) -> float:
    return max([2e-4, *(4 * torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)])


def fuzz_cross_entropy(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([*FLOATS, torch.int64]))
    logits = data.draw(matrices(st.integers(0, 9), st.integers(0, 70), dtype))
    targets = data.draw(targets_of(*logits.shape))
    options = data.draw(loss_options())
    if data.draw(st.integers(0, 19)) == 0:
        logits = logits.to("meta")
    upstream = data.draw(st.sampled_from(["expanded", "none", "each its own"]))
    results = [
        outcome(
            lambda impl=impl: with_gradients(
                lambda x: ops.cross_entropy(x, targets, impl=impl, **options), upstream, logits
            )
        )
        for impl in ("auto", "reference")
    ]
    for result in results:
        if not isinstance(result, type) and result[1:] and result[1] is not None:
            # PyTorch's gradient of a row without a target is 0 times what stands there; the kernels do not look.
            result[1][targets == options["ignore_index"]] = 0
    assert_alike(*results, [2e-4, tolerance_of(dtype)])


def fuzz_linear_cross_entropy(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    size = data.draw(st.integers(0, 9))
    hidden = data.draw(matrices(st.integers(0, 9), st.just(size), dtype))
    other = dtype if data.draw(st.integers(0, 4)) else data.draw(st.sampled_from(FLOATS))
    weight = data.draw(
        matrices(st.integers(0, 40), st.just(size if data.draw(st.integers(0, 19)) else size + 1), other)
    )
    bias = data.draw(matrices(st.just(1), st.just(weight.size(0)), other))[0] if data.draw(st.booleans()) else None
    targets = data.draw(targets_of(hidden.size(0), weight.size(0)))
    options = data.draw(loss_options())
    threshold = data.draw(st.sampled_from([None, None, 0.0, -1.0]))  # 0: all that is not zero
    upstream = data.draw(st.sampled_from(["expanded", "none", "each its own"]))

    def call(impl: Any) -> list[Tensor | None]:
        return with_gradients(
            lambda h, w, b: ops.linear_cross_entropy(
                h, w, targets, bias=b, impl=impl, filter_eps=threshold, **options
            ),
            upstream,
            hidden,
            weight,
            bias,
        )

    results = [outcome(lambda impl=impl: call(impl)) for impl in ("auto", "reference")]
    if not all(t is None or t.isfinite().all() for t in (hidden, weight, bias)):
        # A row without a target is in no product, so what is not finite does not reach its gradient: only the losses.
        results = [result if isinstance(result, type) else result[:1] for result in results]
    tolerance = 10 * tolerance_of(dtype, other)
    sizes = [float(t.double().nan_to_num(0, 0, 0).abs().max()) for t in (hidden, weight) if t.numel()]
    assert_alike(*results, [tolerance] * 4, size_of_summands=max([1e-3, *sizes]))  # they may cancel


def fuzz_sample(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    logits = data.draw(matrices(st.integers(0, 4), st.integers(0, 600), dtype))

    def parameter(good: st.SearchStrategy[Any], bad: list[Any]) -> Any:
        each = good if data.draw(st.integers(0, 19)) else st.sampled_from(bad)
        if data.draw(st.booleans()):
            return data.draw(each)
        return torch.tensor([data.draw(each) for _ in range(logits.size(0))])

    options = {
        "temperature": parameter(st.sampled_from([0.0, 1e-30, 0.7, 1.0, 3.0, 1e30]), [-1.0, float("nan")]),
        "top_k": parameter(st.integers(0, 700), [-1]),
        "top_p": parameter(st.floats(0, 1), [-0.1, 1.1, float("nan")]),
        "min_p": parameter(st.floats(0, 1), [-0.1, 1.1]),
        "seed": parameter(st.integers(0, 2**63 - 1), [-1]),
        "position": parameter(st.integers(0, 2**63 - 1), [-5]),
    }
    results = [
        outcome(lambda impl=impl: list(ops.sample(logits, return_logprobs=True, impl=impl, **options)))
        for impl in ("auto", "reference")
    ]
    assert_alike(*results, [0.0, 0.0])


def fuzz_adamw(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    dtypes = [data.draw(st.sampled_from(FLOATS)) for _ in range(count)]
    values = [data.draw(matrices(st.integers(0, 70), st.integers(1, 70), torch.float32)) for _ in range(count)]
    values = [
        value.nan_to_num(0, 0, 0).clone(memory_format=torch.preserve_format).to(t) for value, t in zip(values, dtypes)
    ]
    grads = []
    for value, dtype in zip(values, dtypes):
        layout = data.draw(st.sampled_from(LAYOUTS))
        grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
        if grad.numel() and data.draw(st.integers(0, 9)) == 0:
            grad[0, 0] = data.draw(st.sampled_from(SPECIAL))
        grads.append(laid_out(grad.to(dtype), layout).clone(memory_format=torch.preserve_format))
    options: dict[str, Any] = {
        "lr": data.draw(st.sampled_from([0.0, 1e-3, 0.1, -1.0])),
        "betas": data.draw(st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 1.0)])),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
        "ema_decay": data.draw(st.sampled_from([None, None, 0.9])),
        "state_dtype": data.draw(st.sampled_from(["float32", "bfloat16", "int8", "float16"])),
        "master": data.draw(st.sampled_from([None, "remainder"])),
    }
    step: dict[str, Any] = data.draw(
        st.sampled_from([{}, {"grad_scale": 0.5}, {"grad_scale": 0.5, "zero_grads": True}])
    )

    def call(impl: Any) -> list[Tensor | None]:
        parameters = [nn.Parameter(value.clone(memory_format=torch.preserve_format)) for value in values]
        optimizer = AdamW(parameters, impl=impl, **options)
        for _ in range(2):
            for p, grad in zip(parameters, grads):
                p.grad = grad.clone(memory_format=torch.preserve_format)
            optimizer.step(**step)
        state = [value for p in parameters for key, value in optimizer.state[p].items() if key in ("step", "remainder")]
        return [*(p.detach() for p in parameters), *state]

    results = [outcome(lambda impl=impl: call(impl)) for impl in ("auto", "reference")]
    # what the kernels take they do bit for bit; PyTorch's fused kernel computes in the parameter's type
    exact = [
        dtype in (torch.float32, torch.bfloat16) and v.is_contiguous() and g.is_contiguous()
        for dtype, v, g in zip(dtypes, values, grads)
    ]
    tolerances = [
        0.0 if bits else 1e-5 if dtype in (torch.float32, torch.float64) else 0.02 for bits, dtype in zip(exact, dtypes)
    ]
    assert_alike(*results, tolerances)


OPS = [fuzz_cross_entropy, fuzz_linear_cross_entropy, fuzz_sample, fuzz_adamw]


@pytest.mark.parametrize("fuzz", OPS, ids=lambda fuzz: fuzz.__name__)
@few
@given(data=st.data())
def test_the_compiled_op_does_what_the_reference_does(
    fuzz: Callable[[st.DataObject], None], data: st.DataObject
) -> None:
    fuzz(data)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", OPS, ids=lambda fuzz: fuzz.__name__)
def test_a_campaign_of_four_thousand_cases(fuzz: Callable[[st.DataObject], None]) -> None:
    seen = [0]

    @many
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        seen[0] += 1
        fuzz(data)

    run()
    print(f"{fuzz.__name__}: {seen[0]} cases")
