"""A rank that dies or stands still: the others end in time and say who, and what they were writing is never used."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_cases import ROOT, finish, start

from fasttrain.checkpointing import list_checkpoints, verify_checkpoint
from fasttrain.distributed import is_of_communication

TIMEOUT = 3.0


@pytest.mark.parametrize(("text", "is_one"), [
    ("Application timeout caused pair closure", True),
    ("[/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 3000ms for recv operation to complete", True),
    ("Timed out waiting 3000ms for send operation to complete", True),
    ("Connection closed by peer [127.0.0.1]:21033", True),
    ("Read error [127.0.0.1]:21033: Connection reset by peer", True),
    ("DataLoader timed out after 5 seconds", False),
    ("mat1 and mat2 shapes cannot be multiplied", False),
])
def test_gloos_words_for_a_lost_rank_are_known_with_and_without_its_name(text: str, is_one: bool) -> None:
    assert is_of_communication(RuntimeError(text)) == is_one


def struck(folder: Path, rank: int, place: str, number: int, parallel: str) -> None:
    """One campaign: the signal (0: an error in the backward), what the survivor says and leaves behind, and a restart
    that finishes the run."""
    ranks = start(2, folder, f"doomed-{parallel}", DOOM=f"{rank} {place} {number}", FASTTRAIN_RANK_TIMEOUT=str(TIMEOUT))
    survivor = ranks[1 - rank]
    begun = time.monotonic()
    code = survivor.wait(60)
    if number == signal.SIGSTOP:
        os.kill(ranks[rank].pid, signal.SIGKILL)
    assert code, f"the survivor ended with {code}: {survivor.text()}"
    assert time.monotonic() - begun < 30 + TIMEOUT
    last = survivor.text()
    assert "LostRankError" in last and f"rank {rank} (" in last and "dead or stopped" in last, last
    # The save of step 2 runs behind and may have lacked the lost rank's part: then there is none, never a partial one.
    assert all(not verify_checkpoint(path) for path in list_checkpoints(folder / "run"))
    assert ranks[rank].wait(10) == (-signal.SIGKILL if number else 1)
    finish(start(2, folder, f"doomed-{parallel}"))
    newest = list_checkpoints(folder / "run")[-1]
    assert newest.name == "step-00000006" and not verify_checkpoint(newest)
    assert not list((folder / "run").glob(".inflight-*"))


@pytest.mark.parametrize(("rank", "place", "number", "parallel"), [
    (1, "forward", signal.SIGKILL, "fsdp"),
    (1, "reduce", signal.SIGSTOP, "ddp"),
    (1, "backward", 0, "ddp"),  # most of its gradients are sent
    (0, "save", signal.SIGKILL, "ddp"),
])
def test_a_lost_rank_is_named_and_the_run_goes_on(tmp_path: Path, rank: int, place: str, number: int,
                                                  parallel: str) -> None:
    struck(tmp_path, rank, place, number, parallel)


@pytest.mark.slow
def test_every_rank_lost_at_every_place_in_both_ways(tmp_path: Path) -> None:
    count = 0
    for case in itertools.product((0, 1), ("forward", "reduce", "save"), (signal.SIGKILL, signal.SIGSTOP),
                                  ("ddp", "fsdp")):
        folder = tmp_path / str(count)
        folder.mkdir()
        struck(folder, *case)
        count += 1
    print(f"{count} cases: the survivor named the rank, and every checkpoint it left was whole")


@pytest.mark.slow
def test_torchrun_restarts_and_the_run_resumes_by_itself(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"""
import os, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.environ["DOOM"] = "1 forward 9"
import rank_cases
rank_cases.main([{str(tmp_path)!r}, "doomed-ddp"])
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         str(script)], text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000006"
