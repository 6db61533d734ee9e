"""How every benchmark here measures: check first, then time all contenders in turn, round after round.

Machines are shared and their speed drifts by a factor of two within seconds, so contenders are interleaved and only
ratios within one run mean anything. The floor is itself a contender: the memory traffic that cannot be avoided, done
by PyTorch's own copy in the same rounds. pytest-benchmark times ours; its `setup` hook runs and times the others.
"""

from __future__ import annotations

import csv
import datetime
import gc
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a results table. Times are milliseconds; `peak_mib` is resident memory above the start."""

    benchmark: str
    size: str
    contender: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    times_ours: float  # p50 over ours
    peak_mib: float
    curve: str = ""
    """Rows of one curve differ only in `amount`: what the plots draw time against. Empty: in no plot."""
    axis: str = ""
    amount: float = 0.0


TABLE_FIELDS = tuple(Row.__dataclass_fields__)[:-3]
ROWS: list[Row] = []


def compare(
    benchmark: Any,
    name: str,
    size: str,
    ours: Callable[[], Any],
    others: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    prepare: Callable[[], Any] = lambda: None,
    growth: tuple[str, str, float] = ("", "", 0.0),
    warm: int = 0,
    rotate: bool = False,
) -> dict[str, Row]:
    """Times `ours` and the `others` in `rounds` interleaved rounds and records a row for each.

    `growth` is (curve, axis, amount): where the rows stand in a plot of time against size.
    `prepare` runs before every measured call, outside its time, and the call itself `warm` times: where a call takes
    microseconds, those before it decide what is in the caches and whether the threads are awake. With `rotate` the
    others take turns in being first: where one leaves something to the next (a disk at work), each suffers from each.
    Returns the rows by name.
    """
    times: dict[str, list[float]] = {key: [] for key in (*others, "fasttrain")}
    turns = itertools.count()

    def timed(key: str, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        times[key].append((time.perf_counter() - start) * 1e3)

    def run_the_others() -> None:
        first = next(turns) % len(others) if rotate else 0
        for key, call in (*list(others.items())[first:], *list(others.items())[:first]):
            for _ in range(warm):
                call()
            prepare()
            timed(key, call)
        for _ in range(warm):
            ours()
        prepare()

    for call in (*others.values(), ours):  # warm up, compile
        prepare()
        call()
    benchmark.group = f"{name} {size}"
    benchmark.pedantic(timed, args=("fasttrain", ours), setup=run_the_others, rounds=rounds, iterations=1)
    ours_median = statistics.median(times["fasttrain"])
    rows = {}
    for key, values in times.items():
        p20, p50, p80 = percentiles(values)
        peak = peak_resident_mib(ours if key == "fasttrain" else others[key], prepare)
        rows[key] = Row(name, size, key, p20, p50, p80, p50 / ours_median, peak, *growth)
    benchmark.extra_info.update({key: round(row.p50_ms, 3) for key, row in rows.items()})
    ROWS.extend(rows.values())
    return rows


def percentiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def peak_resident_mib(call: Callable[[], Any], prepare: Callable[[], Any]) -> float:
    """Memory at the peak of one call above its start: the GPU's where there is one, else resident (Linux; NaN
    elsewhere)."""
    if torch.cuda.is_available():
        prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    try:
        prepare()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kib("VmRSS")
        call()
        return (status_kib("VmHWM") - before) / 1024
    except OSError:
        return float("nan")


def status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def environment() -> dict[str, str]:
    """What a reader needs to repeat a figure."""
    lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    told = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    cpu = told.get("model name", platform.processor())
    if "cpu family" in told:  # a virtual machine names no generation
        cpu += f" (family {told['cpu family']}, model {told['model']})"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout.strip()
    from fasttrain.backend import instruction_set

    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "isa": instruction_set(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def markdown(rows: list[Row]) -> str:
    """One table per benchmark; the contender that is fasttrain in bold."""
    lines = []
    for name in dict.fromkeys(row.benchmark for row in rows):
        lines += [
            "",
            f"### {name}",
            "",
            "| size | contender | p20 / p50 / p80 ms | x fasttrain | peak MiB |",
            "|---|---|---|---|---|",
        ]
        for row in (row for row in rows if row.benchmark == name):
            label = f"**{row.contender}**" if row.contender == "fasttrain" else row.contender
            digits = 2 if row.p50_ms >= 1 else 3
            times = " / ".join(f"{ms:.{digits}f}" for ms in (row.p20_ms, row.p50_ms, row.p80_ms))
            lines.append(f"| {row.size} | {label} | {times} | {row.times_ours:.2f} | {row.peak_mib:.0f} |")
    return "\n".join(lines)


def write_results(rows: list[Row], title: str) -> Path:
    """Rewrites `<title>.md` with this run's tables and appends its rows to `<title>.csv`."""
    RESULTS.mkdir(exist_ok=True)
    facts = environment()
    head = f"# {title}\n\nMade by `make bench`. " + "; ".join(f"{key}: {value}" for key, value in facts.items())
    (RESULTS / f"{title}.md").write_text(head + "\n" + markdown(rows) + "\n")
    path = RESULTS / f"{title}.csv"
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*facts, *TABLE_FIELDS], extrasaction="ignore")
        if fresh:
            writer.writeheader()
        writer.writerows({**facts, **asdict(row)} for row in rows)
    return path


def results_title() -> str:
    """Names the results file after the machine: one file for each kind of GPU or CPU."""
    facts = environment()
    device = facts["gpu"] if facts["gpu"] != "none" else f"cpu-{facts['isa']}"
    return "-".join(device.lower().replace("/", " ").split())


if __name__ == "__main__":
    print(results_title())
