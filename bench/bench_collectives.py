"""What gloo's collectives put on the wire: bytes of each call, counted on the loopback interface.

    python -m bench.bench_collectives          writes its section of bench/results/parallel.md

Two processes and one tensor of 16 MiB. A sum of which each rank keeps half needs half of what a whole sum needs; gloo's
reduce-scatter takes as much, because it is one. `collectives.scatter_sum` is checked against it first, then counted.
Run it on a quiet machine, or as root under `unshare -n` with `ip link set lo up`, where nobody else's traffic counts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bench.bench_parallel import loopback_bytes, start_ranks, write_section
from fasttrain.collectives import GATHER, SCATTER, scatter_sum

MIB, CALLS = 16, 10


def work() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    whole = torch.randn(MIB * 2**18, generator=torch.Generator().manual_seed(rank))
    half, exchanged, gathered = whole.chunk(2)[0].clone(), whole.chunk(2)[0].clone(), torch.empty_like(whole)
    SCATTER(half, whole)
    scatter_sum(exchanged, whole, group)
    assert torch.equal(half, exchanged)
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "all-reduce": (2.0, lambda: dist.all_reduce(whole)),
        "reduce-scatter": (1.0, lambda: SCATTER(half, whole)),
        "the same by all-to-all (fasttrain, CPU)": (1.0, lambda: scatter_sum(exchanged, whole, group)),
        "all-gather": (1.0, lambda: GATHER(gathered, half)),
    }
    if rank == 0:
        print("| | on the wire, MiB | the least, MiB | ms |\n|---|---|---|---|")
    for name, (least, call) in calls.items():
        call()
        dist.barrier()
        before, times = loopback_bytes(), []
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
            whole.mul_(0.5)
        dist.barrier()
        if rank == 0:
            sent = (loopback_bytes() - before) / CALLS / 2**20
            print(f"| {name} | {sent:.1f} | {least * MIB:.1f} | {statistics.median(times):.1f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        work()
    else:
        table = start_ranks("bench.bench_collectives", [], 2)[0].splitlines()
        write_section("One call on the wire", [
            f"`python -m bench.bench_collectives`, torch {torch.__version__}: bytes that the loopback interface "
            f"carries for one tensor of {MIB} MiB and two processes. gloo's reduce-scatter is an all-reduce of which "
            "each rank keeps a part: with it fsdp sends its gradients twice, which was all of the difference between "
            "what it sent and the least. On CPUs fasttrain sends each rank its part alone (all-to-all) and adds them "
            "up; NCCL has a reduce-scatter of its own, which stays.", "", *table])
