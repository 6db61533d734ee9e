"""The kernels of `sample` as subjects of the Triton gate."""

from __future__ import annotations

from typing import Any

from bench.gate_cross_entropy import ELEMENT_SIZES
from bench.gate_subject import Subject, counted
from tests.triton_gate import Compiled, compile_for

_LONG = ("top_ks", "min_masses", "cuts", "survivor_masses", "totals", "seeds", "positions", "tokens")
_FLOAT = ("maxima", "shares", "largest_logits", "scales", "logprobs", "bounds")
_SAMPLE_SIGNATURE = {
    "top_ps": "*fp64",
    "estimates": "*fp64",
    "num_listed": "*i32",
    "entries": "*u64",
    "row_stride": "i64",
    "V": "i32",
    "G": "i32",
    "per_program": "i32",
    **dict.fromkeys(_FLOAT, "*fp32"),
    **dict.fromkeys(_LONG, "*i64"),
}
NO_FILTER = dict.fromkeys(("cuts", "survivor_masses", "totals"))
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


def _pass(dtype: str, name: str, constexprs: dict[str, Any], results: int, **rest: Any) -> Subject:
    """A pass over all logits; `results`: values of 4 bytes that it stores for each group of 256."""
    B, V = SAMPLE_RUN
    size = ELEMENT_SIZES[dtype]
    loads = 16 * 256 * size / (128 * 16)  # of each of 128 threads, if all move 128 bits
    return Subject(
        f"sample {dtype}, {name.strip('_').removesuffix('_kernel')}",
        name,
        unit="logit",
        compile=lambda t, a: compile_sample(name, dtype, t, aligned=a, GROUPS=16, **constexprs),
        run=counted(lambda: _run_sample(dtype)),
        units=B * V,
        minimum=size + results * 4 / 256,
        modelled=16 * 128256,
        wide_share=loads / (loads + results),
        extra_bytes=0.03,
        **rest,
    )


def subjects() -> list[Subject]:
    B, V = SAMPLE_RUN
    found = []
    for dtype in ("fp32", "bf16"):
        # Without filters or log-probabilities the only pass; the exact masses that log-probabilities need come from a
        # polynomial, 64-bit shifts and sums, of logits that the first pass left in the cache.
        found.append(_pass(dtype, "_groups_kernel", {}, 2))
        issue = {"fp32": 1.1, "bf16": 2.0}[dtype]
        without: dict[str, Any] = {"FILTERED": False, "cuts": None}
        found.append(_pass(dtype, "_totals_kernel", without, 0, from_cache=True, issue=issue))
    small: dict[str, Any] = {
        "unit": "logit",
        "units": B * V,
        "issue": None,
        "wide_share": 0.0,
        "run": counted(lambda: _run_sample("fp32", top_k=50)),
    }
    # of groups: a maximum and a share; the groups that hold one of the 50, and 8 bytes for each token that can be; what
    # the few tokens on the list take; a mass too, and the drawn group's logits
    for name, minimum, most, constexprs in (
        ("_bounds_kernel", 8 / 256, 0.035, {"PADDED_G": 512, "FILTERED": True}),
        ("_list_kernel", 4 * 50 * 256 / V, 1.8, {"num_warps": 1}),
        ("_cuts_kernel", 0.0, 1.0, {"BLOCK": 1024, "num_warps": 16}),
        ("_draw_kernel", 16 / 256 + 1024 / V, 0.1, {"PADDED_G": 512, "FILTERED": True, "LOGPROBS": True}),
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
    return found
