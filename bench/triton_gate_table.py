"""What the Triton kernels cost on GPUs that are not here: `python -m bench.triton_gate_table [--out FILE]`.

Per kernel variant and target: bytes per logit counted in the interpreter, registers, spills, share of 128-bit
accesses, instructions per element and occupancy read from machine code, and the time on an H100 that a model derives
from them. Nothing in the table was timed. With `liger-kernel` installed its cross-entropy goes through the same
counters.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.triton_gate import DEVICES, INTERPRETED, Compiled, compile_for, modelled_time

ELEMENT_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
ROWS_COUNTED = 4
ROWS_MODELLED = 8192


@dataclass(frozen=True)
class Variant:
    """One launch of the cross-entropy kernels: which entry point, on what row, with which terms of the loss."""

    entry: str  # fused | forward | backward
    dtype: str
    num_classes: int
    smoothed: bool = False
    z_loss: bool = False
    softcapped: bool = False
    aligned: bool = True

    @property
    def name(self) -> str:
        terms = [
            term
            for term, on in (
                ("ls", self.smoothed),
                ("z", self.z_loss),
                ("cap", self.softcapped),
                ("odd", not self.aligned),
            )
            if on
        ]
        return " ".join([self.entry, self.dtype, str(self.num_classes), *terms])

    @property
    def passes(self) -> int:
        """The declared minimum: how often the N x V matrix is read or written."""
        if self.entry == "forward":
            return 1
        return 3 if self.entry == "fused" and self._one_load_shape() is None else 2

    def _one_load_shape(self) -> Any:
        from fasttrain.kernels import cross_entropy as kernels

        return kernels.one_load_shape(
            self.num_classes,
            ELEMENT_SIZES[self.dtype],
            aligned=self.aligned,
            smoothed=self.smoothed,
            softcapped=self.softcapped,
        )

    def compile(self, target: str) -> Compiled:
        """The kernel that the launcher would run, with the launcher's own shape."""
        from fasttrain.kernels import cross_entropy as kernels

        size = ELEMENT_SIZES[self.dtype]
        constexprs: dict[str, Any] = {
            "V": self.num_classes,
            "SMOOTHED": self.smoothed,
            "Z_LOSS": self.z_loss,
            "SOFTCAPPED": self.softcapped,
            "SOFTWARE_BF16": False,
        }
        one_load = self._one_load_shape() if self.entry == "fused" else None
        shape = one_load or kernels.streaming_shape(self.num_classes, size, aligned=self.aligned)
        if self.entry == "backward":
            kernel = kernels._backward_kernel
        else:
            kernel = kernels._one_load_kernel if one_load else kernels._streaming_kernel
            constexprs |= {"GROUP": kernels.BYTES_PER_ACCESS // size, "ALIGNED": self.aligned}
            if not one_load:
                constexprs["WITH_GRADIENT"] = self.entry == "fused"
                if self.entry == "forward":
                    constexprs |= {"scale": None, "grads": None}
        options = kernels._options(shape, one_load is not None)
        signature = {
            "logits": f"*{self.dtype}",
            "grads": f"*{self.dtype}",
            "targets": "*i64",
            "scale": "*fp32",
            "losses": "*fp32",
            "lses": "*fp32",
            "grad_losses": "*fp32",
            "logits_stride": "i64",
            "grad_losses_stride": "i32",
            "ignore_index": "i32",
            "label_smoothing": "fp32",
            "z_loss": "fp32",
            "softcap": "fp32",
        }
        return compile_for(
            kernel,
            signature,
            constexprs | {"BLOCK": shape.block},
            target,
            element_size=size,
            num_warps=options["num_warps"],
            max_registers=options.get("maxnreg"),
            aligned=self.aligned,
        )


VARIANTS = [
    Variant("fused", "bf16", 32000),
    Variant("fused", "bf16", 50304),
    Variant("fused", "bf16", 65536),
    Variant("fused", "bf16", 128256),
    Variant("fused", "fp32", 32000),
    Variant("fused", "fp32", 50304),
    Variant("fused", "bf16", 32000, softcapped=True),
    Variant("fused", "bf16", 50257, aligned=False),
    Variant("forward", "bf16", 50304),
    Variant("backward", "bf16", 50304),
]

LIGER_ROWS = [("bf16", 50304), ("bf16", 128256)]


def count_variant(variant: Variant) -> float:
    """Bytes per logit of one interpreted launch over rows that all have a target, in units of the element size."""
    import torch

    from fasttrain.kernels import cross_entropy as kernels
    from tests.triton_gate import count_bytes

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[variant.dtype]
    logits = torch.randn(ROWS_COUNTED, variant.num_classes).to(dtype)
    targets = torch.randint(0, variant.num_classes, (ROWS_COUNTED,))
    terms = {
        "ignore_index": -100,
        "label_smoothing": 0.1 * variant.smoothed,
        "z_loss": 1e-4 * variant.z_loss,
        "softcap": 30.0 * variant.softcapped,
    }
    lse = torch.logsumexp(logits.float(), 1)
    with count_bytes() as traffic:
        if variant.entry == "fused":
            kernels.cross_entropy_fused(logits, targets, torch.ones(()), **terms)
        elif variant.entry == "forward":
            kernels.cross_entropy_forward(logits, targets, **terms)
        else:
            kernels.cross_entropy_backward(torch.ones(ROWS_COUNTED), logits, targets, lse, **terms)
    return traffic.total / logits.numel() / logits.element_size()


def count_liger(dtype: str, num_classes: int) -> float:
    """The same count for liger-kernel's forward and backward."""
    import torch
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # type: ignore[import-untyped]

    from tests.triton_gate import count_bytes

    logits = (
        torch.randn(ROWS_COUNTED, num_classes)
        .to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
        .requires_grad_()
    )
    targets = torch.randint(0, num_classes, (ROWS_COUNTED,))
    with count_bytes() as traffic:
        output = LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "mean", None, False)
        (output[0] if isinstance(output, tuple) else output).backward()
    return traffic.total / logits.numel() / logits.element_size()


