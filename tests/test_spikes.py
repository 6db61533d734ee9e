"""A loss that jumps is told, ends the run, or is undone with its batches passed over, the same way every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import LENGTH, VOCAB, Bigram, copy_of, one_thread, tiny_trainer, tokens  # noqa: F401

from fasttrain.batch_stream import BatchStream
from fasttrain.spikes import LossSpike

BAD = 25  # index of the batch whose labels are a different language


def batches(count: int = 40) -> list[Any]:
    x = tokens(2 * LENGTH * count).view(count, 2, LENGTH)
    y = (x * 3 + 1) % VOCAB
    y[BAD] = (x[BAD] * 7 + 11) % VOCAB
    return [(a, b) for a, b in zip(x, y)]


def spiking(directory: Path | None, policy: Any, *, steps: int = 40, **options: Any) -> Any:
    guard = LossSpike(policy, warmup_steps=12, threshold=4.0, **options)
    return tiny_trainer(directory, batches(), Bigram(), max_steps=steps, lr=0.1, schedule="constant",
                        save_every_steps=5, keep_last=0, log_every_steps=1, callbacks=[guard])


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_warning_names_the_step_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = spiking(tmp_path, "warn").train()
    assert result.status == "completed" and "at step 26 is a spike" in capsys.readouterr().out
    spike = next(record for record in records(tmp_path) if record["kind"] == "loss_spike")
    assert spike["at_step"] == 26 and spike["batches"] == [[0, 25], [0, 26]]


def test_stop_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    result = spiking(tmp_path, "stop").train()
    assert (result.status, result.step) == ("stopped", 26) and "is a spike" in result.reason


def test_a_rewind_is_the_run_in_which_the_batch_never_came(tmp_path: Path) -> None:
    trainer = spiking(tmp_path / "one", "rewind")
    result = trainer.train()
    assert result.status == "completed"
    assert trainer.state.stream.skipped[0] == (0, 25, 26) and trainer.state.counters.rewinds == 1
    without = batches()
    del without[BAD]
    clean = tiny_trainer(tmp_path / "two", without, Bigram(), max_steps=40, lr=0.1, schedule="constant")
    clean.train()
    for a, b in zip(trainer.model.parameters(), clean.model.parameters()):
        assert torch.equal(a, b)
    steps = [record["step"] for record in records(tmp_path / "one") if record["kind"] == "train"]
    assert steps == list(range(1, 41))  # the undone steps stand there once
    event = next(record for record in records(tmp_path / "one") if record["kind"] == "rewind")
    assert (event["step"], event["from_step"], event["checkpoint"]) == (25, 26, "step-00000025")


def test_a_rewind_happens_again_when_repeated_and_survives_a_resume(tmp_path: Path) -> None:
    whole, halves = spiking(tmp_path / "one", "rewind"), spiking(tmp_path / "two", "rewind", steps=30)
    whole.train()
    halves.train()
    second = spiking(tmp_path / "two", "rewind")
    second.train()
    assert second.state.stream.skipped == whole.state.stream.skipped
    for a, b in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)


def test_without_a_checkpoint_or_after_too_many_rewinds_the_run_stops(tmp_path: Path) -> None:
    result = spiking(None, "rewind").train()
    assert result.status == "stopped" and "no checkpoint_dir" in result.reason
    result = spiking(tmp_path, "rewind", max_rewinds=0).train()
    assert result.status == "stopped" and "after 0 rewinds" in result.reason


def test_passing_over_goes_across_the_end_of_an_epoch_and_comes_back_from_a_checkpoint() -> None:
    stream = BatchStream(list("abcd"), max_epochs=3)
    stream.skip((0, 3), (1, 1))
    copy = BatchStream(list("abcd"), max_epochs=3)
    copy.load_state_dict(stream.state_dict())
    for each in (stream, copy):
        assert "".join(iter(each.next_batch, None)) == "abc" + "bcd" + "abcd"


def test_options_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="policy is 'undo'"):
        LossSpike("undo")  # type: ignore[arg-type]
    for options in ({"threshold": 0.0}, {"warmup_steps": 0}, {"blame_steps": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} 0"):
            LossSpike(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="saved mean is nan"):
        LossSpike().load_state_dict({"mean": float("nan"), "spread": 0.0, "seen": 1, "last_judged": 1})


def test_what_is_usual_is_the_plain_mean_at_first_and_exponential_later() -> None:
    guard = LossSpike()
    for loss in (1.0, 2.0, 6.0):
        guard._learn(loss)
    assert guard.mean == pytest.approx(3.0)
    assert guard.spread == pytest.approx(((2.0 - 1.0) / 2) * 2 / 3 + (6.0 - 1.5) / 3)
    for _ in range(97):
        guard._learn(3.0)
    guard._learn(53.0)
    assert guard.mean == pytest.approx(3.0 + 0.02 * 50.0)
