"""A line written into the control file acts after the step under way, once, and is on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Bigram, one_thread, tiny_trainer, token_loader  # noqa: F401

from fasttrain.callbacks import Callback
from fasttrain.control import ControlFile


class Hand(Callback):
    """Somebody who writes lines at given steps."""

    def __init__(self, path: Path, lines: dict[int, str]) -> None:
        self.path, self.lines = path, lines
        self.rates: list[float] = []

    def on_step(self, state: Any) -> None:
        self.rates.append(state.counters.last_lr)
        if state.step in self.lines:
            with open(self.path, "a") as file:
                file.write(self.lines[state.step] + "\n")


def steered(directory: Path, lines: dict[int, str], **options: Any) -> tuple[Any, Hand, ControlFile]:
    hand, control = Hand(directory / "control", lines), ControlFile(poll_seconds=0)
    settings = {"max_steps": 8, "schedule": "constant", "val_dataloader": token_loader(1), **options}
    return tiny_trainer(directory, model=Bigram(), callbacks=[hand, control], **settings), hand, control


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_saving_evaluating_and_stopping_happen_after_the_step(tmp_path: Path) -> None:
    trainer, _, control = steered(tmp_path, {2: "evaluate", 3: "save", 5: "stop"})
    result = trainer.train()
    assert (result.status, result.step) == ("stopped", 5) and "control file" in result.reason
    assert [record["step"] for record in records(tmp_path, "eval")] == [2, 5]
    assert [record["checkpoint"] for record in records(tmp_path, "save")] == ["step-00000003", "step-00000005"]
    assert [(record["step"], record["command"]) for record in records(tmp_path, "control")] == [
        (2, "evaluate"), (3, "save"), (5, "stop")]
    assert control.actions == [[2, "evaluate"], [3, "save"], [5, "stop"]]
    assert not (tmp_path / "control").exists()


def test_the_learning_rate_and_the_rest_of_its_schedule_are_scaled(tmp_path: Path) -> None:
    plain = steered(tmp_path / "one", {}, schedule="linear")
    scaled = steered(tmp_path / "two", {3: "lr 0.5"}, schedule="linear")
    for trainer, _, _ in (plain, scaled):
        trainer.train()
    assert scaled[1].rates == pytest.approx([*plain[1].rates[:3], *(0.5 * rate for rate in plain[1].rates[3:])])


def test_the_scale_is_still_there_after_a_resume(tmp_path: Path) -> None:
    steered(tmp_path, {2: "lr 0.5"}, max_steps=4)[0].train()
    trainer, hand, control = steered(tmp_path, {}, max_steps=6)
    trainer.train()
    assert hand.rates == pytest.approx([5e-3, 5e-3]) and control.actions == [[2, "lr 0.5"]]


def test_what_is_not_understood_is_told_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, hand, control = steered(tmp_path, {2: "explode", 3: "lr -1", 4: "sample once"})
    assert trainer.train().status == "completed"
    output = capsys.readouterr().out
    for part in ("the commands are save", "no positive factor", "no tokenizer"):
        assert part in output
    assert set(hand.rates) == {1e-2}
    assert ["explode"] not in [action[1:] for action in control.actions]
