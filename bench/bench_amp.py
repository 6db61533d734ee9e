"""Why `use_amp=True` stays in float32 on a CPU without bfloat16 hardware: one linear layer, forward and backward.

oneDNN is told to leave out the instructions (ONEDNN_MAX_CPU_ISA), in a process of its own, so that a machine that has
them shows what one without them does; the second size row is this machine as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bench.common import ROWS, Row, percentiles

CODE = """
import json, time, torch
x, w = torch.randn(512, 512), torch.randn(512, 512, requires_grad=True)
times, values = {"float32": [], "bfloat16": []}, {}
for _ in range(12):
    for name in times:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
            y = x @ w
        y.float().sum().backward()
        times[name].append(1e3 * (time.perf_counter() - start))
        values[name], w.grad = float(y.float().mean()), None
print(json.dumps([{name: each[2:] for name, each in times.items()}, values]))
"""


@pytest.mark.parametrize("isa", ["AVX2", "ALL"])
def test_bfloat16_on_a_cpu(benchmark: Any, isa: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True,
                          env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa})
    times, values = json.loads(done.stdout)
    assert values["bfloat16"] == pytest.approx(values["float32"], abs=0.05)
    where = "no bfloat16 instructions (AVX2)" if isa == "AVX2" else "this machine"
    medians = {name: percentiles(each) for name, each in times.items()}
    base = medians["float32"][1]
    for name, (p20, p50, p80) in medians.items():
        ROWS.append(Row("bfloat16 autocast on a CPU", f"512x512x512 fwd+bwd, {where}", name, p20, p50, p80, p50 / base,
                        float("nan")))
    benchmark.pedantic(lambda: None, rounds=1)
