"""The kernels of `sample` as subjects of the Triton gate."""

from __future__ import annotations

from typing import Any

from bench.gate_cross_entropy import ELEMENT_SIZES
from bench.gate_subject import Subject, counted
from tests.triton_gate import DEVICES, Compiled, compile_for

_LONG = ("top_ks", "min_masses", "cuts", "doubtful_cuts", "reached_masses", "survivor_masses", "doubtful_masses",
         "seeds", "positions", "tokens")  # fmt: skip
_FLOAT = ("maxima", "shares", "scales", "logprobs", "bounds")
_INT = ("num_entries", "live_groups", "num_live")
_SAMPLE_SIGNATURE = {
    "top_ps": "*fp64",
    "estimates": "*fp64",
    "entries": "*u64",
    "row_stride": "i64",
    "V": "i32",
    "G": "i32",
    "capacity": "i32",
    **dict.fromkeys(_FLOAT, "*fp32"),
    **dict.fromkeys(_LONG, "*i64"),
    **dict.fromkeys(_INT, "*i32"),
}
_LISTS = ("bounds", "num_entries", "entries", "cuts", "doubtful_cuts")
_MASSES = ("reached_masses", "survivor_masses", "doubtful_masses")
NO_FILTER = dict.fromkeys([*_LISTS, *_MASSES])
SAMPLE_RUN = (2, 32768)


def compile_sample(
    kernel: str,
    dtype: str,
    target: str,
    *,
    num_warps: int = 4,
    aligned: bool = True,
    fp_fusion: bool = False,
    max_registers: int | None = None,
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
        max_registers=max_registers,
    )


def _run_sample(dtype: str, **options: Any) -> None:
    import torch

    from fasttrain.kernels import sample as kernels
    from fasttrain.ops._row_parameters import row_parameters

    B, V = SAMPLE_RUN
    logits = torch.randn(B, V).to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    nothing = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3, "position": 5}
    row = row_parameters(B, torch.device("cpu"), nothing | options)
    kernels.sample(logits, *row, filtered=bool(options), return_logprobs=bool(options))


def list_options(dtype: str, target: str) -> dict[str, int]:
    """How `list_kernel` is launched on a target, for `compile_sample`."""
    from fasttrain.kernels import sample as kernels

    threads = DEVICES[target].warp_size
    groups = kernels.LIST_GROUPS[ELEMENT_SIZES[dtype]] * threads // 32
    return {"GROUPS": groups, "THREADS": threads, "num_warps": 1}


def draw_options(filtered: bool, logprobs: bool = False) -> dict[str, Any]:
    """How `draw_kernel` is launched, for `compile_sample`."""
    from fasttrain.kernels import sample as kernels

    absent = {} if filtered else NO_FILTER
    return {"FILTERED": filtered, "LOGPROBS": logprobs, "max_registers": kernels.MAX_REGISTERS, **absent}


def cut_options(dtype: str) -> dict[str, Any]:
    """How `cuts_kernel` is launched, for `compile_sample`."""
    import triton.language as tl

    from fasttrain.kernels import sample as kernels

    element = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    launch = {"num_warps": kernels.CUT_WARPS, "max_registers": kernels.MAX_REGISTERS}
    return {"BLOCK": kernels.CUT_BLOCK, "element": element, **launch}


def _pass(dtype: str, groups: int, warps: int, name: str) -> Subject:
    """The pass over all logits, which stores two values of 4 bytes for each group of 256."""
    B, V = SAMPLE_RUN
    size = ELEMENT_SIZES[dtype]
    loads = groups * 256 * size / (warps * 32 * 16)  # of each thread, if all move 128 bits
    return Subject(
        f"sample {dtype}, groups, {name}",
        "groups_kernel",
        unit="logit",
        compile=lambda t, a: compile_sample("groups_kernel", dtype, t, aligned=a, GROUPS=groups, num_warps=warps),
        run=counted(lambda: _run_sample(dtype)),
        units=B * V,
        minimum=size + 8 / 256,
        modelled=16 * 128256,
        wide_share=loads / (loads + 2),
        extra_bytes=0.03,
    )


def _list(dtype: str) -> Subject:
    """The pass over the groups that matter, here all, and its entries: 8 bytes a token, or a pair of 16 bits."""
    B, V = SAMPLE_RUN
    size = ELEMENT_SIZES[dtype]
    return Subject(
        f"sample {dtype}, list",
        "list_kernel",
        unit="logit",
        compile=lambda t, a: compile_sample("list_kernel", dtype, t, aligned=a, **list_options(dtype, t)),
        run=counted(lambda: _run_sample(dtype, top_p=0.9)),
        units=B * V,
        minimum=size,
        most=3 * size + 0.1,
        modelled=16 * 128256,
        from_cache=True,
        wide_share=0.0,
    )


def subjects() -> list[Subject]:
    B, V = SAMPLE_RUN
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        # Without filters the only pass; with them the list is a second one, from the cache.
        found += [_pass(dtype, 4, 1, "one row"), _pass(dtype, 32, 4, "many rows"), _list(dtype)]
    small: dict[str, Any] = {
        "unit": "logit",
        "units": B * V,
        "issue": None,
        "wide_share": 0.0,
        "run": counted(lambda: _run_sample("fp32", top_k=50)),
    }
    # of groups: a maximum, a share, and those that hold one of the 50; what the few tokens on the list take; a mass
    # too, and the drawn group's logits
    for name, minimum, most, constexprs in (
        ("bounds_kernel", 8 / 256, 0.05, {"PADDED_G": 512}),
        ("cuts_kernel", 0.0, 1.0, {"PADDED_G": 512, **cut_options("fp32")}),
        ("draw_kernel", 16 / 256 + 1024 / V, 0.1, {"PADDED_G": 512, **draw_options(True, True)}),
    ):
        found.append(
            Subject(
                f"sample, {name.removesuffix('_kernel')}",
                name,
                compile=lambda t, a, name=name, constexprs=constexprs: compile_sample(
                    name, "fp32", t, aligned=a, **constexprs
                ),
                minimum=minimum,
                most=most,
                occupancy=1 if name == "cuts_kernel" else 2,
                **small,
            )
        )
    return found
