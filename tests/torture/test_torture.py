"""The short form of each part of the campaign; `make torture` runs the whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import campaign  # noqa: E402
import jobs  # noqa: E402
import peers  # noqa: E402
from mutants import MUTANTS, ROOT  # noqa: E402


def none_wrong(*parts: campaign.Part) -> None:
    for part in parts:
        assert part.wrong == [], part.name
        assert part.trials, part.name


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_save_survives_a_kill_and_an_error_at_any_call(tmp_path: Path) -> None:
    parts = campaign.weather(tmp_path, stride=5, kills=10, seed=0)
    none_wrong(*(part for part in parts if "tmpfs" not in part.name))
    assert parts[-1].wrong == [] and len(parts) >= 14


def test_every_image_that_a_power_cut_may_leave_loads() -> None:
    part = campaign.power_cuts(400)
    none_wrong(part)
    assert part.trials >= 300


def test_ledgers_of_interrupted_runs_are_the_uninterrupted_ones() -> None:
    none_wrong(campaign.exact_resume(1, 0, tuple(campaign.LOADERS)[:2], (2, 9)))


def test_runs_killed_at_random_end_with_the_same_bits() -> None:
    none_wrong(campaign.killed_runs(6, 0))


def test_signals_at_random_instants_give_a_checkpoint_and_an_exit_code() -> None:
    none_wrong(campaign.signals(6, 0))


def test_two_writers_and_a_reader_share_a_directory() -> None:
    none_wrong(campaign.concurrent(1.0))


def test_hostile_and_random_files_are_refused() -> None:
    hostile, fuzz = campaign.hostile(0.3, 0)
    none_wrong(hostile, fuzz)
    assert hostile.trials >= 150


def test_a_hostile_checkpoint_takes_no_more_than_twice_its_size_in_memory() -> None:
    part = campaign.hostile_memory(13)
    none_wrong(part)
    assert part.trials >= 15


def test_no_flip_or_cut_loads_here_and_many_do_elsewhere() -> None:
    rows = {contender.name: peers.trials(contender, 40, 0) for contender in peers.contenders()}
    for kind, (_, _, silent) in rows.pop("fasttrain").items():
        assert silent == 0, kind
    for name, counts in rows.items():
        assert counts["flip"][2] > 20, f"{name} notices more than it did: publish the table anew"
    assert peers.falls_back(40, 0) == 40


def test_a_campaign_that_is_told_to_stop_says_aborted_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """Never "wrong": what it was doing to others, and what others do to it, are told apart. Nothing is left running."""
    command = [sys.executable, str(HERE / "jobs.py"), "--scale", "0.01", "--at-once", "1", "--only", "^killed runs",
               "--keep", str(tmp_path / "kept"), "--out", str(tmp_path / "report.md")]
    process = subprocess.Popen(command, start_new_session=True)
    first, second = tmp_path / "kept" / "killed-runs-1-of-4.json", tmp_path / "kept" / "killed-runs-2-of-4.log"
    deadline = time.monotonic() + 90
    while not second.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    running = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if jobs.parent_of(pid) == process.pid]
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM and len(running) == 1
    report = (tmp_path / "report.md").read_text()
    assert "Aborted by SIGTERM" in report and "WRONG" not in report and "failed" not in report
    row = next(line for line in report.splitlines() if line.startswith("| SIGKILL at random in running training"))
    assert row.split("|")[3].strip() == "0"
    time.sleep(0.2)  # what was killed is gone
    assert not [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if jobs.session_of(pid) in running]
    before = first.stat().st_mtime
    command[command.index("^killed runs")] = "^nothing"
    assert subprocess.run(command, timeout=60).returncode == 0 and first.stat().st_mtime == before


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_finds_its_place(mutant: object) -> None:
    assert (ROOT / "fasttrain" / mutant.file).read_text().count(mutant.old) == 1  # type: ignore[attr-defined]
