"""What `tune_cpu_memory` saves and costs: a training step of a small GPT in processes of its own, with and without.

Page faults a step, milliseconds a step, and the peak of resident memory, for each allocator policy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.common import ROWS, Row, percentiles

STEP = """
import json, resource, sys, time, torch
from fasttrain import AdamW, ops
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.optimizations import tune_cpu_memory

policy, steps = sys.argv[1], int(sys.argv[2])
if policy != "as is":
    tune_cpu_memory(None if policy == "kept, huge pages" else 0)
torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=16384, num_layers=4, num_heads=4, hidden_size=256, max_seq_len=256))
optimizer = AdamW(model.parameters(), max_grad_norm=1.0)
ids = torch.randint(0, 16384, (4, 257))
times, losses = [], []
for step in range(steps):
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    loss = ops.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append((time.perf_counter() - start) * 1e3)
    losses.append(loss.item())
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
print(json.dumps({"times": times[2:], "faults": faults, "peak_mib": peak, "losses": losses}))
"""
POLICIES = ("as is", "kept", "kept, huge pages")


def measure(policy: str, steps: int) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", STEP, policy, str(steps)], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the policy is glibc's")
def test_cpu_memory_policy(benchmark: Any) -> None:
    runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
    for _ in range(3):
        for policy in POLICIES:
            runs[policy].append(measure(policy, 8))
    benchmark.pedantic(measure, ("kept, huge pages", 4), rounds=1)  # so that it appears in pytest-benchmark's own table
    first = runs["as is"][0]["losses"]
    assert all(run["losses"] == first for each in runs.values() for run in each)  # the policy changes no number
    medians = {policy: percentiles([t for run in each for t in run["times"]]) for policy, each in runs.items()}
    ours = medians["kept, huge pages"][1]
    for policy, (p20, p50, p80) in medians.items():
        faults = runs[policy][-1]["faults"]
        label = "fasttrain" if policy == "kept, huge pages" else policy
        ROWS.append(
            Row(
                "training step by memory policy (peak is the whole process)",
                f"{faults:,} page faults a step, {torch.get_num_threads()} threads",
                label,
                p20,
                p50,
                p80,
                p50 / ours,
                max(run["peak_mib"] for run in runs[policy]),
            )
        )
