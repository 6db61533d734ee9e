"""A kernel as the Triton gate sees it: how to compile it, how to run it once, and what it may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.triton_gate import H100, Compiled, Traffic, count_bytes


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


def counted(call: Callable[[], None]) -> Callable[[], Traffic]:
    def run() -> Traffic:
        with count_bytes() as traffic:
            call()
        return traffic

    return run
