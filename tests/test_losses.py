"""Batches and models of every form give the same sum and the same count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import VOCAB, Bigram, one_thread, tokens  # noqa: F401
from torch import Tensor, nn

from fasttrain.losses import IGNORE, batch_loss, check_is_causal, linear_head, shift_left
from fasttrain.models.gpt import GPT, GPTConfig

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


class WithHead(nn.Module):
    """A model that can return its hidden states instead of its logits; notes which it made."""

    def __init__(self, bias: bool = True, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 12)
        self.head: nn.Module = self.embedding if tied else nn.Linear(12, VOCAB, bias=bias)
        self.calls: list[str] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, return_hidden: bool = False) -> Tensor:
        self.calls.append("hidden" if return_hidden else "logits")
        hidden = self.embedding(input_ids).tanh()
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        return hidden if return_hidden else F.linear(hidden, self.head.weight, getattr(self.head, "bias", None))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class LogitsOnly(nn.Module):
    """The same model behind a forward that does not offer hidden states."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(input_ids, attention_mask=attention_mask)


def loss_and_gradients(model: nn.Module, batch: Any) -> list[Tensor]:
    model.zero_grad()
    loss, count = batch_loss(model, batch)
    loss.backward()
    return [loss.detach(), count, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


LABELS = IDS.clone()
LABELS[0, :3] = IGNORE
BATCHES: list[Any] = [IDS, (IDS, LABELS), {"input_ids": IDS, "labels": LABELS, "attention_mask": (LABELS >= 0).long()}]
GPT_CONFIG = GPTConfig(vocab_size=VOCAB, hidden_size=16, num_layers=1, num_heads=2, max_seq_len=8)


@pytest.mark.parametrize(
    "make",
    [WithHead, lambda: WithHead(bias=False), lambda: WithHead(tied=True), lambda: GPT(GPT_CONFIG)],
    ids=["bias", "no bias", "tied", "GPT"],
)
@pytest.mark.parametrize("batch", BATCHES, ids=["ids", "pair", "dict"])
def test_a_model_that_gives_hidden_states_has_the_loss_and_gradients_of_its_logits(make: Any, batch: Any) -> None:
    model = make()
    got, want = loss_and_gradients(model, batch), loss_and_gradients(LogitsOnly(model), batch)
    assert len(got) == len(want) == 2 + len(list(model.parameters()))
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs)


def test_no_logits_are_made_where_hidden_states_can_be_had_also_through_a_compiled_model() -> None:
    model = WithHead()
    plain = loss_and_gradients(model, IDS)
    compiled = loss_and_gradients(torch.compile(model, backend="eager"), IDS)  # type: ignore[arg-type]
    assert set(model.calls) == {"hidden"}
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled))


def test_a_head_that_is_more_than_a_weight_and_a_loss_of_the_models_own_keep_their_logits() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class OwnLoss(WithHead):
        def forward(self, input_ids: Tensor, targets: Tensor, return_hidden: bool = False) -> Any:  # type: ignore[override]
            logits = super().forward(input_ids)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model = WithHead()
    model.head = Scaled(12, VOCAB)
    for made, reason in ((model, "is a Scaled"), (OwnLoss(), "loss of its own"), (Bigram(), "return_hidden=True")):
        batch_loss(made, (IDS, IDS))
        head, why = linear_head(made)
        assert head is None and reason in why
        assert "hidden" not in getattr(made, "calls", [])


def test_hidden_states_of_the_wrong_shape_are_refused() -> None:
    class Cut(WithHead):
        def forward(self, input_ids: Tensor, return_hidden: bool = False) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, return_hidden=return_hidden)[..., :7]

    with pytest.raises(ValueError, match=r"shape \(2, 6, 7\) for return_hidden=True.*\(B, T, 12\)"):
        batch_loss(Cut(), IDS)
