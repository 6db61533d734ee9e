"""What a Triton kernel costs and whether it is safe, found out without a GPU.

Two instruments, one per process, because Triton chooses interpreter or compiler when it is imported:
`count_bytes` runs under TRITON_INTERPRET=1 and watches every memory access of the interpreted kernels (bytes per
argument, accesses out of bounds, races between programs); `compile_for` compiles ahead of time for a GPU that is not
there and reads the machine code (registers, spills, access widths, instructions). `run_interpreted` starts the
former from a test of the latter's process. `modelled_time` turns counts into a bound; it is a model, not a measurement.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(test_file: str | Path, *arguments: str, timeout: float = 280.0) -> None:
    """Runs a file of tests with pytest in a process where Triton interprets; fails with that process's output."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(test_file), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise AssertionError(
            f"{' '.join(command)} under TRITON_INTERPRET=1 exited with {done.returncode}:\n"
            f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
        )


# ---- the interpreter: bytes, bounds, races -------------------------------------------------------------------------


class MemoryFault(Exception):
    """An interpreted kernel touched memory outside its arguments, or two of its programs raced."""


@dataclass
class Traffic:
    """Bytes that kernels moved, by the name of the kernel argument they belong to."""

    loaded: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    by_kernel: Counter[str] = field(default_factory=Counter)
    launches: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())


