"""Every Triton kernel of the package, and what its users would run instead, as subjects of the gate.

A subject knows how to compile its kernel as the launcher would, how to run it once in the interpreter, and what it may
cost: the bytes of a unit (a logit, a parameter) that cannot be avoided, and the share of accesses, instructions and
occupancy that the gate asks for, with the reason where that is not the common rule.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gate_cross_entropy import ELEMENT_SIZES, ROWS_COUNTED, Variant, compile_liger, run_liger, run_variant
from tests.triton_gate import H100, Compiled, Traffic, compile_for, count_bytes


@dataclass(frozen=True)
class Subject:
    name: str
    kernel: str
    """Name of the function, by which the interpreter's bytes are told apart."""
    unit: str
    compile: Callable[[str, bool], Compiled]
    """(target, aligned) -> the machine code."""
    run: Callable[[], Traffic]
    units: int
    """In that run."""
    minimum: float
    """Bytes of a unit that the kernel cannot avoid."""
    modelled: int = 0
    """Units of the problem whose time is modelled; 0: the kernel's share of a call is too small to matter."""
    operations: float = 0.0
    """Of a matrix product, for a unit."""
    from_cache: bool = False
    extra_bytes: float = 0.02
    """Over the minimum, as a share: what a unit's share of the table, the results, the scalars is."""
    most: float | None = None
    """Bytes of a unit where the minimum depends on the values."""
    wide_share: float = 0.95
    issue: float | None = 1.0
    """Instructions allowed, in those that an H100 issues while it moves the minimum of bytes."""
    occupancy: int = 2
    ours: bool = True

    def bytes_per_unit(self) -> float:
        """Counted in an interpreted run, in which every access is checked too."""
        return self.run().by_kernel[self.kernel] / self.units

    def bytes_allowed(self) -> float:
        return self.minimum * (1 + self.extra_bytes) if self.most is None else self.most

    def faults(self, compiled: Compiled, target: str, aligned: bool = True) -> list[str]:
        """What the gate holds against the machine code."""
        rules = {
            "spills": compiled.spills == 0 and compiled.local_bytes == 0,
            "narrow accesses": not aligned or compiled.wide_share >= self.wide_share,
            "float atomics": compiled.num_float_atomics == 0,
            "programs per multiprocessor": compiled.occupancy >= self.occupancy,
            "instructions": target != "sm_90"
            or not aligned
            or self.issue is None
            or compiled.instructions_per_element <= self.issue * self.minimum / H100["memory"] * H100["issue"],
        }
        return [f"{self.name} for {target}: {rule} ({compiled})" for rule, holds in rules.items() if not holds]


def _counted(call: Callable[[], None]) -> Callable[[], Traffic]:
    def run() -> Traffic:
        with count_bytes() as traffic:
            call()
        return traffic

    return run


# ---- cross-entropy -------------------------------------------------------------------------------------------------


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
        _counted(lambda: run_variant(variant)),
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


# ---- linear cross-entropy ------------------------------------------------------------------------------------------

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
        **dict.fromkeys(("hidden_stride", "weight_stride", "num_rows"), "i32"),
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


def _linear() -> list[Subject]:
    N, D, V = LINEAR
    rows, classes = 128, 128  # of a tile of 16-bit operands
    products = 2 * D * (1 / classes + 1 / rows)  # bytes of hidden and weight that a logit's tile reads, from L2
    tiles = (8 + 8 / rows) / classes  # a maximum and a sum for each row of a tile; its target's id
    return [
        Subject(
            "linear cross-entropy, tile",
            "_tile_kernel",
            "logit",
            lambda t, a: compile_tile("bf16", t, aligned=a),
            _counted(_run_linear),
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
            _counted(_run_linear),
            N * V // classes,
            8 + 20 * classes / V,
            issue=None,
            wide_share=0.0,
        ),
    ]


# ---- AdamW ---------------------------------------------------------------------------------------------------------

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def compile_update(
    param: str,
    moment: str,
    target: str,
    *,
    ema: bool = False,
    zero: bool = False,
    master: bool = False,
    aligned: bool = True,
) -> Compiled:
    """The update kernel of AdamW as the launcher runs it; instructions are per parameter."""
    import torch
    import triton.language as tl

    from fasttrain.kernels import adamw as kernels

    types = {"fp32": tl.float32, "bf16": tl.bfloat16, "int8": tl.uint8}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
    signature = {"table": "*i64", "factors": "*fp32", "blocks": "*i64", "multiplier": "*fp32", "skip": "*fp32"}
    constexprs = {
        "BLOCK": kernels.block_of(dtypes[moment]),
        "TYPE": types[param],
        "MOMENT": types[moment],
        "ALIGNED": aligned,
        "WITH_EMA": ema,
        "MASTER": master,
        "ZERO": zero,
        "SOFTWARE_BF16": False,
    }
    loaded = BYTES[param] * (2 + ema) + 2 * BYTES[moment] + 2 * master
    return compile_for(
        kernels._update_kernel,
        signature,
        constexprs,
        target,
        element_size=loaded,
        num_warps=kernels.NUM_WARPS,
        fp_fusion=False,
    )


