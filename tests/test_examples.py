"""The examples run as their own text says, in a tiny form, and the model of each has learnt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_own_model_trains_and_writes(tmp_path: Path) -> None:
    text = run("examples/own_model.py", "--steps", "60", "--checkpoint-dir", tmp_path)
    assert float(re.findall(r"validation loss ([\d.]+)", text)[0]) < 1.0
    assert text.rstrip().splitlines()[-1].startswith("the quick brown")
    assert "step-00000060" in run("examples/own_model.py", "--steps", "61", "--checkpoint-dir", tmp_path)


def test_own_loop_compiles_to_one_graph_and_learns() -> None:
    losses = [
        float(loss)
        for loss in re.findall(r"loss ([\d.]+)", run("examples/own_loop.py", "--steps", "60", "--backend", "aot_eager"))
    ]
    assert losses[-1] < 0.6 * losses[0]


def test_every_example_is_short() -> None:
    for path in (ROOT / "examples").glob("own_*.py"):
        assert path.read_text().count("\n") < 60
