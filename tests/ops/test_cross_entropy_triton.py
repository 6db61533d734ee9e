"""The Triton cross-entropy where there is no GPU: its launch shapes, its machine code, and its interpreted tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_gate import DEVICES, H100, run_interpreted

from bench.gate_cross_entropy import ELEMENT_SIZES, Variant
from fasttrain.kernels import cross_entropy as kernels

TARGETS = list(DEVICES)
ISSUE_SLOTS_PER_BYTE = H100["issue"] / H100["memory"]
"""Instructions that an H100 issues in the time in which it moves a byte: 8.6."""

TYPICAL = [
    Variant("fused", "bf16", 32000),
    Variant("fused", "fp16", 32768),
    Variant("fused", "bf16", 50304, smoothed=True, z_loss=True),
    Variant("fused", "fp32", 32000),
    Variant("fused", "bf16", 128256),
    Variant("backward", "bf16", 50304),
]
EVERY = [
    Variant(entry, dtype, num_classes, smoothed=terms, z_loss=terms, softcapped=cap)
    for entry, sizes in (
        ("fused", (1000, 8192, 32000, 32768, 50304, 65536, 262144)),
        ("forward", (1000, 50304)),
        ("backward", (1000, 50304)),
    )
    for dtype in ("bf16", "fp16", "fp32")
    for terms in (False, True)
    for cap in (False, True)
    for num_classes in sizes
]


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Machine code is made anew for every test run, and kept nowhere else."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def faults(variant: Variant, target: str) -> list[str]:
    """What the gate holds against the machine code of one variant."""
    compiled = variant.compile(target)
    row_bytes = variant.num_classes * (4 if variant.softcapped or variant.dtype == "fp32" else 2)
    two_rows_fit = variant.entry != "fused" or (row_bytes <= 64 << 10 and not variant.smoothed) or row_bytes > 128 << 10
    rules = {
        "spills": compiled.spills == 0 and compiled.local_bytes == 0,
        "narrow accesses": compiled.wide_share >= 0.95,
        "float atomics": compiled.num_float_atomics == 0,
        "one program per SM": compiled.occupancy >= 2 or not two_rows_fit,
    }
    return [f"{variant.name} for {target}: {rule} ({compiled})" for rule, holds in rules.items() if not holds]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", TYPICAL, ids=lambda variant: variant.name)
def test_machine_code_has_no_spills_and_only_wide_accesses(variant: Variant, target: str) -> None:
    assert not faults(variant, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_of_every_variant_is_clean(target: str) -> None:
    found = [fault for variant in EVERY for fault in faults(variant, target)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("variant", [*TYPICAL, Variant("forward", "bf16", 50304)], ids=lambda variant: variant.name)
def test_instructions_leave_memory_the_bottleneck(variant: Variant, target: str) -> None:
    num_bytes = variant.passes * ELEMENT_SIZES[variant.dtype]
    assert variant.compile(target).instructions_per_element <= 0.7 * num_bytes * ISSUE_SLOTS_PER_BYTE


@pytest.mark.parametrize(
    ("num_classes", "entry"), [(32003, "fused"), (50257, "fused"), (50257, "backward"), (262145, "fused")]
)
def test_rows_that_are_not_aligned_compile_without_spills(num_classes: int, entry: str) -> None:
    compiled = Variant(entry, "bf16", num_classes, aligned=False).compile("sm_90")
    assert compiled.spills == 0
    assert compiled.shared_bytes <= 1024  # more would be a change of layout between load, reduction and store


@pytest.mark.parametrize("element_size", [2, 4])
def test_a_row_is_read_once_up_to_128_kib(element_size: int) -> None:
    longest = (128 << 10) // element_size
    shape = kernels.one_load_shape(longest, element_size)
    assert shape is not None and shape.threads == 512
    assert kernels.one_load_shape(longest + 1, element_size) is None
    for num_classes in (1, 7, 1000, 32000, longest):
        shape = kernels.one_load_shape(num_classes, element_size)
        assert shape is not None and num_classes * element_size <= shape.threads * kernels.MAX_HELD_BYTES
        assert shape.block == shape.threads * kernels.BYTES_PER_ACCESS // element_size


@pytest.mark.parametrize("call", ["forward", "backward", "fused", "scale"])
def test_cpu_tensors_are_refused_outside_the_interpreter(call: str) -> None:
    logits, targets, ones = torch.zeros(2, 10), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    terms = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
    with pytest.raises(ValueError, match=r"CPU tensor.*TRITON_INTERPRET=1"):
        if call == "forward":
            kernels.cross_entropy_forward(logits, targets, **terms)
        elif call == "backward":
            kernels.cross_entropy_backward(ones, logits, targets, ones, **terms)
        elif call == "fused":
            kernels.cross_entropy_fused(logits, targets, torch.ones(()), **terms)
        else:
            kernels.scale_inplace(logits, torch.ones(()))


def test_interpreted_tests_pass() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_cross_entropy.py"))


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_reference() -> None:
    from fasttrain.ops.cross_entropy import Terms, cross_entropy_reference

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for num_classes in (7, 1000, 32000, 50257, 50304, 128256):
            logits = (torch.randn(64, num_classes, device="cuda") * 3).to(dtype)
            targets = torch.randint(0, num_classes, (64,), device="cuda")
            targets[5] = -100
            terms = Terms(-100, 0.1, 1e-4, 30.0)
            leaf = logits.double().requires_grad_()
            want = cross_entropy_reference(leaf, targets, terms, "none")
            (want_gradient,) = torch.autograd.grad(want.sum() / 2, leaf)
            half = torch.tensor(0.5, device="cuda")
            losses, lse, gradient = kernels.cross_entropy_fused(logits, targets, half, **terms._asdict())
            backward = kernels.cross_entropy_backward(half.expand(64), logits, targets, lse, **terms._asdict())
            torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
            for got in (gradient, backward):
                torch.testing.assert_close(
                    got.double(), want_gradient, rtol=2 * torch.finfo(dtype).eps + 1e-4, atol=1e-6
                )
