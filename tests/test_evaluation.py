"""Evaluation: exact for any batch size, constant memory, and nothing is left changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import LENGTH, VOCAB, Bigram, one_thread, plain_loader, tiny_gpt, token_loader, tokens  # noqa: F401
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fasttrain.evaluation import evaluate
from fasttrain.losses import IGNORE, batch_loss
from fasttrain.utils import capture_rng

X = tokens(13 * LENGTH).view(13, LENGTH)
Y = torch.where(tokens(13 * LENGTH, seed=1).view(13, LENGTH) < 9, IGNORE, (X * 3 + 1) % VOCAB)  # ragged targets
DATA = TensorDataset(X, Y)


def truth(model: Any) -> tuple[float, float, int]:
    logits = model(X).detach().flatten(0, 1).double()
    counted = Y.flatten() != IGNORE
    loss = F.cross_entropy(logits, Y.flatten(), ignore_index=IGNORE)
    correct = (logits.argmax(1) == Y.flatten())[counted].double().mean()
    return float(loss), float(correct), int(counted.sum())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 13])
def test_the_result_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    model = Bigram()
    result = evaluate(model, DataLoader(DATA, batch_size=batch_size))
    loss, accuracy, count = truth(model)
    assert result.num_targets == count
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert result.bits_per_byte is None


def test_bits_per_byte_are_nats_per_target_over_bytes_per_token() -> None:
    result = evaluate(Bigram(), DataLoader(DATA), bytes_per_token=3.5)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 3.5)
    loader = token_loader(2)
    loader.dataset.bytes_per_token = 2.0
    from_data = evaluate(Bigram(), loader)
    assert from_data.bits_per_byte == pytest.approx(from_data.loss / math.log(2) / 2)


def test_a_custom_loss_is_summed_and_divided_once_and_has_no_accuracy() -> None:
    result = evaluate(Bigram(), DataLoader(DATA, batch_size=5), loss_fn=batch_loss)
    assert result.loss == pytest.approx(truth(Bigram())[0], rel=1e-5)
    assert result.accuracy is None


def test_a_models_own_loss_is_weighted_by_targets_not_by_batches() -> None:
    class Own(Bigram):
        def forward(self, input_ids: Tensor, targets: Tensor) -> Any:  # type: ignore[override]
            logits = super().forward(input_ids)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    result = evaluate(Own(), DataLoader(DATA, batch_size=5))
    loss, accuracy, _ = truth(Bigram())
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.accuracy == pytest.approx(accuracy)


def test_modes_generators_gradients_and_positions_are_left_as_they_were() -> None:
    model = tiny_gpt(dropout=0.5)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    loader = token_loader()
    iterator = iter(loader)
    next(iterator), next(iterator)
    position, states = loader.state_dict(), capture_rng()
    first = evaluate(model, loader)
    assert loader.state_dict() == position
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(states[name], state) for name, state in capture_rng().items())
    assert all(p.grad is None for p in model.parameters())
    assert evaluate(model, loader) == first  # dropout was off
    batch = next(iterator)
    assert torch.equal(batch[0], list(token_loader())[2][0])


def test_two_evaluations_of_a_shuffling_loader_see_the_same_batches() -> None:
    model, loader = Bigram(), plain_loader()
    one = evaluate(model, loader, max_batches=2)
    torch.rand(7)
    assert evaluate(model, loader, max_batches=2) == one
    assert one.num_targets == 2 * 2 * LENGTH


def test_memory_does_not_grow_with_the_data() -> None:
    """The logits of all batches would be 40 times one batch's."""
    alive = []

    class Watched(Bigram):
        def forward(self, input_ids: Tensor) -> Tensor:
            logits = super().forward(input_ids)
            alive.append(torch.utils.weak.WeakIdRef(logits))
            return logits

    evaluate(Watched(), [(X, Y)] * 40)
    assert sum(reference() is not None for reference in alive) == 0


def test_data_without_a_batch_or_a_target_are_refused() -> None:
    with pytest.raises(ValueError, match="yields no batch"):
        evaluate(Bigram(), [])
    with pytest.raises(ValueError, match="no target"):
        evaluate(Bigram(), [(X, torch.full_like(Y, IGNORE))])


def test_a_nan_stays_a_nan() -> None:
    model = Bigram()
    torch.nn.init.constant_(model.head.bias, float("nan"))
    result = evaluate(model, DataLoader(DATA))
    assert math.isnan(result.loss) and math.isnan(result.perplexity)


def test_modes_come_back_even_if_the_model_fails() -> None:
    class Failing(Bigram):
        def forward(self, input_ids: Tensor) -> Tensor:
            raise KeyError("inside")

    model = Failing().train()
    with pytest.raises(KeyError):
        evaluate(model, DataLoader(DATA))
    assert model.training
