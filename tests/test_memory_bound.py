"""Memory kept for speed goes back when the machine or the container runs short of it, and only then."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import tiny_trainer

from fasttrain.memory_bound import MemoryBound
from fasttrain.optimizations import tune_cpu_memory
from fasttrain.utils import MemoryRoom, memory_room, process_room

MEMINFO = "MemTotal:       1000 kB\nMemFree:          10 kB\nMemAvailable:    600 kB\n"

MEASURE = """
import json, sys, torch
from torch import nn
from fasttrain import memory_bound
from fasttrain.optimizations import tune_cpu_memory
from fasttrain.utils import MemoryRoom

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])

class State:
    model = nn.Linear(1, 1)

switch = tune_cpu_memory()
dead, alive = [], []
for _ in range(16):  # between live tensors, so that trimming the heap's end alone gives nothing back
    dead.append(torch.ones(4_000_000)); alive.append(torch.ones(4096))
del dead
bound, held, lost = memory_bound.MemoryBound(), resident(), []
for available in (900, 100):
    memory_bound.memory_room = lambda: MemoryRoom(available, 1000)
    bound.on_log(State, {})
    lost.append(held - resident())
print(json.dumps({"on": switch.on, "lost": lost, "times": bound.times}), file=sys.stderr)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the policy is glibc's")
def test_freed_memory_goes_back_only_when_memory_is_short() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    seen = json.loads(done.stderr.splitlines()[-1])
    if seen["on"]:
        with_room, short = seen["lost"]
        assert with_room < 10_000 and short > 200_000  # KiB, of 250,000 freed
        assert seen["times"] == 1 and done.stdout.count("memory is short") == 1


def test_every_run_is_watched_and_says_it_once(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fasttrain.memory_bound.memory_room", lambda: MemoryRoom(1 << 20, 1 << 30))
    monkeypatch.setattr("fasttrain.memory_bound.give_back", lambda: True)
    tiny_trainer(log_every_steps=1).train()
    assert capsys.readouterr().out.count("memory is short (1.00 MiB of 1.00 GiB available)") == 1


def test_without_glibc_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.memory_bound.memory_room", lambda: MemoryRoom(1, 1 << 30))
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    bound = MemoryBound()
    tiny_trainer(log_every_steps=1, callbacks=[bound]).train()
    assert bound.times == 0


def test_room_is_that_of_the_container_where_its_limit_is_nearer(tmp_path: Path) -> None:
    proc, group = tmp_path / "meminfo", tmp_path / "group"
    assert memory_room(proc, group) is None
    proc.write_text(MEMINFO)
    assert memory_room(proc, group) == MemoryRoom(600 * 1024, 1000 * 1024)
    group.mkdir()
    (group / "memory.stat").write_text("anon 300\ninactive_file 100\n")
    (group / "memory.current").write_text("5000")
    machine = MemoryRoom(600 * 1024, 1000 * 1024)
    for limit, room in (("6000", MemoryRoom(6000 - 4900, 6000)), ("4000", MemoryRoom(0, 4000)), ("max", machine),
                        ("999999999", machine)):
        (group / "memory.max").write_text(limit)
        assert memory_room(proc, group) == room


LIMITS = [("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")]


def status(field: str) -> int:
    """Bytes, as /proc has them of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="these limits count all memory on Linux alone")
@pytest.mark.parametrize(("limit", "field"), LIMITS)
def test_a_limit_on_the_process_counts_and_nothing_is_kept_under_one(limit: str, field: str) -> None:
    assert process_room() is None
    soft, hard = resource.getrlimit(getattr(resource, limit))
    total = status(field) + (256 << 20)
    resource.setrlimit(getattr(resource, limit), (total, hard))
    try:
        room, policy = process_room(), tune_cpu_memory()
        assert room is not None and room.total == total and 128 << 20 < room.available <= 256 << 20
        assert memory_room() == room and not policy.on and limit in policy.reason
    finally:
        resource.setrlimit(getattr(resource, limit), (soft, hard))


HOLES = """
import resource, sys, torch
from fasttrain.optimizations import tune_cpu_memory

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])

if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    tune_cpu_memory()
torch.ones(7_000_000)  # from its death on glibc itself puts smaller ones into the heap
dead, alive = [], []
for _ in range(16):
    dead.append(torch.ones(4_000_000)); alive.append(torch.ones(4096))
held = resident()
del dead
print(held - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the policy is glibc's")
def test_under_a_limit_large_tensors_leave_no_holes_in_the_heap() -> None:
    free, limited = (int(subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True,
                                        check=True).stdout) for how in ("free", "limited"))
    if platform.libc_ver()[0] == "glibc":
        assert limited > 240_000 > 200_000 > free  # KiB given back, of 250,000 freed
