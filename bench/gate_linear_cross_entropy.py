"""The kernels of the linear cross-entropy as subjects of the Triton gate: its loss, and filtered gradients."""

from __future__ import annotations

from typing import Any

from bench.gate_cross_entropy import ELEMENT_SIZES
from bench.gate_subject import Subject, counted
from tests.triton_gate import Compiled, compile_for

LINEAR = (256, 128, 1024)  # N, D, V of the run


def compile_tile(
    dtype: str,
    target: str,
    *,
    smoothed: bool = False,
    softcapped: bool = False,
    with_bias: bool = False,
    aligned: bool = True,
) -> Compiled:
    """The tile kernel of the linear cross-entropy with the launcher's own shape."""
    from fasttrain.kernels import linear_cross_entropy as kernels

    tile = kernels.tile_shape(ELEMENT_SIZES[dtype])
    constexprs: dict[str, Any] = {
        "D": 768,
        "V": 50304,
        "ROWS": tile.rows,
        "CLASSES": tile.classes,
        "DEPTH": tile.depth,
        "SMOOTHED": smoothed,
        "SOFTCAPPED": softcapped,
        "PRECISION": "tf32",
        "WIDENED": False,
    }
    constexprs |= ({} if with_bias else {"bias": None}) | ({} if smoothed else {"sums": None})
    signature = {
        **dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}"),
        "targets": "*i64",
        **dict.fromkeys(("maxima", "totals", "sums", "target_logits"), "*fp32"),
        **dict.fromkeys(("hidden_stride", "weight_stride", "num_rows", "ignore_index"), "i32"),
        "softcap": "fp32",
    }
    return compile_for(
        kernels._tile_kernel,
        signature,
        constexprs,
        target,
        element_size=ELEMENT_SIZES[dtype],
        num_warps=tile.num_warps,
        aligned=aligned,
    )


def _combine(target: str, aligned: bool) -> Compiled:
    from fasttrain.kernels import linear_cross_entropy as kernels

    signature = {
        "targets": "*i64",
        **dict.fromkeys(("maxima", "totals", "target_logits", "losses", "lses"), "*fp32"),
        "ignore_index": "i32",
        "label_smoothing": "fp32",
        "z_loss": "fp32",
    }
    constexprs = {"sums": None, "V": 50304, "NUM_TILES": 393, "BLOCK": 512, "SMOOTHED": False, "Z_LOSS": False}
    return compile_for(
        kernels._combine_kernel, signature, constexprs, target, element_size=8, num_warps=4, aligned=aligned
    )


def _run_linear() -> None:
    import torch

    from fasttrain.kernels import linear_cross_entropy as kernels

    N, D, V = LINEAR
    kernels.linear_cross_entropy_forward(
        torch.randn(N, D).half(),
        torch.randn(V, D).half(),
        None,
        torch.randint(0, V, (N,)),
        ignore_index=-100,
        label_smoothing=0.0,
        z_loss=0.0,
        softcap=0.0,
    )


FILTER_KERNELS = ("_live_kernel", "_filtered_hidden_kernel", "_filtered_weight_kernel")


def compile_filter(kernel: str, dtype: str, target: str, *, aligned: bool = True) -> Compiled:
    """A kernel of the filtered gradients with the launcher's own shape."""
    from fasttrain.kernels import linear_cross_entropy as kernels
    from fasttrain.ops._gradient_filter import BLOCK_ROWS

    strides = ("scale_stride", "weight_stride", "weight_depth_stride", "result_stride", "result_depth_stride")
    signature = {
        **dict.fromkeys(("z", "weight", "hidden"), f"*{dtype}"),
        **dict.fromkeys(("scales", "dead_sums", "all_sums", "result"), "*fp32"),
        **dict.fromkeys(("columns", "counts", "row_live"), "*i32"),
        **dict.fromkeys((*strides, "num_rows", "block"), "i32"),
        "live": "*i8",
        "eps": "fp32",
    }
    tile = kernels.FILTERED
    sizes: dict[str, Any] = {"V": 50304, "ROWS": BLOCK_ROWS}
    if kernel == "_live_kernel":
        constexprs = sizes | {"CLASSES": kernels.LIVE_CLASSES}
    else:
        constexprs = sizes | {"D": 768, "CLASSES": tile.classes, "DEPTH": tile.depth}
        constexprs |= {"PRECISION": "tf32", "WIDENED": False}
        constexprs |= {"weight_depth_stride" if "hidden" in kernel else "result_depth_stride": 1}
    return compile_for(
        getattr(kernels, kernel),
        signature,
        constexprs,
        target,
        element_size=ELEMENT_SIZES[dtype],
        num_warps=kernels.LIVE_WARPS if kernel == "_live_kernel" else tile.num_warps,
        aligned=aligned,
    )


