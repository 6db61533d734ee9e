"""What compiled code this process can run, found out once: the extension and Triton, or the reason why not.

Nothing falls back silently. `CPP_PROBLEM` and `TRITON_PROBLEM` are empty where the implementation is usable and
otherwise say what is missing and how to get it; `ops._dispatch` shows them to whoever asks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch  # noqa: F401  (the extension links against torch's libraries: they must be in the process first)

_BUILD_HINT = "build it with `pip install --no-build-isolation -e .` where torch, ninja and a C++ compiler are present"


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("fasttrain._C")
    except ModuleNotFoundError:
        return None, f"the compiled extension is not installed; {_BUILD_HINT}"
    except ImportError as error:
        return None, f"the compiled extension does not load ({error}); {_BUILD_HINT}"
    isa = os.environ.get("FASTTRAIN_ISA")
    if isa:
        try:
            module.set_isa(isa)
        except ValueError as error:
            known = ", ".join(module.available_isas())
            raise ValueError(f"FASTTRAIN_ISA is {isa!r}: {error}; this CPU has {known}") from None
    return module, ""


_EXTENSION, CPP_PROBLEM = _load_extension()

TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton kernels run in Python on CPU tensors: how they are tested without a GPU."""

TRITON_PROBLEM = "" if importlib.util.find_spec("triton") else "triton is not installed; `pip install triton`"


def extension() -> ModuleType | None:
    """The module `fasttrain._C`, or None; `CPP_PROBLEM` says why."""
    return _EXTENSION


def instruction_set() -> str:
    """The CPU instruction set of the compiled kernels: scalar, avx2, avx512, or "none" without the extension."""
    return "none" if _EXTENSION is None else str(_EXTENSION.isa())