def compile_liger(dtype: str, num_classes: int, target: str) -> Compiled:
    """Liger's kernel in the shape that its launcher picks: a block of up to 32768 and 32 warps (16 on AMD)."""
    import triton
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel as kernel

    pointers = {"X_ptr": f"*{dtype}", "Y_ptr": "*i64", "loss_ptr": f"*{dtype}"}
    floats = ("n_non_ignore", "sum_non_ignore_weight", "weight_sum", "softcap")
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in pointers:
            signature[name] = pointers[name]
        elif name.endswith("_ptr"):
            constexprs[name] = None
        elif name.isupper():
            constexprs[name] = name == "HAS_GRADIENTS"
        elif name not in ("reduction", "lse_square_scale", "label_smoothing"):
            signature[name] = "fp32" if name in floats else "i32"
    block = min(32768, triton.next_power_of_2(num_classes))
    constexprs |= {"BLOCK_SIZE": block, "reduction": "mean", "lse_square_scale": 0.0, "label_smoothing": 0.0}
    return compile_for(kernel, signature, constexprs, target, element_size=ELEMENT_SIZES[dtype], num_warps=32)


def _row(name: str, target: str, traffic: float, compiled: Compiled, dtype: str, num_classes: int) -> str:
    elements = ROWS_MODELLED * num_classes
    seconds, bound = modelled_time(traffic * ELEMENT_SIZES[dtype] * elements, elements, compiled)
    model = f"{seconds * 1e3:.2f} ms ({bound})" if target == "sm_90" else ""
    return (
        f"| {name} | {target} | {traffic:.3f} | {compiled.registers} | {compiled.spills} | {compiled.wide_share:.0%} | "
        f"{compiled.instructions_per_element:.1f} | {compiled.occupancy} | {model} |"
    )


def table(targets: list[str]) -> str:
    """The whole table in Markdown. The byte counts come from a second process, in which Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.triton_gate_table", "--count"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    lines = [
        f"Passes: bytes moved / bytes of the logits, counted. Time: a model of {ROWS_MODELLED} rows on an H100.",
        "",
        "| kernel | target | passes | registers | spills | 128-bit | instructions/logit | programs/SM | H100 model |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        for target in targets:
            lines.append(
                _row(
                    variant.name,
                    target,
                    counts[variant.name],
                    variant.compile(target),
                    variant.dtype,
                    variant.num_classes,
                )
            )
    if importlib.util.find_spec("liger_kernel"):
        for dtype, num_classes in LIGER_ROWS:
            for target in targets:
                lines.append(
                    _row(
                        f"Liger {dtype} {num_classes}",
                        target,
                        counts[f"Liger {dtype} {num_classes}"],
                        compile_liger(dtype, num_classes, target),
                        dtype,
                        num_classes,
                    )
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--targets", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        assert INTERPRETED
        counts = {variant.name: count_variant(variant) for variant in VARIANTS}
        if importlib.util.find_spec("liger_kernel"):
            counts |= {f"Liger {dtype} {size}": count_liger(dtype, size) for dtype, size in LIGER_ROWS}
        print(json.dumps(counts))
        return
    text = table(arguments.targets)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