def _run_filter() -> None:
    import torch

    from fasttrain.kernels import linear_cross_entropy as kernels
    from fasttrain.ops._gradient_filter import BLOCK_ROWS

    N, D, V = LINEAR
    z, h, w = (torch.randn(*shape).half() for shape in ((N, V), (N, D), (V, D)))
    kernels.filtered_gradients(z, h, w, torch.ones(()), 0.0, BLOCK_ROWS, True, torch.zeros(V, D))


def _filter() -> list[Subject]:
    """All is alive in the run: a unit of the products is a logit that the filter left."""
    from fasttrain.kernels import linear_cross_entropy as kernels
    from fasttrain.ops._gradient_filter import BLOCK_ROWS

    N, D, V = LINEAR
    tile = kernels.FILTERED
    gathered = 2 * D / tile.depth  # of z: each tile of the hidden size reads it
    common: dict[str, Any] = {"unit": "logit", "units": N * V, "run": counted(_run_filter)}
    common |= {"issue": None, "wide_share": 0.0}
    product = common | {"operations": 2 * 768, "from_cache": True, "modelled": 8192 * 50304 // 10}
    # a row's two sums, its scale and its flag for each tile; a flag for each class of a block
    looked_at = 2 + (8 + 4 + 8) / kernels.LIVE_CLASSES + 1 / BLOCK_ROWS
    return [
        Subject(
            "filtered gradients, live columns bf16",
            "_live_kernel",
            compile=lambda t, a: compile_filter("_live_kernel", "bf16", t, aligned=a),
            minimum=2.0,
            most=looked_at,
            modelled=8192 * 50304,
            **common | {"issue": 1.5},  # two comparisons, two sums and two maxima of every logit
        ),
        Subject(
            "filtered gradients, hidden bf16, a live logit",
            "_filtered_hidden_kernel",
            compile=lambda t, a: compile_filter("_filtered_hidden_kernel", "bf16", t, aligned=a),
            minimum=gathered + 2 * D / BLOCK_ROWS,
            extra_bytes=0.2,  # columns' numbers, and the result
            occupancy=1,  # of unaligned matrices the addresses fill the registers
            **product,
        ),
        Subject(
            "filtered gradients, weight bf16, a live logit",
            "_filtered_weight_kernel",
            compile=lambda t, a: compile_filter("_filtered_weight_kernel", "bf16", t, aligned=a),
            minimum=gathered + 2 * D / tile.classes + 8 * D / BLOCK_ROWS,
            **product,
        ),
    ]


def subjects() -> list[Subject]:
    N, D, V = LINEAR
    rows, classes = 128, 128  # of a tile of 16-bit operands
    products = 2 * D * (1 / classes + 1 / rows)  # bytes of hidden and weight that a logit's tile reads, from L2
    tiles = (8 + 8 / rows) / classes  # a maximum and a sum for each row of a tile; its target's id
    return [
        *_filter(),
        Subject(
            "linear cross-entropy, tile",
            "_tile_kernel",
            "logit",
            lambda t, a: compile_tile("bf16", t, aligned=a),
            counted(_run_linear),
            N * V,
            products + tiles,
            8192 * 50304,
            operations=2 * 768,
            from_cache=True,
            issue=None,
            occupancy=1,
            wide_share=0.0,
        ),
        Subject(
            "linear cross-entropy, combine",
            "_combine_kernel",
            "tile",
            _combine,
            counted(_run_linear),
            N * V // classes,
            8 + 20 * classes / V,
            issue=None,
            wide_share=0.0,
        ),
    ]
