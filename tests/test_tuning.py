"""optimize="auto" keeps what is faster and the same, refuses what is faster and different, and leaves no trace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Bigram, copy_of, one_thread, plain_loader, tiny_gpt, tiny_trainer, tokens  # noqa: F401
from torch import nn

from fasttrain.training_loop import Parts
from fasttrain.tuning import Candidate, tune
from fasttrain.verification import first_difference

BATCH = tokens(16).view(2, 8)


class Slow(Bigram):
    """Waits in each forward, as long as `pause` says."""

    pause, factor = 0.004, 1.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        time.sleep(self.pause)
        return super().forward(input_ids) * self.factor


def switch(name: str, **changes: float) -> Candidate:
    def turn_on(model: nn.Module) -> Any:
        before = {key: getattr(model, key) for key in changes}
        for key, value in changes.items():
            setattr(model, key, value)
        return model, lambda: [setattr(model, key, value) for key, value in before.items()]
    return Candidate(name, name, turn_on)


def test_what_is_faster_and_the_same_is_kept_and_the_rest_refused_with_its_measurement() -> None:
    model = Slow()
    _, decisions = tune(model, BATCH, Parts(), [
        switch("slower", pause=0.012), switch("wrong", pause=0.0, factor=1.5), switch("good", pause=0.0)])
    assert [(item.name, item.on) for item in decisions] == [("slower", False), ("wrong", False), ("good", True)]
    for item, words in zip(decisions, ("not faster", "not the same computation", "tolerance 1e-03")):
        assert words in item.reason and "->" in item.reason
    assert (model.pause, model.factor) == (0.0, 1.0)
    decisions[-1].restore()
    assert model.pause == 0.004


def test_a_candidate_that_fails_on_this_model_is_refused_with_the_reason() -> None:
    def explode(model: nn.Module) -> Any:
        raise RuntimeError("no compiler here")

    model = Bigram()
    kept, (decision,) = tune(model, BATCH, Parts(), [Candidate("torch.compile", "torch.compile", explode)])
    assert kept is model and not decision.on and "no compiler here" in decision.reason


def test_trying_leaves_weights_gradients_and_generators_alone() -> None:
    model = Slow()
    before, generator = copy_of(dict(model.state_dict())), torch.get_rng_state()
    tune(model, BATCH, Parts(), [switch("good", pause=0.0)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), generator)


def test_a_run_with_auto_reports_what_was_tried(monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fasttrain.tuning.default_candidates", lambda: [switch("haste", pause=0.0)])
    trainer = tiny_trainer(loader=[BATCH], model=Slow(), optimize="auto", max_steps=2)
    assert trainer.train().status == "completed"
    output = capsys.readouterr().out
    assert "trying haste" in output and "on: haste: " in output and "gradients equal to" in output


def test_a_run_in_which_nothing_was_kept_is_the_run_without_trying(monkeypatch: pytest.MonkeyPatch,
                                                                   tmp_path: Path) -> None:
    """Dropout, a shuffling loader and a batch norm's averages: weights, moments, generators and the data position."""
    def compiled(model: nn.Module) -> Any:
        time.sleep(0.001)
        return torch.compile(model, backend="eager"), lambda: None

    class Wrong(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self._orig_mod(input_ids) * 2.0

    class Normed(Bigram):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(29), nn.Dropout(0.5)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.drop(self.norm(super().forward(input_ids).transpose(1, 2)).transpose(1, 2))

    monkeypatch.setattr("fasttrain.tuning._GAIN", 100.0)
    monkeypatch.setattr("fasttrain.tuning.default_candidates", lambda: [
        Candidate("torch.compile", "torch.compile", compiled),
        Candidate("wrong", "wrong", lambda model: (Wrong(model), lambda: None))])
    trees = {}
    for optimize in ("manual", "auto"):
        trainer = tiny_trainer(tmp_path / optimize, plain_loader(), Normed(), optimize=optimize, max_steps=7)
        trainer.train()
        assert trainer.state is not None
        trees[optimize] = copy_of(trainer.state.capture())
        kept = {item.name: item.on for item in trainer.optimizations if "->" in item.reason}
        assert kept == ({"torch.compile": False, "wrong": False} if optimize == "auto" else {})
    assert first_difference(trees["manual"], trees["auto"]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_real_torch_compile_is_measured_equal_and_leaves_the_weights_alone(family: str) -> None:
    if family == "gpt":
        model: nn.Module = tiny_gpt(dropout=0.0)
    else:
        transformers = pytest.importorskip("transformers")
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=29, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    before, generator = copy_of(dict(model.state_dict())), torch.get_rng_state()
    kept, decisions = tune(model, BATCH, Parts())
    decision = next(item for item in decisions if item.name == "torch.compile")
    print(family, decision)
    assert "gradients equal to" in decision.reason and "not the same" not in decision.reason, decision.reason
    if family == "gpt":  # a Llama's base model is compiled in place
        assert (kept is not model) == decision.on
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator) and all(p.grad is None for p in model.parameters())