class _Argument:
    """One tensor argument of the running launch, and which program touched which of its elements."""

    NOBODY, MANY = -1, -2

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.itemsize = name, tensor.element_size()
        self.start = tensor.data_ptr()
        self.extent = (
            1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        )
        self.dims = sorted(
            ((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if stride > 0), reverse=True
        )
        self._touched: dict[str, np.ndarray] = {}

    def holds(self, address: int) -> bool:
        return self.start <= address < self.start + self.extent * self.itemsize

    def offsets(self, addresses: np.ndarray) -> np.ndarray | None:
        """Element offsets of the addresses, or None if one of them is not an element of the tensor."""
        offsets, misaligned = np.divmod(addresses.astype(np.int64) - self.start, self.itemsize)
        rest, inside = offsets, misaligned == 0
        for stride, size in self.dims:  # gaps between the rows of a strided view are out of bounds too
            index, rest = np.divmod(rest, stride)
            inside &= (index >= 0) & (index < size)
        return offsets if bool((inside & (rest == 0)).all()) else None

    def touch(self, how: str, offsets: np.ndarray, program: int) -> None:
        """Notes a read or a write and faults if another program's access to the same element makes it a race."""
        conflicting = ("writers", "readers") if how == "writers" else ("writers",)
        for kind in conflicting:
            previous = self._touched[kind][offsets] if kind in self._touched else np.array([self.NOBODY])
            other = (previous != self.NOBODY) & (previous != program)
            if other.any():
                raise MemoryFault(
                    f"race on {self.name}: program {program} {how[:-3]}es what program {previous[other][0]} "
                    f"touched in the same launch ({kind})".replace("reades", "reads")
                )
        if how not in self._touched:
            if self.extent > 1 << 28:  # a huge-stride view: tracking it would take gigabytes
                return
            self._touched[how] = np.full(self.extent, self.NOBODY, np.int32)
        marks = self._touched[how]
        marks[offsets] = np.where((marks[offsets] == self.NOBODY) | (marks[offsets] == program), program, self.MANY)


@contextlib.contextmanager
def count_bytes(reachable: Mapping[str, Sequence[torch.Tensor]] = {}) -> Iterator[Traffic]:
    """Counts the bytes of every interpreted kernel launched inside, and checks each access.

    `reachable` names tensors that a kernel finds through addresses in a table and not among its arguments.

    Raises (from the launch, wrapped by Triton in InterpreterError):
        MemoryFault: an access outside every tensor argument, or to the gap between two rows of a strided one; an
            element written by one program and touched by another in one launch (atomics excepted).
    """
    import triton.runtime.interpreter as interpreter

    assert INTERPRETED, "count_bytes needs a process started with TRITON_INTERPRET=1"
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    traffic = Traffic()
    arguments: list[_Argument] = []
    original = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    }
    original_init, original_restore = executor._init_args_hst, executor._restore_args_dev

    def init_arguments(self: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        hosted = original_init(self, args, kwargs)
        named = {**dict(zip(self.arg_names, hosted[0])), **hosted[1]}
        arguments[:] = [_Argument(name, value) for name, value in named.items() if isinstance(value, torch.Tensor)]
        arguments.extend(_Argument(name, tensor) for name, tensors in reachable.items() for tensor in tensors)
        traffic.launches.append(self.fn.__name__)
        return hosted

    def restore_arguments(self: Any, args: Sequence[Any], *rest: Any) -> None:
        """CPU tensors were used in place; copying each storage onto itself would only cost time."""

    def observe(self: Any, pointers: Any, mask: Any, effects: Sequence[Counter[str]], tracked: str | None) -> None:
        active = np.broadcast_to(np.asarray(getattr(mask, "data", mask)), pointers.data.shape).astype(bool)
        addresses = np.asarray(pointers.data)[active].ravel()
        if addresses.size == 0:
            return
        owner = next((argument for argument in arguments if argument.holds(int(addresses[0]))), None)
        offsets = owner.offsets(addresses) if owner else None
        if owner is None or offsets is None:
            raise MemoryFault(
                f"program {self.grid_idx} accesses memory outside "
                f"{owner.name if owner else 'every argument'} of {traffic.launches[-1]}"
            )
        for counter in effects:
            counter[owner.name] += addresses.size * owner.itemsize
            traffic.by_kernel[traffic.launches[-1]] += addresses.size * owner.itemsize
        if tracked:
            x, y, z = self.grid_idx
            owner.touch(tracked, offsets, x + self.grid_dim[0] * (y + self.grid_dim[1] * z))

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        observe(self, pointers, mask, [traffic.loaded], "readers")
        return original["create_masked_load"](self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        observe(self, pointers, mask, [traffic.stored], "writers")
        return original["create_masked_store"](self, pointers, value, mask, *rest, **named)

    def atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        observe(self, pointer, mask, [traffic.loaded, traffic.stored], None)
        return original["create_atomic_rmw"](self, operation, pointer, value, mask, *rest)

    def atomic_cas(self: Any, pointer: Any, *rest: Any) -> Any:
        observe(self, pointer, np.True_, [traffic.loaded, traffic.stored], None)
        return original["create_atomic_cas"](self, pointer, *rest)

    replaced = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic_rmw,
        "create_atomic_cas": atomic_cas,
    }
    try:
        for name, function in replaced.items():
            setattr(builder, name, function)
        executor._init_args_hst, executor._restore_args_dev = init_arguments, restore_arguments
        yield traffic
    finally:
        for name, function in original.items():
            setattr(builder, name, function)
        executor._init_args_hst, executor._restore_args_dev = original_init, original_restore


# ---- the compiler: registers, spills, widths, instructions ---------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What bounds the programs (CTAs) that one multiprocessor holds at a time."""

    backend: str
    arch: int | str
    warp_size: int
    registers: int  # 32-bit, per multiprocessor
    register_granule: int  # allocated per thread in steps of this many
    shared_bytes: int
    threads: int


DEVICES = {
    "sm_80": Device("cuda", 80, 32, 65536, 8, 164 << 10, 2048),
    "sm_90": Device("cuda", 90, 32, 65536, 8, 228 << 10, 2048),
    "sm_100": Device("cuda", 100, 32, 65536, 8, 228 << 10, 2048),
    "gfx942": Device("hip", "gfx942", 64, 4 * 512 * 64, 8, 64 << 10, 2048),
}


@dataclass(frozen=True)
class Compiled:
    """The machine code of one kernel variant, in numbers."""

    target: str
    registers: int
    """Per thread."""
    spills: int
    """Instructions that move a register to or from local memory."""
    local_bytes: int
    """Local (scratch) memory per thread."""
    shared_bytes: int
    wide_share: float
    """Share of the element-wise global accesses that move at least 128 bits; those of scalars do not count."""
    instructions_per_element: float
    """Machine instructions per element loaded: over the loops that load, or over the whole kernel if it has none."""
    special_per_element: float
    """Of those, the ones of the special-function unit (exp2, reciprocal, log2)."""
    occupancy: int
    """Programs that fit on one multiprocessor at a time."""
    num_float_atomics: int


_NVIDIA_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
_NVIDIA_WIDTHS = ((".256", 32), (".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1))
_AMD_WIDTHS = (
    ("dwordx4", 16),
    ("dwordx3", 12),
    ("dwordx2", 8),
    ("dword", 4),
    ("short", 2),
    ("ushort", 2),
    ("byte", 1),
    ("ubyte", 1),
)


@dataclass(frozen=True)
class _Instruction:
    name: str
    label: str | None
    """Of the block that starts here."""
    jumps_to: str | None
    load_bytes: int = 0
    store_bytes: int = 0


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    *,
    element_size: int,
    num_warps: int,
    aligned: bool = True,
    max_registers: int | None = None,
    fp_fusion: bool = True,
) -> Compiled:
    """Compiles a @triton.jit function for a target of `DEVICES` and reads what came out.

    Args:
        signature: argument name -> Triton type ("*bf16", "i64", "fp32"), for the arguments that are not constexpr.
        constexprs: argument name -> value; None for an absent pointer.
        element_size: bytes of an element of the tensor whose elements count.
        num_warps: of 32 threads; halved for a target with warps of 64, so that the threads stay the same.
        max_registers: a limit per thread, for NVIDIA targets.
        fp_fusion: whether a multiplication and an addition may become one, with one rounding.
        aligned: pointers are 16-byte aligned and integers multiples of 16, as for a contiguous tensor of good width.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert not INTERPRETED, "compile_for needs a process without TRITON_INTERPRET"
    device = DEVICES[target]
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (index,): divisible
        for index, name in enumerate(kernel.arg_names)
        if aligned and (types[name].startswith("*") or types[name] in ("i32", "i64"))
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constexprs.items()}
    source = ASTSource(kernel, types, values, attributes)
    warps = max(1, num_warps * 32 // device.warp_size)
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": fp_fusion}
    if max_registers and device.backend == "cuda":
        options["maxnreg"] = max_registers
    compiled = triton.compile(source, target=GPUTarget(device.backend, device.arch, device.warp_size), options=options)
    if device.backend == "cuda":
        registers, local_bytes, instructions = _read_cubin(compiled.asm["cubin"])
    else:
        registers, local_bytes, instructions = _read_amdgcn(compiled.asm["amdgcn"])
    spills = sum(i.name.startswith(("LDL", "STL", "scratch_")) for i in instructions)
    num_scalar = len(re.findall(r"tt\.(?:load|store) .* : !tt\.ptr", compiled.asm["ttgir"]))
    widths = [width for i in instructions for width in (i.load_bytes, i.store_bytes) if width]
    num_wide = sum(width >= 16 for width in widths)
    per_element, special = _per_element(instructions, element_size)
    return Compiled(
        target,
        registers,
        spills,
        local_bytes,
        compiled.metadata.shared,
        num_wide / max(num_wide, len(widths) - num_scalar, 1),
        per_element,
        special,
        occupancy(device, registers, warps * device.warp_size, compiled.metadata.shared),
        sum(bool(re.match(r"(RED|ATOMG?)\b.*\.F(16|32|64)|global_atomic_.*f(16|32|64)", i.name)) for i in instructions),
    )


def occupancy(device: Device, registers: int, threads: int, shared_bytes: int) -> int:
    """Programs per multiprocessor, from the three resources that limit it."""
    allocated = -(-max(registers, 1) // device.register_granule) * device.register_granule
    by_shared = (
        device.shared_bytes // (shared_bytes + 1024)
        if device.backend == "cuda"
        else (device.shared_bytes // shared_bytes if shared_bytes else 32)
    )
    return min(device.registers // (allocated * threads), by_shared, device.threads // threads, 32)


def _per_element(instructions: Sequence[_Instruction], element_size: int) -> tuple[float, float]:
    starts = {instruction.label: index for index, instruction in enumerate(instructions) if instruction.label}
    loops = [
        (starts[i.jumps_to], index)
        for index, i in enumerate(instructions)
        if i.jumps_to in starts and starts[i.jumps_to] < index
    ]
    innermost = [
        loop
        for loop in loops
        if not any(loop[0] <= other[0] and other[1] <= loop[1] and other != loop for other in loops)
    ]
    bodies = [instructions[first : last + 1] for first, last in innermost]
    bodies = [body for body in bodies if any(i.load_bytes for i in body)] or [instructions]
    per_element = special = 0.0
    for body in bodies:
        # A kernel loads a few scalars too (a target, a scale): the width that moves most bytes is the elements'.
        moved = Counter[int]()
        for instruction in body:
            moved[instruction.load_bytes] += instruction.load_bytes
        elements = max(moved.values()) / element_size
        per_element += sum(not i.name.startswith(("NOP", "s_nop")) for i in body) / elements
        special += sum(bool(re.match(r"MUFU|v_(exp|log|rcp|sqrt|rsq)_", i.name)) for i in body) / elements
    return per_element, special


def _read_cubin(cubin: bytes) -> tuple[int, int, list[_Instruction]]:
    usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", cubin)
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[union-attr]
    instructions, label = [], None
    for line in _nvidia_tool("nvdisasm", "-c", cubin).splitlines():
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            label = found.group(1)
        elif found := _NVIDIA_LINE.search(line):
            name, operands = found.groups()
            width = next((size for suffix, size in _NVIDIA_WIDTHS if suffix in name), 4)
            jump = re.search(r"`\((\.L_x_\d+)\)", operands) if name.startswith("BRA") else None
            instructions.append(
                _Instruction(
                    name,
                    label,
                    jump.group(1) if jump else None,
                    width * name.startswith("LDG"),
                    width * name.startswith("STG"),
                )
            )
            label = None
    while instructions and (
        instructions[-1].name == "NOP" or instructions[-1].jumps_to == instructions[-1].label is not None
    ):
        instructions.pop()  # padding after the end: a jump to itself and NOPs
    return registers, stack + local, instructions


def _nvidia_tool(tool: str, option: str, cubin: bytes) -> str:
    import tempfile

    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(path), option, file.name], check=True, capture_output=True, text=True).stdout


def _read_amdgcn(assembly: str) -> tuple[int, int, list[_Instruction]]:
    registers = max(int(number) for number in re.findall(r"\.vgpr_count:\s+(\d+)", assembly))
    scratch = int(re.search(r"ScratchSize: (\d+)", assembly).group(1))  # type: ignore[union-attr]
    instructions, label = [], None
    for line in assembly.splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            label = found.group(1)
        elif found := re.match(r"\t([svdbg]\w*_\w+)\b(.*)", line):
            name, operands = found.groups()
            width = next((size for suffix, size in _AMD_WIDTHS if name.endswith(suffix) or f"_{suffix}_" in name), 4)
            jump = re.search(r"(\.LBB\w+)", operands) if "branch" in name else None
            instructions.append(
                _Instruction(
                    name,
                    label,
                    jump.group(1) if jump else None,
                    width * bool(re.match(r"(global|buffer|flat)_load", name)),
                    width * bool(re.match(r"(global|buffer|flat)_store", name)),
                )
            )
            label = None
    return registers, scratch, instructions


# ---- the model -----------------------------------------------------------------------------------------------------

H100 = {"memory": 3.35e12, "cache": 5.5e12, "issue": 132 * 128 * 1.7e9, "special": 132 * 16 * 1.7e9, "matrix": 989e12}
"""Bytes from memory and from the L2 cache, thread-instructions, special-function results (132 multiprocessors at 1.7
GHz) and dense 16-bit operations per second."""


@functools.lru_cache
def _binding(seconds: tuple[tuple[str, float], ...]) -> tuple[float, str]:
    return max((value, name) for name, value in seconds)


def modelled_time(
    num_bytes: float, num_elements: float, compiled: Compiled, *, from_cache: bool = False, operations: float = 0.0
) -> tuple[float, str]:
    """A lower bound in seconds on an H100 and what sets it: a model, no measurement.

    It assumes that all overlap perfectly and that enough bytes are in flight. `from_cache`: the bytes come from L2.
    """
    return _binding(
        (
            ("cache" if from_cache else "memory", num_bytes / H100["cache" if from_cache else "memory"]),
            ("matrix", operations / H100["matrix"]),
            ("issue", num_elements * compiled.instructions_per_element / H100["issue"]),
            ("special", num_elements * compiled.special_per_element / H100["special"]),
        )
    )
