"""The moving average of the weights is the formula's, is what gets scored and sampled, and survives a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import LENGTH, Bigram, one_thread, tiny_trainer, token_loader, tokens  # noqa: F401

from fasttrain.averaging import EMA
from fasttrain.callbacks import Callback
from fasttrain.evaluation import evaluate
from fasttrain.ops.adamw import AdamW


class Weights(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def _note(self, state: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in state.model.named_parameters()})

    def on_train_start(self, state: Any, run: Any) -> None:
        self._note(state)

    def on_step(self, state: Any) -> None:
        self._note(state)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_the_average_is_that_of_the_formula(foreign: bool, every: int) -> None:
    model, ema, weights = Bigram(), EMA(0.8, every_steps=every), Weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5) if foreign else None
    tiny_trainer(model=model, optimizer=optimizer, callbacks=[ema, weights]).train()
    wanted = weights.seen[0]
    for step in range(every, 7, every):
        wanted = {name: 0.8**every * w + (1 - 0.8**every) * weights.seen[step][name] for name, w in wanted.items()}
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, wanted[name])
        assert not torch.equal(average, weights.seen[-1][name])


def test_a_verdict_that_is_still_on_its_way_gives_the_same_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host learns a step's numbers one step later."""
    averages = []
    for late in (False, True):
        if late:
            monkeypatch.setattr("fasttrain.training_loop.on_host", lambda device: False)
            monkeypatch.setattr("fasttrain.ops.adamw.on_host", lambda device: False)
        poisoned = [tokens(2 * LENGTH, seed).view(2, LENGTH) for seed in range(4)]

        class Nan(Bigram):
            calls = 0

            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                return super().forward(input_ids) * (float("nan") if self.calls == 3 else 1.0)

        model, ema = Nan(), EMA(0.9)
        tiny_trainer(loader=poisoned, model=model, callbacks=[ema], max_steps=4,
                     optimizer=AdamW(model.parameters(), lr=0.1, impl="reference")).train()
        averages.append(ema.averages)
    for name in averages[0]:
        torch.testing.assert_close(averages[1][name], averages[0][name])


def test_evaluation_and_generation_see_the_average_and_training_does_not() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) % 29 for letter in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(97 + i % 26) for i in ids)

    val = token_loader(2, seed=9)
    trainer = tiny_trainer(model=Bigram(), val_dataloader=val, callbacks=[EMA(0.99)])
    trainer.tokenizer = Letters()
    result = trainer.train()
    own = evaluate(trainer.model, val).loss
    ema = trainer.callbacks[0]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with ema.swapped():
        averaged = evaluate(trainer.model, val).loss
        text = trainer.model(torch.tensor([[ord("f") % 29]])).argmax().item()
    assert result.val_loss == averaged == trainer.evaluate().loss != own
    assert trainer.generate_text("f", max_new_tokens=1, temperature=0) == chr(97 + text % 26)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_the_average_goes_on_after_a_resume(tmp_path: Path) -> None:
    def run(directory: Path, steps: int) -> EMA:
        ema = EMA(0.9)
        tiny_trainer(directory, model=Bigram(), callbacks=[ema], max_steps=steps, schedule="constant").train()
        return ema

    whole = run(tmp_path / "one", 6)
    run(tmp_path / "two", 3)
    halves = run(tmp_path / "two", 6)
    assert all(torch.equal(whole.averages[name], halves.averages[name]) for name in whole.averages)


def test_an_average_of_another_model_is_refused() -> None:
    ema = EMA()
    ema.load_state_dict({"averages": {"head.weight": torch.zeros(3, 3)}})
    with pytest.raises(RuntimeError, match=r"average of 'head.weight' is \(3, 3\)"):
        tiny_trainer(model=Bigram(), callbacks=[ema]).train()
    with pytest.raises(ValueError, match=r"decay is 1\.0"):
        EMA(1.0)
