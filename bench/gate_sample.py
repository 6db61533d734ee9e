"""The kernels of `sample` as subjects of the Triton gate."""

from __future__ import annotations

from typing import Any

from bench.gate_cross_entropy import ELEMENT_SIZES
from bench.gate_subject import Subject, counted
from tests.triton_gate import Compiled, compile_for

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


def subjects() -> list[Subject]:
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
                run=counted(lambda dtype=dtype: _run_sample(dtype)),
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
                run=counted(lambda dtype=dtype: _run_sample(dtype)),
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
        "run": counted(lambda: _run_sample("fp32", top_k=50)),
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
