"""The two losses with the vocabulary cut over 2 and 3 gloo processes; what they check is in vocab_parallel_ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vocab_parallel_ranks import CHECKS, WORLDS

from fasttrain import vocab_parallel
from fasttrain.vocab_shards import check_tiling


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    """World size -> what each rank says of every check."""
    directory = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("vocab_parallel_ranks.py")
    done = subprocess.run([sys.executable, str(script), str(directory)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    files = {world: [directory / f"{world}-{rank}.json" for rank in range(world)] for world in WORLDS}
    missing = [file.name for paths in files.values() for file in paths if not file.exists()]
    assert not missing, f"{missing} were not written:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return {world: [json.loads(file.read_text()) for file in paths] for world, paths in files.items()}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("world", WORLDS)
def test_on_every_rank(verdicts: dict[int, list[dict[str, str]]], world: int, name: str) -> None:
    found = [ran.get(name, "not reached: an earlier check failed") for ran in verdicts[world]]
    assert not any(found), "\n".join(f"rank {rank} of {world}:\n{text}" for rank, text in enumerate(found) if text)


def test_without_a_process_group_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no process group; start the script with torchrun"):
        vocab_parallel.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


def test_a_division_must_hold_every_class_once() -> None:
    check_tiling([0, 5, 5, 12], [5, 0, 7, 1])
    check_tiling([6, 0], [3, 6])
    with pytest.raises(ValueError, match="overlap"):
        check_tiling([0, 4], [5, 5])
    with pytest.raises(ValueError, match=r"no rank holds \[0, 1\)"):
        check_tiling([1, 4], [3, 5])
