"""The kernels of AdamW as subjects of the Triton gate."""

from __future__ import annotations

from bench.gate_subject import Subject
from tests.triton_gate import Compiled, Traffic, compile_for, count_bytes

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


def subjects() -> list[Subject]:
    return [
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
    ]
