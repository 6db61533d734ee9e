"""Builds the one extension, fasttrain._C; everything else about the package stands in pyproject.toml.

FASTTRAIN_BUILD=auto (default) builds it where torch, ninja and a C++ compiler are present and otherwise installs the
pure-Python package; `require` fails with the compiler's message; `off` does not try.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("FASTTRAIN_BUILD", "auto")
if MODE not in ("auto", "require", "off"):
    raise SystemExit(f"FASTTRAIN_BUILD is {MODE!r}; it must be auto, require or off")

ROOT = Path(__file__).parent
SANITIZE = os.environ.get("FASTTRAIN_SANITIZE") == "1"  # for `make sanitize`: slow code that stops at a fault
NATIVE = os.environ.get("FASTTRAIN_NATIVE") == "1"  # tune for this very CPU; the result may not run on another


def missing() -> str:
    """What stands in the way of building, or an empty string."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable (install it first and pass --no-build-isolation)"
    if shutil.which("ninja") is None:
        try:
            import ninja
        except ImportError:
            return "ninja is not installed"
        os.environ["PATH"] += os.pathsep + str(ninja.BIN_DIR)
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return f"no C++ compiler ({os.environ.get('CXX', 'c++')!r} is not on PATH; set CXX)"
    return ""


def extension_arguments() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # torch's ninja path raises RuntimeError, setuptools' own a dozen kinds
                if MODE == "require":
                    raise
                self.extensions = []
                announce(f"the compiler failed: {str(error).splitlines()[0]}")

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h"))
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if SANITIZE else []
    # -Og takes half as long to compile as -O1 and makes all its checks; -O0 would silently drop those of object-size.
    # -Wuninitialized finds, without -O3, only GCC 12's own AVX-512 intrinsics.
    checked = ["-Og", "-g1", *sanitizers, "-Wno-uninitialized"]
    flags = [
        *(checked if SANITIZE else ["-O3", "-g0"]),
        "-std=c++20",
        "-fno-math-errno",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-maybe-uninitialized",
    ]
    link_flags = [*sanitizers, *([] if SANITIZE else ["-Wl,-s"]), "-Wl,--as-needed"]
    extension = CppExtension(
        name="fasttrain._C",
        sources=sources,
        depends=headers,
        # Target 2.10: one build serves every later torch. BuildExtension reads MAX_JOBS.
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            ("TORCH_STABLE_ONLY", None),
            *([("FASTTRAIN_SANITIZED", None)] if SANITIZE else []),  # csrc/inlining.h
        ],
        extra_compile_args={"cxx": flags + (["-march=native"] if NATIVE else [])},
        extra_link_args=link_flags if sys.platform == "linux" else [],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def announce(reason: str) -> None:
    print(
        f"fasttrain: installing WITHOUT the compiled extension: {reason}. FASTTRAIN_BUILD=require makes this an error.",
        file=sys.stderr,
    )


reason = "FASTTRAIN_BUILD=off" if MODE == "off" else missing()
if reason and MODE == "require":
    raise SystemExit(f"fasttrain: FASTTRAIN_BUILD=require, but {reason}")
if reason:
    announce(reason)
setup(**({} if reason else extension_arguments()))