def compile_norm(target: str, aligned: bool) -> Compiled:
    import triton.language as tl

    from fasttrain.kernels import adamw as kernels

    return compile_for(
        kernels._norm_kernel,
        {"table": "*i64", "blocks": "*i64", "sums": "*fp32"},
        {"BLOCK": kernels.BLOCK, "TYPE": tl.float32, "ALIGNED": aligned},
        target,
        element_size=4,
        num_warps=kernels.NUM_WARPS,
    )


def _adamw(param: str, moment: str, *, master: bool = False, issue: float = 1.0) -> Subject:
    # p and g in, p out; m and v in and out; the master's other half in and out; two scales for 256 codes in and out.
    minimum = 3 * BYTES[param] + 4 * BYTES[moment] + 4 * master + (4 * 4 / 256 if moment == "int8" else 0)
    num_wide = minimum  # of a thread's sixteen elements
    scales = 4 if moment == "int8" else 0
    name = f"AdamW {param}, {moment} moments" + (", remainder" if master else "")
    return Subject(
        name,
        "_update_kernel",
        "parameter",
        lambda t, a: compile_update(param, moment, t, master=master, aligned=a),
        lambda: _run_adamw(param, moment, master),
        ADAMW_NUMEL,
        minimum,
        10**9,
        wide_share=0.95 * num_wide / (num_wide + scales),
        issue=issue,
    )


ADAMW_NUMEL = 1 << 15


def _run_adamw(param: str, moment: str, master: bool) -> Traffic:
    import torch

    from fasttrain import AdamW

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[param]
    p = torch.nn.Parameter(torch.randn(ADAMW_NUMEL).to(dtype))
    p.grad = torch.randn(ADAMW_NUMEL).to(dtype)
    state = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}[moment]
    optimizer = AdamW([p], state_dtype=state, master="remainder" if master else None, max_grad_norm=1.0, impl="triton")
    optimizer.step()
    # reached through addresses in a table, not as arguments
    with count_bytes(
        {"p": [p], "g": [p.grad], **{key: [value] for key, value in optimizer.state[p].items()}}
    ) as traffic:
        optimizer.step()
    return traffic


# ---- sample --------------------------------------------------------------------------------------------------------

_LONG = (
    "top_ks",
    "bound_keys",
    "bound_masses",
    "min_masses",
    "group_masses",
    "list_ranks",
    "list_masses",
    "cuts",
    "survivor_masses",
    "seeds",
    "positions",
    "tokens",
)
_SAMPLE_SIGNATURE = {
    "maxima": "*fp32",
    "largest_logits": "*fp32",
    "scales": "*fp32",
    "logprobs": "*fp32",
    "top_ps": "*fp64",
    "num_listed": "*i32",
    "row_stride": "i64",
    "V": "i32",
    "G": "i32",
    **dict.fromkeys(_LONG, "*i64"),
}
NO_LIST = dict.fromkeys(("bound_keys", "bound_masses", "num_listed", "list_ranks", "list_masses"))
SAMPLE_RUN = (2, 32768)


def compile_sample(
    kernel: str,
    dtype: str,
    target: str,
    *,
    num_warps: int = 4,
    aligned: bool = True,
    fp_fusion: bool = False,
    **constexprs: Any,
) -> Compiled:
    """One of the kernels of `sample`; instructions are per logit."""
    from fasttrain.kernels import sample as kernels

    return compile_for(
        getattr(kernels, kernel),
        _SAMPLE_SIGNATURE | {"logits": f"*{dtype}"},
        constexprs,
        target,
        element_size=ELEMENT_SIZES[dtype],
        num_warps=num_warps,
        fp_fusion=fp_fusion,
        aligned=aligned,
    )


def _run_sample(dtype: str, **options: Any) -> None:
    import torch

    from fasttrain.kernels import sample as kernels
    from fasttrain.ops._row_parameters import row_parameters

    B, V = SAMPLE_RUN
    logits = torch.randn(B, V).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    nothing = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3, "position": 5}
    row = row_parameters(B, torch.device("cpu"), nothing | options)
    kernels.sample(logits, *row, filtered=bool(options), num_groups=None if options else 16)


