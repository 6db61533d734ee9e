"""A whole training step on a CPU, each contender in a process of its own as a user runs it: time, parts, peak memory.

Llama (transformers' own class) and our GPT of 49 M parameters (14 M at V=4096), 8x256 tokens, float32, AdamW and
clipping. The losses of all contenders must agree before a time counts; `gemm` is the step's matrix products alone.
Lightning is measured where it is importable, or in the interpreter that FASTTRAIN_PEERS_PYTHON names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.common import ROWS, Row, percentiles

CONTENDERS = ("hand-written", "transformers", "lightning", "gemm", "fasttrain")
FLOORS = ("gemm", "bare")
"""No training, so no losses to compare."""


def measure(contender: str, **options: Any) -> dict[str, Any] | None:
    """One run's figures; None where the contender is not installed."""
    python = sys.executable
    if contender == "lightning" and importlib.util.find_spec("lightning") is None:
        python = os.environ.get("FASTTRAIN_PEERS_PYTHON", "")
        if not python:
            return None
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run([python, "-m", "bench.training_contenders", "--contender", contender, *flags],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def race(name: str, label: str, rounds: int, contenders: tuple[str, ...] = CONTENDERS,
         **options: Any) -> dict[str, Row]:
    """Interleaved rounds, a row for each contender, and the losses compared."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for contender in contenders:
            figures = measure(contender, **options)
            if figures is not None:
                runs.setdefault(contender, []).append(figures)
    truth = runs["hand-written"][0]["losses"]
    for contender, each in runs.items():
        if contender not in FLOORS:
            assert each[0]["losses"] == pytest.approx(truth, rel=2e-3), contender
    medians = {key: percentiles([ms for run in each for ms in run["ms"]]) for key, each in runs.items()}
    rows = {}
    for key, (p20, p50, p80) in medians.items():
        update = percentiles([ms for run in runs[key] for ms in run["update_ms"]])[1]
        part = "" if key in FLOORS else f", clip + update {update:.1f} ms"
        peak = max(run["peak_mib"] for run in runs[key])
        rows[key] = Row(name, label + part, key, p20, p50, p80, p50 / medians["fasttrain"][1], peak)
        print(rows[key])
        print(*(f"  {line}" for line in runs[key][0]["decisions"] if "->" in line), sep="\n")
    ROWS.extend(rows.values())
    return rows


@pytest.mark.parametrize("vocab", [50304, 4096])
@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_training_step(benchmark: Any, model: str, vocab: int) -> None:
    rounds, steps = int(os.environ.get("FASTTRAIN_BENCH_ROUNDS", "2")), 7
    size = f"{model} V={vocab} 8x256 tokens, {torch.get_num_threads()} threads"
    race("training step, a process for each (peak is the whole process)", size, rounds, model=model, vocab=vocab,
         steps=steps)
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are the processes'; this makes it appear in the listing


@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_auto(benchmark: Any, model: str) -> None:
    """What optimize="auto" decides on a model of 14 M parameters, and whether the run is then faster and the same."""
    rounds, vocab = int(os.environ.get("FASTTRAIN_BENCH_ROUNDS", "1")), 4096
    size = f"{model} V={vocab} 8x256 tokens, {torch.get_num_threads()} threads"
    race('optimize="auto", a process for each', size, rounds, ("hand-written", "auto", "fasttrain"), model=model,
         vocab=vocab, steps=12, skip=4)
    benchmark.pedantic(lambda: None, rounds=1)
