"""The short form of each part of the campaign; `make torture` runs the whole."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import campaign  # noqa: E402
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
    none_wrong(campaign.exact_resume(1, 0, (0,), (2, 9)))


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


def test_no_flip_or_cut_loads_here_and_many_do_elsewhere() -> None:
    rows = {contender.name: peers.trials(contender, 40, 0) for contender in peers.contenders()}
    for kind, (_, _, silent) in rows.pop("fasttrain").items():
        assert silent == 0, kind
    for name, counts in rows.items():
        assert counts["flip"][2] > 20, f"{name} notices more than it did: publish the table anew"
    assert peers.falls_back(40, 0) == 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_finds_its_place(mutant: object) -> None:
    assert (ROOT / "fasttrain" / mutant.file).read_text().count(mutant.old) == 1  # type: ignore[attr-defined]
