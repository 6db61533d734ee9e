"""The head is used where head times hidden states is the model's logits, proven per model, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_runs import tokens
from torch import nn

from fasttrain.evaluation import evaluate
from fasttrain.heads import linear_head
from fasttrain.losses import batch_loss
from fasttrain.ops import cross_entropy

transformers = pytest.importorskip("transformers")

V = 29
SHAPE = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "Llama tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)),
    "Phi (bias)": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SHAPE)),
    "Gemma 2 (softcap)": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        **SHAPE, head_dim=8, final_logit_softcapping=2.0)),
    "Granite (scaling)": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(
        **SHAPE, logits_scaling=4.0)),
    "Cohere (scale)": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SHAPE, logit_scale=0.25)),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():  # biases are born as zeros, which would hide that they are used
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.eval()


def padded_batch() -> dict[str, torch.Tensor]:
    ids = tokens(4 * 12).view(4, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[3, 3:] = 0, 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_from_hidden_states_is_the_models_own_with_every_gradient(name: str) -> None:
    model, batch = made(name), padded_batch()
    head, reason = linear_head(model)
    assert head is not None, reason
    assert "no logits are made" in reason
    model.zero_grad()
    own = model(**batch).loss
    own.backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss_sum, count = batch_loss(model, batch)
    (loss_sum / count).backward()
    torch.testing.assert_close(loss_sum / count, own, rtol=1e-4, atol=1e-5)
    for key, p in model.named_parameters():
        if key in wanted:
            torch.testing.assert_close(p.grad, wanted[key], rtol=1e-3, atol=1e-5, msg=lambda t, key=key: f"{key}: {t}")


def test_no_logits_are_made_for_a_hugging_face_model() -> None:
    model = made("Llama")
    linear_head(model)  # the check itself makes the logits of four tokens
    calls: list[str] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    batch_loss(model, padded_batch())
    assert calls == []
    evaluate(model, [padded_batch()])
    assert calls == []


def test_the_check_leaves_modes_and_generators_alone_and_is_done_once() -> None:
    model = made("GPT-2").train()
    model.transformer.h[0].eval()
    before, calls = torch.get_rng_state(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        linear_head(model)
    assert len(calls) == 1 and torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.transformer.h[0].training


def test_logits_that_are_more_than_head_times_hidden_keep_their_logits_with_a_reason() -> None:
    class Shifted(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(V) * 0.1
            return output

    torch.manual_seed(0)
    model, batch = Shifted(transformers.LlamaConfig(**SHAPE)).eval(), padded_batch()
    head, reason = linear_head(model)
    assert head is None and "are not its head times its last hidden states" in reason
    loss_sum, count = batch_loss(model, batch)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    own = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss_sum / count, own)


def test_a_head_of_zeros_and_a_model_compiled_as_a_whole_keep_their_logits() -> None:
    model = made("Llama")
    head, reason = linear_head(torch.compile(model, backend="eager"))
    assert head is None and "wrapped as a whole" in reason
    with torch.no_grad():
        model.lm_head.weight.zero_()
    head, reason = linear_head(model)
    assert head is None and "all logits" in reason
    with torch.no_grad():
        model.lm_head.weight.normal_()
    assert linear_head(model)[0] is not None  # that verdict was not final


@pytest.mark.parametrize("name", ["Llama", "Gemma 2 (softcap)", "Phi (bias)"])
def test_evaluation_in_chunks_of_rows_is_that_of_the_whole_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(name), padded_batch()
    monkeypatch.setattr("fasttrain.evaluation._LOGITS_BYTES", 4 * V * 5)  # 5 rows of 48
    result = evaluate(model, [batch])
    with torch.no_grad():
        output = model(**batch)
    wanted = batch["labels"][:, 1:]
    right = (output.logits[:, :-1].argmax(-1) == wanted).sum() / (wanted != -100).sum()
    assert result.loss == pytest.approx(float(output.loss), rel=1e-5)
    assert result.accuracy == pytest.approx(float(right))


def test_a_mixture_of_experts_with_a_router_loss_is_refused() -> None:
    from fasttrain import Trainer

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = transformers.MixtralConfig(output_router_logits=True)
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match="output_router_logits"):
        Trainer(Routed())
