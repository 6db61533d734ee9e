"""Batches and models of every form give the same sum and the same count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import VOCAB, Bigram, one_thread, tokens  # noqa: F401
from torch import Tensor, nn

from fasttrain.losses import IGNORE, batch_loss, check_is_causal, shift_left

IDS = tokens(12).view(2, 6)


def truth(model: nn.Module, targets: Tensor) -> tuple[float, int]:
    losses = F.cross_entropy(Bigram.forward(model, IDS).flatten(0, 1), targets.flatten(), reduction="none")  # type: ignore[arg-type]
    return float(losses.detach().sum()), int((targets != IGNORE).sum())


def measured(model: nn.Module, batch: Any) -> tuple[float, int]:
    loss_sum, count = batch_loss(model, batch)
    assert (loss_sum.dtype, count.dtype, loss_sum.dim(), count.dim()) == (torch.float32, torch.int64, 0, 0)
    return float(loss_sum.detach()), int(count)


def same(one: tuple[float, int], other: tuple[float, int]) -> bool:
    return one[1] == other[1] and one[0] == pytest.approx(other[0], rel=1e-5)


def test_labels_are_shifted_in_a_dict_and_a_tensor_but_not_in_a_pair() -> None:
    model = Bigram()
    shifted = torch.cat([IDS[:, 1:], torch.full((2, 1), IGNORE)], dim=1)
    expected = truth(model, shifted)
    assert expected[1] == 10
    assert same(measured(model, {"input_ids": IDS, "labels": IDS}), expected)
    assert same(measured(model, {"input_ids": IDS}), expected)
    assert same(measured(model, IDS), expected)
    assert same(measured(model, (IDS, shifted)), expected)
    assert same(measured(model, [IDS, IDS]), truth(model, IDS))
    assert torch.equal(shift_left(IDS), shifted)


def test_ignored_labels_and_padding_are_no_targets() -> None:
    model = Bigram()
    labels = IDS.clone()
    labels[0, :4] = IGNORE
    assert same(measured(model, {"input_ids": IDS, "labels": labels}), truth(model, shift_left(labels)))
    mask = torch.ones_like(IDS)
    mask[1, 3:] = 0
    assert same(measured(model, {"input_ids": IDS, "attention_mask": mask}),
                truth(model, shift_left(IDS.masked_fill(mask == 0, IGNORE))))


def test_a_batch_without_targets_is_zero_over_zero_with_zero_gradient() -> None:
    model = Bigram()
    loss_sum, count = batch_loss(model, (IDS, torch.full_like(IDS, IGNORE)))
    loss_sum.backward()
    assert float(loss_sum.detach()) == 0 and int(count) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


class Output:
    def __init__(self, logits: Tensor | None, loss: Tensor | None = None) -> None:
        self.logits, self.loss = logits, loss


@pytest.mark.parametrize("wrap", [
    lambda logits: (logits, None), lambda logits: {"logits": logits}, Output,
    lambda logits: {"logits": logits, "loss": None},
], ids=["pair", "dict", "object", "dict with loss None"])
def test_logits_are_found_in_every_kind_of_output(wrap: Any) -> None:
    class Wrapped(Bigram):
        def forward(self, input_ids: Tensor) -> Any:
            return wrap(super().forward(input_ids))

    assert same(measured(Wrapped(), (IDS, IDS)), truth(Bigram(), IDS))


@pytest.mark.parametrize("wrap", [
    lambda logits, loss: (logits, loss), lambda logits, loss: (loss, logits), lambda logits, loss: {"loss": loss},
    lambda logits, loss: loss, lambda logits, loss: Output(logits, loss),
], ids=["logits, loss", "loss, logits", "dict", "scalar", "object"])
def test_a_loss_of_the_models_own_wins_and_counts_as_a_mean_over_the_targets(wrap: Any) -> None:
    class Own(Bigram):
        def forward(self, input_ids: Tensor) -> Any:
            logits = super().forward(input_ids)
            return wrap(logits, logits.square().mean())

    labels = IDS.clone()
    labels[0, :3] = IGNORE
    own = float(Bigram()(IDS).detach().square().mean())
    assert same(measured(Own(), (IDS, labels)), (own * 9, 9))


def test_a_forward_with_targets_gets_them_shifted_as_nanogpts_does() -> None:
    class NanoGPT(Bigram):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
            logits = super().forward(idx)
            if targets is None:
                return logits[:, -1:], None
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    assert same(measured(NanoGPT(), IDS), truth(Bigram(), shift_left(IDS)))


def test_only_what_forward_accepts_is_passed_on() -> None:
    seen = {}

    class Masked(Bigram):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            seen["mask"] = attention_mask
            return super().forward(input_ids)

    mask = torch.ones_like(IDS)
    batch = {"input_ids": IDS, "attention_mask": mask, "special_tokens_mask": mask}
    batch_loss(Masked(), batch)
    assert seen["mask"] is mask
    batch_loss(Bigram(), batch)


@pytest.mark.parametrize(("batch", "message"), [
    ({"ids": IDS}, "must hold 'input_ids'"), ("text", "the batch is a str"), ((IDS, IDS, IDS), "the batch is a tuple"),
    ((IDS, IDS[:, :3]), r"logits of shape \(2, 6, 29\) for targets of shape \(2, 3\)"),
])
def test_batches_of_another_form_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_loss(Bigram(), batch)


def test_an_output_of_another_form_is_refused() -> None:
    class Odd(Bigram):
        def forward(self, input_ids: Tensor) -> Any:
            return input_ids

    with pytest.raises(ValueError, match=r"torch\.int64 tensor"):
        batch_loss(Odd(), IDS)


def test_a_label_outside_the_vocabulary_is_an_index_error() -> None:
    for label in (VOCAB, -1):
        with pytest.raises(IndexError, match=str(label)):
            batch_loss(Bigram(), (IDS, torch.full_like(IDS, label)))


def test_models_with_another_objective_are_refused() -> None:
    model = Bigram()
    check_is_causal(model)
    model.loss_type = "ForMaskedLM"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"ForMaskedLM.*loss_fn"):
        check_is_causal(model)


def test_bfloat16_logits_still_give_a_float32_sum() -> None:
    model = Bigram().to(torch.bfloat16)
    assert measured(model, (IDS, IDS))[0] == pytest.approx(truth(Bigram(), IDS)[0], rel=0.02)