def _sample() -> list[Subject]:
    B, V = SAMPLE_RUN
    found = []
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        loads = 16 * 256 * size / (128 * 16)  # of each of 128 threads, if all move 128 bits; then a result for a group
        common: dict[str, Any] = {
            "unit": "logit",
            "units": B * V,
            "modelled": 16 * 128256,
            "wide_share": loads / (loads + 1),
            "extra_bytes": 0.03,
        }
        found.append(
            Subject(
                f"sample {dtype}, maxima",
                "_maxima_kernel",
                compile=lambda t, a, dtype=dtype: compile_sample("_maxima_kernel", dtype, t, aligned=a, GROUPS=16),
                run=_counted(lambda dtype=dtype: _run_sample(dtype)),
                minimum=size + 4 / 256,
                **common,
            )
        )
        found.append(
            Subject(
                f"sample {dtype}, masses",
                "_masses_kernel",
                compile=lambda t, a, dtype=dtype: compile_sample(
                    "_masses_kernel", dtype, t, aligned=a, GROUPS=16, FILTERED=False, **NO_LIST
                ),
                run=_counted(lambda dtype=dtype: _run_sample(dtype)),
                minimum=size + 8 / 256,
                from_cache=True,
                # exact masses from a polynomial, 64-bit shifts and sums: what does not depend on the launch shape
                issue={4: 1.4, 2: 2.8}[size],
                **common,
            )
        )
    small: dict[str, Any] = {
        "unit": "logit",
        "units": B * V,
        "issue": None,
        "wide_share": 0.0,
        "run": _counted(lambda: _run_sample("fp32", top_k=50)),
    }
    # of groups: a maximum; what the few tokens on the list take; a mass, and the drawn group's logits
    for name, minimum, most, constexprs in (
        ("_bounds_kernel", 4 / 256, 0.02, {"PADDED_G": 512, "FILTERED": True}),
        ("_cuts_kernel", 0.0, 1.0, {"PADDED_G": 512, "BLOCK": 1024, "num_warps": 16}),
        ("_draw_kernel", 8 / 256 + 1024 / V, 0.07, {"PADDED_G": 512, "FILTERED": True}),
    ):
        found.append(
            Subject(
                f"sample, {name.strip('_').removesuffix('_kernel')}",
                name,
                compile=lambda t, a, name=name, constexprs=constexprs: compile_sample(
                    name, "fp32", t, aligned=a, **constexprs
                ),
                minimum=minimum,
                most=most,
                occupancy=1 if name == "_cuts_kernel" else 2,
                **small,
            )
        )
    found.append(
        Subject(
            "sample fp32, masses and list",
            "_masses_kernel",
            compile=lambda t, a: compile_sample("_masses_kernel", "fp32", t, aligned=a, GROUPS=4, FILTERED=True),
            minimum=4 + 8 / 256,
            extra_bytes=0.1,
            **small,
        )
    )
    return found


# ---- what others run -----------------------------------------------------------------------------------------------


def _liger(dtype: str, num_classes: int, rows: int, name: str) -> Subject:
    size = ELEMENT_SIZES[dtype]
    return Subject(
        f"{name} {dtype} {num_classes}",
        "liger_cross_entropy_kernel",
        "logit",
        lambda target, aligned: compile_liger(dtype, num_classes, target),
        _counted(lambda: run_liger(dtype, num_classes)),
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
            _counted(_run_scale),
            1 << 16,
            4.0,
            8192 * 50304,
        ),
        *_linear(),
        Subject(
            "AdamW, norm of fp32 gradients",
            "_norm_kernel",
            "parameter",
            compile_norm,
            lambda: _run_adamw("fp32", "fp32", False),
            ADAMW_NUMEL,
            4.0,
            10**9,
        ),
        _adamw("fp32", "fp32"),
        _adamw("fp32", "bf16"),
        _adamw("fp32", "int8"),
        _adamw("bf16", "fp32", master=True),
        _adamw("bf16", "bf16"),
        # codes, random bits, an exact root and division: at ten bytes a parameter they are more than the memory's time
        _adamw("bf16", "int8", issue=1.6),
        _adamw("bf16", "int8", master=True, issue=1.3),
        *_sample(),
    ]


def peers() -> list[Subject]:
    """What the kernels' users would run instead, as far as it is installed."""
    import torch

    from bench.gate_usual_forms import compile_gumbel, run_gumbel

    B, V = SAMPLE_RUN
    found = [
        Subject(
            "one Gumbel noise a token fp32",
            "gumbel_kernel",
            "logit",
            lambda t, a: compile_gumbel("fp32", t, a),
            _counted(lambda: run_gumbel(B, V, torch.float32)),
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
            _counted(lambda: run_gumbel(B, V, torch.bfloat16)),
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
