"""What the Triton kernels cost on GPUs that are not here: `python -m bench.triton_gate_table [--out FILE]`.

Per kernel and target: bytes counted in the interpreter, registers, spills, share of 128-bit accesses, instructions per
unit and occupancy read from machine code, and the time on an H100 that a model derives from them. Nothing in the table
was timed. With `liger-kernel` installed its kernels go through the same counters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.gate_subject import Subject
from bench.gate_subjects import ours, peers
from tests.triton_gate import DEVICES, INTERPRETED, modelled_time

HEAD = """# Triton kernels without a GPU

Made by `make gate`. Nothing here was timed. Bytes are counted in Triton's interpreter, of a unit (a logit, a parameter;
for `combine` a row's tile of classes), also as a multiple of what cannot be avoided. Registers to programs per
multiprocessor are read from machine code; instructions are a unit's, rare branches counted like any other. The last
column is a model of an H100: bytes / bandwidth, instructions / issue rate, matrix operations / peak, whichever is
longest, for 8192 rows of logits (hidden size 768), 10^9 parameters, 16 rows of 128256 logits to sample from.

| kernel | target | bytes | registers | spills | 128-bit | instructions | programs | H100 model |
|---|---|---|---|---|---|---|---|---|
"""


def lines_of(subject: Subject, num_bytes: float, targets: list[str]) -> list[str]:
    lines = []
    for target in targets:
        code = subject.compile(target, True)
        model = ""
        if target == "sm_90" and subject.modelled:
            seconds, bound = modelled_time(
                num_bytes * subject.modelled,
                subject.modelled,
                code,
                from_cache=subject.from_cache,
                operations=subject.operations * subject.modelled,
            )
            model = f"{seconds * 1e3:.3f} ms ({bound})"
        moved = f"{num_bytes:.2f}" + (f" = {num_bytes / subject.minimum:.2f}x" if subject.minimum else "")
        per_unit = (
            subject.modelled and not subject.operations and target.startswith("sm_")
        )  # what the issue rate bounds
        instructions = f"{code.instructions_per_element:.1f}" if per_unit else ""
        lines.append(
            f"| {subject.name} | {target} | {moved} | {code.registers} | {code.spills} | {code.wide_share:.0%} | "
            f"{instructions} | {code.occupancy} | {model} |"
        )
    return lines


def table(targets: list[str]) -> str:
    """The whole table in Markdown. The byte counts come from a second process, in which Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.triton_gate_table", "--count"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    lines = [line for subject in [*ours(), *peers()] for line in lines_of(subject, counts[subject.name], targets)]
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--targets", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        assert INTERPRETED
        print(json.dumps({subject.name: subject.bytes_per_unit() for subject in [*ours(), *peers()]}))
        return
    text = table(arguments.targets)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
