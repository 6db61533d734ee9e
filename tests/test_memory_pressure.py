"""When memory runs out the same step is done in smaller pieces, and nothing of its result changes.

The allocator is made to fail by a model that refuses batches of more rows than fit; the errors are PyTorch's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import BATCH, LENGTH, VOCAB, Bigram, copy_of, one_thread, tiny_trainer, tokens  # noqa: F401

from fasttrain.callbacks import Callback
from fasttrain.evaluation import Pieces, evaluate

CPU_TEXT = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B"


class Narrow(Bigram):
    """Holds at most `fits` rows; fails in the forward or only in the backward, when gradients are half added."""

    def __init__(self, fits: int = 2, where: str = "forward", error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.fits, self.where, self.error, self.failures = fits, where, error, 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        too_many = input_ids.size(0) > self.fits
        if too_many and self.where == "forward":
            self._fail()
        logits = super().forward(input_ids)
        if too_many and torch.is_grad_enabled():
            # Reached after the head's gradient was accumulated and before the table's.
            self.table.weight.register_post_accumulate_grad_hook(lambda p: None)
            hidden = self.table(input_ids)
            hidden.register_hook(lambda grad: self._fail())
            logits = self.head(hidden)
        return logits

    def _fail(self) -> None:
        self.failures += 1
        raise self.error(CPU_TEXT if self.error is RuntimeError else "CUDA out of memory.")


def batches(rows: int = 8, count: int = 6) -> list[Any]:
    x = tokens(rows * LENGTH * count).view(count, rows, LENGTH)
    y = (x * 3 + 1) % VOCAB
    y[-1, 0, :3], y[count // 3, rows - 1, 2:] = -100, -100
    return [(a, b) for a, b in zip(x, y)]


class Events(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_event(self, state: Any, kind: str, details: Any) -> None:
        self.seen.append((kind, details.get("pieces", 0)))


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, MemoryError])
def test_the_step_is_done_again_in_pieces_with_the_same_result(where: str, error: type[Exception]) -> None:
    events = Events()
    roomy = tiny_trainer(loader=batches(), model=Bigram(), grad_accum_steps=3, max_steps=2)
    tight = tiny_trainer(loader=batches(), model=Narrow(2, where, error), grad_accum_steps=3, max_steps=2,
                         callbacks=[events])
    wanted, got = roomy.train(), tight.train()
    assert got.train_loss == pytest.approx(wanted.train_loss, rel=1e-6)
    assert (got.step, got.tokens_seen, got.status) == (wanted.step, wanted.tokens_seen, "completed")
    for (name, a), (_, b) in zip(roomy.model.named_parameters(), tight.model.named_parameters()):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert events.seen == [("out_of_memory", 2), ("out_of_memory", 4)]  # told when it happens, then never again
    assert tight.model.failures == 2


def test_the_finer_division_is_remembered_over_a_resume(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path, batches(), Narrow(), max_steps=2)
    first.train()
    second = tiny_trainer(tmp_path, batches(), Narrow(), max_steps=4)
    second.train()
    assert (first.model.failures, second.model.failures) == (2, 0)


def test_a_row_that_does_not_fit_alone_ends_the_run_with_the_way_out() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"step 1.*one sequence.*shorter sequences.*DefaultCPUAllocator"):
        tiny_trainer(loader=batches(), model=Narrow(fits=0)).train()


def test_another_error_is_not_taken_for_a_full_memory() -> None:
    class Broken(Bigram):
        calls = 0

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = Broken()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        tiny_trainer(loader=batches(), model=model).train()
    assert model.calls == 1


def test_dropout_draws_the_same_when_the_window_is_done_again() -> None:
    """The micro-batches before the one that failed are drawn with their own random states."""
    class Noisy(Narrow):
        def __init__(self, fits: int) -> None:
            super().__init__(fits)
            self.drawn: list[float] = []

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            self.drawn.append(float(torch.rand(())))
            return super().forward(input_ids)

    small, large = batches(2, 1), batches(8, 1)
    model = Noisy(2)
    tiny_trainer(loader=[*small, *large], model=model, grad_accum_steps=2, max_steps=1).train()
    # small | large fails | small again, divided into 2 | large in 2 fails | ... in 4
    assert model.drawn[0] == model.drawn[2] == model.drawn[5]


def test_evaluation_divides_its_own_batches_and_training_keeps_its() -> None:
    data, pieces = batches(), Pieces()
    wanted = evaluate(Bigram(), data)
    model = Narrow()
    got = evaluate(model, data, pieces=pieces)
    assert (got.num_targets, got.accuracy) == (wanted.num_targets, wanted.accuracy)
    assert got.loss == pytest.approx(wanted.loss, rel=1e-12)
    assert (pieces.count, model.failures) == (4, 2)
    evaluate(model, data, pieces=pieces)
    assert model.failures == 2
    trainer = tiny_trainer(loader=batches(rows=BATCH), model=Narrow(), val_dataloader=data, max_steps=1)
    trainer.train()
    assert trainer.state is not None and trainer.state.counters.num_pieces == 1
