"""What made a step non-finite is on the disk afterwards, and computes to the same again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import BATCH, LENGTH, VOCAB, Bigram, copy_of, one_thread, plain_loader, tiny_trainer, tokens  # noqa: F401
from torch import Tensor, nn

from fasttrain.capsule import NonfiniteRecorder, replay_capsule
from fasttrain.checkpointing import load_checkpoint, read_manifest
from fasttrain.verification import first_difference

POISON = 7


class Faulty(nn.Module):
    """Divides by zero in one of its modules when a batch holds the poisoned token and dropout keeps its unit."""

    def __init__(self, where: str = "forward") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, 8)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))
        self.divide = Divide(where)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.divide(self.middle(self.table(ids)), (ids == POISON).any()))


class Divide(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, hidden: Tensor, poisoned: Tensor) -> Tensor:
        if not poisoned:
            return hidden
        if self.where == "forward":
            return hidden / 0.0
        return hidden + torch.sqrt(hidden * 0.0)  # 0 forward, 0 * inf backward


def poisoned_batches(count: int = 6, bad: int = 4) -> list[Any]:
    x = tokens(count * BATCH * LENGTH).view(count, BATCH, LENGTH)
    x = torch.where(x == POISON, POISON + 1, x)
    x[bad, 1, 3] = POISON
    return [(each, each) for each in x]


@pytest.mark.parametrize(("where", "named"), [("forward", "'divide'"), ("backward", "gradient of 'table.weight'")])
def test_a_capsule_names_the_first_module_and_computes_to_the_same_again(
        where: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(tmp_path, poisoned_batches(), Faulty(where), grad_accum_steps=2, max_steps=3)
    assert trainer.train().nonfinite_steps == 1
    (path,) = (tmp_path / "nonfinite").glob("step-*")
    facts = read_manifest(path).metadata
    assert path.name == "step-00000003" and named in str(facts["finding"]) and facts["micro_batch"] == 0
    assert (facts["epoch"], facts["batches_up_to"]) == (0, 6) and "capsule in" in capsys.readouterr().out
    finding = replay_capsule(path, Faulty(where))
    assert str(finding) == facts["finding"]
    assert repr(finding.loss) == facts["loss"]  # to the last bit, dropout included
    assert math.isfinite(finding.loss) == (where == "backward")
    saved = load_checkpoint(path)["batches"]
    assert torch.equal(saved[0][0], poisoned_batches()[4][0])
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("nonfinite_capsule") == 1


def test_recording_changes_no_bit_of_the_run(tmp_path: Path) -> None:
    class Silent(NonfiniteRecorder):
        def on_nonfinite(self, state: Any) -> None:
            pass

    runs = []
    for callbacks in ([], [Silent()]):
        trainer = tiny_trainer(tmp_path / str(len(callbacks)), poisoned_batches(bad=2), Faulty(), callbacks=callbacks)
        trainer.train()
        state = trainer.state
        assert state is not None
        state.callbacks = ()
        runs.append(copy_of(state.capture()))
    assert first_difference(*runs) == ""


def test_no_more_than_the_first_few_steps_are_recorded(tmp_path: Path) -> None:
    batches = [(each * 0 + POISON, each) for each in tokens(9 * BATCH * LENGTH).view(9, BATCH, LENGTH)]
    tiny_trainer(tmp_path, batches, Faulty(), max_steps=9, callbacks=[NonfiniteRecorder(max_capsules=2)]).train()
    assert len(list((tmp_path / "nonfinite").glob("step-*"))) == 2


def test_weights_that_are_not_finite_are_named() -> None:
    model = Bigram()
    with torch.no_grad():
        model.head.bias[3] = math.nan
    trainer = tiny_trainer(loader=plain_loader(), model=model, max_steps=1)
    trainer.train()
    from fasttrain.capsule import find_nonfinite
    from fasttrain.losses import batch_loss

    assert trainer.state is not None
    finding = find_nonfinite(trainer.model, batch_loss, trainer.state.judged)
    assert finding.weights == ("head.bias",) and "already not finite: head.bias" in str(finding)
