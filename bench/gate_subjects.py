"""Every Triton kernel of the package, and what its users would run instead, as subjects of the gate."""

from __future__ import annotations

import importlib.util

from bench import gate_adamw, gate_linear_cross_entropy, gate_sample
from bench.gate_cross_entropy import ELEMENT_SIZES, ROWS_COUNTED, Variant, compile_liger, run_liger, run_variant
from bench.gate_subject import Subject, counted
from tests.triton_gate import Compiled, compile_for


def _cross_entropy(variant: Variant, rows: int = 8192) -> Subject:
    size = ELEMENT_SIZES[variant.dtype]
    one_load = variant.entry == "fused" and variant.passes == 2
    kernel = {"backward": "_backward_kernel"}.get(
        variant.entry, "_one_load_kernel" if one_load else "_streaming_kernel"
    )

    def compile(target: str, aligned: bool) -> Compiled:
        return Variant(**{**vars(variant), "aligned": aligned and variant.aligned}).compile(target)

    row_bytes = variant.num_classes * (4 if variant.softcapped else size)
    alone = one_load and row_bytes > 64 << 10  # a row that fills half of the registers
    return Subject(
        f"cross-entropy {variant.name}",
        kernel,
        "logit",
        compile,
        counted(lambda: run_variant(variant)),
        ROWS_COUNTED * variant.num_classes,
        variant.passes * size,
        rows * variant.num_classes,
        occupancy=1 if alone else 2,
        wide_share=0.95 * variant.aligned,
    )


def _scale(target: str, aligned: bool) -> Compiled:
    from fasttrain.kernels import cross_entropy as kernels

    shape = kernels.streaming_shape(1 << 20, 2)
    return compile_for(
        kernels._scale_kernel,
        {"grads": "*bf16", "scale": "*fp32", "numel": "i64"},
        {"BLOCK": shape.block, "SOFTWARE_BF16": False},
        target,
        element_size=2,
        num_warps=kernels._options(shape)["num_warps"],
        aligned=aligned,
    )


def _run_scale() -> None:
    import torch

    from fasttrain.kernels import cross_entropy as kernels

    kernels.scale_inplace(torch.randn(1 << 16).bfloat16(), torch.tensor(0.5))


def _liger(dtype: str, num_classes: int, rows: int, name: str) -> Subject:
    size = ELEMENT_SIZES[dtype]
    return Subject(
        f"{name} {dtype} {num_classes}",
        "liger_cross_entropy_kernel",
        "logit",
        lambda target, aligned: compile_liger(dtype, num_classes, target),
        counted(lambda: run_liger(dtype, num_classes)),
        ROWS_COUNTED * num_classes,
        2 * size,
        rows * num_classes,
        ours=False,
    )


def ours() -> list[Subject]:
    """One of every kernel at least, in its common forms."""
    variants = [
        ("fused", "bf16", 32000),
        ("fused", "bf16", 50304),
        ("fused", "bf16", 65536),
        ("fused", "bf16", 128256),
        ("fused", "fp32", 32000),
        ("fused", "fp32", 50304),
        ("forward", "bf16", 50304),
        ("backward", "bf16", 50304),
    ]
    return [
        *(_cross_entropy(Variant(*variant)) for variant in variants),
        _cross_entropy(Variant("fused", "bf16", 32000, softcapped=True)),
        _cross_entropy(Variant("fused", "bf16", 50257, aligned=False)),
        Subject(
            "loss's gradient times a scalar",
            "_scale_kernel",
            "logit",
            _scale,
            counted(_run_scale),
            1 << 16,
            4.0,
            8192 * 50304,
        ),
        *gate_linear_cross_entropy.subjects(),
        *gate_adamw.subjects(),
        *gate_sample.subjects(),
    ]


def peers() -> list[Subject]:
    """What the kernels' users would run instead, as far as it is installed."""
    import torch

    from bench.gate_usual_forms import compile_gumbel, run_gumbel

    B, V = gate_sample.SAMPLE_RUN
    found = [
        Subject(
            "one Gumbel noise a token fp32",
            "gumbel_kernel",
            "logit",
            lambda t, a: compile_gumbel("fp32", t, a),
            counted(lambda: run_gumbel(B, V, torch.float32)),
            B * V,
            4.0,
            16 * 128256,
            ours=False,
        ),
        Subject(
            "one Gumbel noise a token bf16",
            "gumbel_kernel",
            "logit",
            lambda t, a: compile_gumbel("bf16", t, a),
            counted(lambda: run_gumbel(B, V, torch.bfloat16)),
            B * V,
            2.0,
            16 * 128256,
            ours=False,
        ),
    ]
    if importlib.util.find_spec("liger_kernel"):
        for dtype, num_classes in (("bf16", 50304), ("bf16", 128256), ("fp32", 50304)):
            found.append(_liger(dtype, num_classes, 8192, "Liger cross-entropy"))
        # Liger's fused linear form runs the same kernel on chunks of rows, between matrix products of PyTorch.
        found.append(_liger("bf16", 50304, 8192, "Liger fused linear cross-entropy, chunk"))
    return found
