"""Peaks that `fasttrain plan` says against those of real steps over gloo: two and four processes of one thread each.

    python -m bench.bench_plan          writes its section of bench/results/parallel.md

A peak is the most that PyTorch's CPU allocator had given out at one time during a step, beyond what it had before: the
weights are there, gradients come and go, and there is no optimizer. Nothing is timed, so the machine need not be quiet.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from bench.bench_parallel import start_ranks, write_section

MODEL = {"layers": 4, "dim": 128, "heads": 4, "kv_heads": 2, "intermediate": 0, "tie_embeddings": 0}
BATCH, LENGTH = 4, 128
CASES = [(vocab, steps, recompute) for vocab in (8192, 65536)
         for steps, recompute in ((1, "none"), (1, "full"), (2, "none"))]


def peak(call: Callable[[], Any]) -> int:
    """Most bytes that the allocator had given out at one time during `call`, its kernels' own included."""
    with torch.profiler.profile(profile_memory=True) as found:
        call()
    live = most = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def work(strategy: str) -> None:
    """One rank: prints (planned, measured) of each case."""
    from fasttrain.distributed import join
    from fasttrain.losses import batch_loss
    from fasttrain.optimizations import _activation_checkpointing
    from fasttrain.plan import Plan, Setting
    from fasttrain.planned_model import planned_model
    from fasttrain.sharding import Shards

    torch.set_num_threads(1)
    team, found = join(), []
    for vocab, micro_batches, recompute in CASES:
        setting = Setting(team.world_size, 1e12, BATCH, LENGTH, precision="float32", device="cpu",
                          grad_accum_steps=micro_batches)
        plan = Plan(planned_model("gpt", {**MODEL, "vocab": vocab}, LENGTH), setting)
        row = plan.row(strategy, recompute, setting)
        model = plan.model.build(torch.float32, LENGTH)
        _activation_checkpointing(model, recompute)
        shards, done = Shards(team, model, strategy, micro_batches, contextlib.nullcontext), itertools.count(1)
        window: Any = SimpleNamespace(is_last_pass=lambda accumulated, done=done: next(done) % accumulated == 0)
        shards.begin(SimpleNamespace(window=window))  # type: ignore[arg-type]
        loss, ids = shards.loss(batch_loss), torch.randint(0, vocab, (BATCH, LENGTH))

        def step(model: Any = model, loss: Any = loss, ids: Any = ids, micro_batches: int = micro_batches) -> None:
            for _ in range(micro_batches):
                loss(model, (ids, ids))[0].backward()
            model.zero_grad(set_to_none=True)

        step()
        found.append((row.gathered + row.activations + row.gradients, peak(step)))
    print(json.dumps(found))


def main() -> None:
    lines = [
        f"`python -m bench.bench_plan`, torch {torch.__version__}, {os.cpu_count()} cores, one thread a process. GPT "
        f"of {MODEL}, {BATCH} x {LENGTH} tokens a rank and micro-batch; what a step takes beside weights and "
        "optimizer: as planned / the largest of the ranks, MiB.", "",
        "| ranks, strategy | " + " | ".join(
            f"V {vocab}" + (f", {recompute} recomputation" if recompute != "none" else "")
            + (f", {steps} micro-batches" if steps > 1 else "") for vocab, steps, recompute in CASES) + " |",
        "|---" * (len(CASES) + 1) + "|"]
    off = []
    for ranks, strategy in itertools.product((2, 4), ("fsdp", "fsdp-vocab")):
        printed = [json.loads(text.splitlines()[-1]) for text in start_ranks("bench.bench_plan", [strategy], ranks)]
        cells = [(cases[0][0], max(measured for _, measured in cases)) for cases in zip(*printed)]
        off += [planned / measured - 1 for planned, measured in cells]
        lines.append(f"| {ranks}, {strategy} | " + " | ".join(
            f"{planned / 2**20:.1f} / {measured / 2**20:.1f}" for planned, measured in cells) + " |")
    lines += ["", f"Planned is off by {min(off):+.1%} to {max(off):+.1%}."]
    write_section("What the plan says of memory", lines)


if __name__ == "__main__":
    work(sys.argv[1]) if len(sys.argv) > 1 else main()
