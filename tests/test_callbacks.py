"""Callbacks: bound once, deciders first, failures contained where promised, state and files right after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Bigram, one_thread, plain_loader, tiny_trainer, token_loader  # noqa: F401

from fasttrain.callbacks import (
    HOOKS,
    Callback,
    EarlyStopping,
    Hooks,
    JsonlLogger,
    SampleText,
    drop_records_after,
    read_records,
)
from fasttrain.evaluation import EvalResult


def test_every_hook_of_the_protocol_fires_in_a_run_and_only_overridden_ones_are_bound(tmp_path: Path) -> None:
    fired: list[str] = []

    class Recorder:
        """Needs no base class."""

    recorder = Recorder()
    for name in HOOKS:
        setattr(recorder, name, lambda state, *arguments, name=name: fired.append(name))
    tiny_trainer(tmp_path, token_loader(1), callbacks=[recorder], max_steps=2, val_dataloader=token_loader(1),
                 eval_every_steps=1).train()
    assert fired[0] == "on_train_start" and fired[-1] == "on_train_end"
    assert set(fired) == set(HOOKS) - {"on_nonfinite", "on_event", "on_exception"}
    assert all(not bound for bound in Hooks([Callback()])._bound.values())


def test_deciders_run_before_observers_each_in_the_order_given() -> None:
    order: list[str] = []

    def make(name: str, is_observer: bool) -> Callback:
        class Named(Callback):
            observer = is_observer

            def on_step(self, state: Any) -> None:
                order.append(name)

        return Named()

    callbacks = [make("o1", True), make("d1", False), make("o2", True), make("d2", False)]
    tiny_trainer(callbacks=callbacks, max_steps=1).train()
    assert order == ["d1", "d2", "o1", "o2"]


def test_a_broken_observer_is_named_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Callback):
        observer = True

        def on_step(self, state: Any) -> None:
            raise OSError("server gone")

    assert tiny_trainer(callbacks=[Broken()], max_steps=2).train().status == "completed"
    output = capsys.readouterr().out
    assert output.count("Broken.on_step failed") == 2 and "OSError: server gone" in output


def test_a_broken_decider_ends_the_run_with_its_name_and_exception_hooks_fire() -> None:
    errors: list[BaseException] = []

    class Broken(Callback):
        def on_step(self, state: Any) -> None:
            raise KeyError("bug")

    class Cleanup(Callback):
        def on_exception(self, state: Any, error: BaseException) -> None:
            errors.append(error)

    with pytest.raises(RuntimeError, match=r"Broken.on_step failed at step 1") as caught:
        tiny_trainer(callbacks=[Cleanup(), Broken()]).train()
    assert isinstance(caught.value.__cause__, KeyError) and errors == [caught.value]


def test_any_callback_may_stop_and_the_first_reason_stays() -> None:
    class Stop(Callback):
        def __init__(self, reason: str) -> None:
            self.reason = reason

        def on_step(self, state: Any) -> None:
            if state.step >= 3:
                state.request_stop(self.reason)

    result = tiny_trainer(callbacks=[Stop("first"), Stop("second")]).train()
    assert (result.status, result.step, result.reason) == ("stopped", 3, "first")


def result(loss: float) -> EvalResult:
    return EvalResult(loss, math.exp(min(loss, 50.0)), None, None, 1)


class _State:
    def __init__(self) -> None:
        self.reason = ""

    def request_stop(self, reason: str) -> None:
        self.reason = self.reason or reason


@pytest.mark.parametrize(("losses", "stops_after"), [
    ([3, 2, 2.5, 2.4, 1], 4), ([3, 2, 1, 0.5], None), ([3, 2.95, 2.9], 3), ([3, float("nan"), float("nan")], 3)])
def test_early_stopping_waits_for_its_patience(losses: list[float], stops_after: int | None) -> None:
    callback, state = EarlyStopping(patience=2, min_delta=0.2), _State()
    for index, loss in enumerate(losses, 1):
        callback.on_eval(state, result(loss))  # type: ignore[arg-type]
        assert bool(state.reason) == (stops_after is not None and index >= stops_after)


def test_early_stopping_keeps_counting_over_a_resume(tmp_path: Path) -> None:
    first = EarlyStopping(patience=5, min_delta=1000.0)  # only the first one improves by that much
    trainer = tiny_trainer(tmp_path, callbacks=[first], max_steps=4, val_dataloader=token_loader(1), eval_every_steps=1)
    trainer.train()
    assert first.bad_evaluations == 3
    second = EarlyStopping(patience=5, min_delta=1000.0)
    again = tiny_trainer(tmp_path, callbacks=[SampleText("a"), second], max_steps=4)
    again.train()
    assert second.state_dict() == first.state_dict()


def test_a_resume_drops_the_records_that_will_come_again_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "kind": "train", "loss": 0.1 * step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "ki')
    drop_records_after(path, 2)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_keeps_the_old_metrics_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n')
    tiny_trainer(tmp_path, max_steps=2).train()
    assert read_records(tmp_path / "metrics.previous.jsonl") == [{"step": 1, "kind": "train"}]
    assert read_records(tmp_path / "metrics.jsonl")[0]["step"] == 2


def test_non_finite_numbers_are_written_as_they_are_in_valid_json(tmp_path: Path) -> None:
    def explode(model: Any, batch: Any) -> Any:
        loss = model(batch[0]).sum() * float("inf")
        return loss - loss, torch.tensor(4)

    tiny_trainer(tmp_path, loss_fn=explode, max_steps=2, log_every_steps=1).train()
    records = [record for record in read_records(tmp_path / "metrics.jsonl") if record["kind"] != "nonfinite_capsule"]
    assert [record["kind"] for record in records][:4] == ["nonfinite", "train", "nonfinite", "train"]
    assert records[0]["loss"] == "nan" and records[1]["loss"] == "nan" and records[3]["nonfinite_steps"] == 2
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_users_own_logger_replaces_the_built_in_one(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "run", callbacks=[JsonlLogger(tmp_path / "mine.jsonl")]).train()
    assert (tmp_path / "mine.jsonl").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_samples_are_taken_at_evaluations_and_a_run_without_tokenizer_says_so(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, callbacks=[SampleText("ab")]).train()
    assert "SampleText has no tokenizer" in capsys.readouterr().out
    calls: list[Any] = []
    trainer = tiny_trainer(tmp_path / "two", model=Bigram(), callbacks=[SampleText(["a", "b"], max_new_tokens=2)],
                           val_dataloader=plain_loader(1), eval_every_steps=3)

    class Letters:
        vocab_size, eos_token_id = 29, None

        def encode(self, text: str) -> list[int]:
            calls.append(text)
            return [ord(letter) - ord("a") for letter in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(ord("a") + index) for index in ids)

    trainer.tokenizer = Letters()
    trainer.train()
    samples = read_records(tmp_path / "two" / "samples.jsonl")
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(3, "a"), (3, "b"), (6, "a"), (6, "b")]
    assert all(len(sample["text"]) == 2 for sample in samples)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: EarlyStopping(patience=0), "patience is 0"), (lambda: SampleText([]), "at least one prompt"),
    (lambda: SampleText("a", every_steps=1, every_tokens=1), "at most one of the two"),
    (lambda: Hooks([object()]), "at least one of on_train_start")])
def test_options_without_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
