"""The cross-entropy kernels and Liger's, as the Triton gate compiles and counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.triton_gate import Compiled, compile_for

ELEMENT_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
ROWS_COUNTED = 4


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
            "scale_stride": "i32",
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


def run_variant(variant: Variant) -> None:
    """One call over rows that all have a target."""
    import torch

    from fasttrain.kernels import cross_entropy as kernels

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
    if variant.entry == "fused":
        kernels.cross_entropy_fused(logits, targets, torch.ones(()), **terms)
    elif variant.entry == "forward":
        kernels.cross_entropy_forward(logits, targets, **terms)
    else:
        kernels.cross_entropy_backward(torch.ones(ROWS_COUNTED), logits, targets, lse, **terms)


def run_liger(dtype: str, num_classes: int) -> None:
    """The same rows through liger-kernel's forward and backward."""
    import torch
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # type: ignore[import-untyped]

    logits = (
        torch.randn(ROWS_COUNTED, num_classes)
        .to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
        .requires_grad_()
    )
    targets = torch.randint(0, num_classes, (ROWS_COUNTED,))
    output = LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "mean", None, False)
    (output[0] if isinstance(output, tuple) else output).backward()


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
