"""score(): the log-probabilities of plain log_softmax for every kind of model, alone and in ragged batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_generation import BYTES, PROMPTS, OnlyLogits, byte_model, hugging_face, one_thread
from torch import Tensor, nn

from fasttrain.scoring import Scored, score

__all__ = ["one_thread"]
IDS = [list(prompt.encode()) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["ours", "gpt2", "llama", "no cache"])
def test_scores_are_the_models_log_probabilities_alone_and_in_a_ragged_batch(family: str) -> None:
    models: Any = {"no cache": lambda: OnlyLogits(byte_model()), "ours": byte_model}
    model = models.get(family, lambda: hugging_face(family))()
    together = score(model, IDS)
    for ids, scored in zip(IDS, together):
        with torch.inference_mode():
            output = model(torch.tensor([ids]))
        logits = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits
        expected = logits[0, :-1].log_softmax(1).gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
        assert scored.ids == ids and scored.logprobs == pytest.approx(expected, abs=2e-4)
        assert score(model, [ids])[0].logprobs == pytest.approx(expected, abs=2e-4)
        assert scored.total == pytest.approx(sum(expected), abs=1e-3)
    assert together[1] == Scored(IDS[1], []) and math.isnan(together[1].perplexity)
    assert together[0].perplexity == pytest.approx(math.exp(-together[0].total / (len(IDS[0]) - 1)))


def test_text_is_scored_like_its_ids_and_training_is_left_alone() -> None:
    model = byte_model(dropout=0.3).train()
    state = torch.get_rng_state()
    scored = score(model, "naïve €uro", tokenizer=BYTES)
    assert scored == score(model, ["naïve €uro"], tokenizer=BYTES)[0] == score(model, [list("naïve €uro".encode())])[0]
    assert model.training and torch.equal(torch.get_rng_state(), state) and score(model, []) == []


def test_many_texts_take_calls_of_bounded_size() -> None:
    model, sizes = byte_model(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    texts = [[1] * (2 + i % 90) for i in range(300)]
    scored = score(model, texts)
    assert max(sizes) <= 4096 and [row.ids for row in scored] == texts and len(sizes) < 20


def test_what_cannot_be_scored_says_why() -> None:
    class NotANumber(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.full((*ids.shape, 9), math.nan)

    for prompt, message in (("", "text 0 is empty"), ("x" * 97, "97 tokens; the model's context is 96"),
                            ([[1], [1, 300]], "prompt 1 holds token id 300")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            score(byte_model(), prompt, tokenizer=BYTES)
    with pytest.raises(ValueError, match="a text needs a tokenizer"):
        score(byte_model(), "x")
    with pytest.raises(ValueError, match="text 1: the model gives NaN"):
        score(NotANumber(), [[1], [1, 2]])
