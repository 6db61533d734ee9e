"""Beams, speculation, several samples, long texts, details: each equals the plain way, alone, batched and streamed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from test_generation import BYTES, PROMPTS, OnlyLogits, byte_model, hugging_face, one_thread
from torch import Tensor, nn

from fasttrain.config import GenerationConfig, from_dict, to_dict
from fasttrain.decoding import decoder_for
from fasttrain.generation import Generated, generate
from fasttrain.models.gpt import GPT
from fasttrain.trainer import Trainer

__all__ = ["one_thread"]  # a fixture that every test here uses
IDS = [list(prompt.encode()) for prompt in PROMPTS]
FAMILIES = ["ours", "gpt2", "llama", "no cache"]


def model_of(family: str) -> Any:
    if family == "no cache":
        return OnlyLogits(byte_model())
    return byte_model() if family == "ours" else hugging_face(family)


# One of everything that chooses a token; each must be the same alone, streamed and without a cache.
STRATEGIES: dict[str, dict[str, Any]] = {
    "typical": {"typical_p": 0.7, "temperature": 1.4},
    "epsilon": {"epsilon": 0.01},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "llama.cpp": {"order": "llama.cpp", "top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "vllm": {"order": "vllm", "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3, "temperature": 0},
    "dry": {"dry_multiplier": 0.8, "temperature": 0, "dry_allowed_length": 1},
    "ngram": {"no_repeat_ngram": 2, "temperature": 0.3},
    "bans": {"banned_tokens": tuple(range(97, 123)), "logit_bias": {32: 3.0}, "min_new_tokens": 9},
    "lookup": {"speculation": "lookup", "num_draft_tokens": 4, "temperature": 0.5},
    "beams": {"num_beams": 3, "length_penalty": 0.7},
    "samples": {"num_samples": 3},
    "processor": {"processors": (lambda ids, logits: logits.index_fill(1, ids[0, -1:], -math.inf),)},
    "sliding": {"long_text": "sliding", "max_new_tokens": 120},
}


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_every_strategy_gives_a_row_the_same_text_alone_batched_streamed_and_uncached(options: dict[str, Any]) -> None:
    model = byte_model()
    options = {"max_new_tokens": 24, "tokenizer": BYTES, "eos_token_id": (0, 65, 200), "stop": ("\x01\x02",), **options}
    if "num_beams" in options:
        del options["stop"]
    num = options.get("num_samples", 1)
    together = generate(model, PROMPTS, **options)
    alone = [generate(model, prompt, **options, seed=num * i) for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    streamed = [""] * (num * len(PROMPTS))
    for row, piece in generate(model, PROMPTS, **options, stream=True):
        streamed[row] += piece
    flat = together if num == 1 else [text for texts in together for text in texts]
    assert streamed == flat and len(set(flat)) > 1
    if options.get("long_text") != "sliding":  # a model without a config names no context
        assert generate(OnlyLogits(model), PROMPTS, **options) == together


# --- Speculation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_speculation_changes_nothing_but_the_number_of_model_calls(family: str, temperature: float) -> None:
    model, draft = model_of(family), byte_model(num_layers=1)
    options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 40, "seed": 5, "eos_token_id": 65}
    options |= {"repetition_penalty": 0.7, "presence_penalty": 0.1}  # rewards repeats, so that there are some to find
    plain = generate(model, IDS, **options, details=True, logprobs="processed")
    for guesses in ({"speculation": "lookup"}, {"draft_model": draft}, {"draft_model": model, "num_draft_tokens": 3}):
        if guesses.get("draft_model") is model and family == "no cache":
            continue
        found = generate(model, IDS, **options, **guesses, details=True, logprobs="processed")
        for ours, theirs in zip(found, plain):
            assert ours.ids == theirs.ids and ours.finish_reason == theirs.finish_reason
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            # Every token but the last was read, by a call or by being guessed; the first call reads the prompt.
            assert ours.model_calls + ours.accepted == len(ours.ids)
            assert 0 <= ours.accepted <= ours.drafted
        if guesses.get("draft_model") is model:  # it guesses what the model says, short of the penalties
            assert sum(row.accepted for row in found) > 0


def test_a_draft_model_that_is_the_model_is_always_right() -> None:
    model = byte_model()
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 31, "seed": 3, "top_p": 0.9}
        row = generate(model, [IDS[0]], **options, draft_model=model, num_draft_tokens=5, details=True)[0]
        assert row.ids == generate(model, [IDS[0]], **options)[0]
        assert row.accepted == row.drafted == 25 and row.model_calls == 6  # the prompt, then 5 calls of 1 + 5 tokens


def test_lookup_saves_calls_on_text_that_repeats() -> None:
    class Parrot(nn.Module):
        """Says the alphabet over and over."""

        def forward(self, ids: Tensor) -> Tensor:
            return 20.0 * torch.nn.functional.one_hot((ids + 1) % 26, 26).float()

    prompt = [[*range(26), 0, 1]]
    row = generate(Parrot(), prompt, temperature=0, max_new_tokens=81, speculation="lookup", details=True)[0]
    assert row.ids == [(2 + i) % 26 for i in range(81)]
    assert row.model_calls == 10 and row.accepted == row.drafted == 71


class Markov(nn.Module):
    """Six tokens; what comes next depends on the last one, and not too surely."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def test_speculation_leaves_the_distribution_as_it_is() -> None:
    """Pairs of tokens over 6000 seeds against the product of the model's own probabilities, for both kinds of guesses;
    and with the same seeds the very tokens of the plain way, which are exact on this model."""
    model, draft = Markov(1), Markov(2)
    options: dict[str, Any] = {"max_new_tokens": 3, "seed": 0, "temperature": 0.9}
    prompts = [[2, 4, 2]] * 6000
    first = (model.table[2] / 0.9).softmax(0)
    second = (model.table / 0.9).softmax(1)
    expected = (first[:, None] * second).flatten().detach() * len(prompts)
    plain = generate(model, prompts, **options)
    for guesses in ({"speculation": "lookup"}, {"draft_model": draft, "num_draft_tokens": 2}):
        found = generate(model, prompts, **options, **guesses, details=True)
        assert [row.ids for row in found] == plain
        assert 0.1 < sum(row.accepted for row in found) / sum(row.drafted for row in found) < 0.9
        counts = torch.bincount(torch.tensor([6 * row.ids[0] + row.ids[1] for row in found]), minlength=36)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 35 + 4.5 * math.sqrt(2 * 35)


def test_a_draft_model_guesses_about_as_often_right_as_can_be() -> None:
    """For a total variation d both draw the same at least (1 - d) / (1 + d) of the time; 1 - d is the optimum."""
    model, draft = Markov(1), Markov(2)
    with torch.no_grad():
        draft.table.copy_(model.table + 0.5 * draft.table)
    found = generate(model, [[2]] * 4000, max_new_tokens=3, draft_model=draft, num_draft_tokens=1, details=True)
    # The guess is for the second new token, after whatever came first: weigh the rows of the table by it.
    d = 0.5 * (model.table.softmax(1) - draft.table.softmax(1)).abs().sum(1).detach()
    weight = model.table[2].softmax(0).detach()
    rate = sum(row.accepted for row in found) / sum(row.drafted for row in found)
    lowest, best = float((weight * (1 - d) / (1 + d)).sum()), float((weight * (1 - d)).sum())
    assert lowest - 0.03 < rate < best + 0.03 and 1 - best > 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_extend_take_back_and_branch(family: str) -> None:
    model = model_of(family)
    prompts = [IDS[0], IDS[4]] if family == "no cache" else IDS[:3]
    with torch.inference_mode():
        decoder, fresh = decoder_for(model), decoder_for(model)
        first = decoder.start(prompts, 80)
        tokens = torch.tensor([[3, 4, 5]] * len(prompts))
        logits = decoder.extend(tokens)
        assert logits.shape == (len(prompts), 3, 257)
        decoder.rewind(2)
        again = decoder.extend(torch.tensor([[9]] * len(prompts)))[:, 0]
        expected = fresh.start([[*prompt, 3, 9] for prompt in prompts], 80)
        torch.testing.assert_close(expected, again, atol=1e-4, rtol=1e-4)
        decoder.select_rows(torch.tensor([1, 0, 1, 1]))
        branched = decoder.step(torch.tensor([7, 7, 8, 7]))
        longer = [[*prompts[row], 3, 9, token] for row, token in ((1, 7), (0, 7), (1, 8), (1, 7))]
        torch.testing.assert_close(fresh.start(longer, 80), branched, atol=1e-4, rtol=1e-4)
        assert first.shape == (len(prompts), 257)


# --- Beams


BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2}, {"num_beams": 4}, {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 5, "length_penalty": -1.0},
    {"num_beams": 3, "early_stopping": "first"}, {"num_beams": 3, "early_stopping": "never", "length_penalty": 1.5},
    {"num_beams": 3, "num_eos": 1}, {"num_beams": 4, "no_repeat_ngram": 2},
    {"num_beams": 4, "min_new_tokens": 8}, {"num_beams": 3, "banned_tokens": (10, 11)},
]  # fmt: skip


@pytest.mark.parametrize("options", BEAMS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_beam_search_writes_what_transformers_writes(family: str, options: dict[str, Any]) -> None:
    model: Any = hugging_face(family)
    # End tokens that do turn up: those likely after the prompts.
    with torch.no_grad():
        likely = model(torch.tensor([IDS[0]])).logits[0, -1].topk(4).indices.tolist()
    ends = [*likely, 5, 77][: options.get("num_eos", 6)]
    options = {"eos_token_id": tuple(ends), "max_new_tokens": 14, **options}
    options.pop("num_eos", None)
    stopping = {"first": True, "heuristic": False, "never": "never"}
    theirs_too = {
        "num_beams": options["num_beams"], "length_penalty": options.get("length_penalty", 1.0),
        "early_stopping": stopping[options.get("early_stopping", "heuristic")],
        "no_repeat_ngram_size": options.get("no_repeat_ngram", 0), "min_new_tokens": options.get("min_new_tokens"),
        "bad_words_ids": [[token] for token in options.get("banned_tokens", ())] or None,
    }  # fmt: skip
    ours = generate(model, IDS, **options, details=True)
    reasons = set()
    for prompt, row in zip(IDS, ours):
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), do_sample=False, pad_token_id=256,
            eos_token_id=list(options["eos_token_id"]), max_new_tokens=options["max_new_tokens"],
            output_scores=True, return_dict_in_generate=True, **theirs_too,
        )  # fmt: skip
        expected = theirs.sequences[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(expected) if token in options["eos_token_id"]), len(expected))
        assert row.ids == expected[: end + 1]
        assert row.score == pytest.approx(float(theirs.sequences_scores[0]), abs=1e-4)
        reasons.add(row.finish_reason)
        assert len(row.ids) >= options.get("min_new_tokens", 0)
    assert "eos" in reasons or len(ends) == 1


def test_a_beams_log_probabilities_add_up_to_its_score() -> None:
    options: dict[str, Any] = {"tokenizer": BYTES, "num_beams": 3, "max_new_tokens": 9, "length_penalty": 0.5}
    row = generate(byte_model(), "Once", **options, logprobs="raw")
    assert row.score == pytest.approx(sum(row.logprobs) / len(row.ids) ** 0.5, abs=1e-4)
    greedy = generate(byte_model(), "Once", tokenizer=BYTES, temperature=0, max_new_tokens=9, logprobs="raw")
    assert sum(row.logprobs) >= sum(greedy.logprobs)
    assert row.text == generate(byte_model(), "Once", **options)


class SureThenNot(nn.Module):
    """Says the alphabet for 12 positions, after which several texts are about as likely."""

    def forward(self, ids: Tensor) -> Tensor:
        table = torch.randn(26, 26, generator=torch.Generator().manual_seed(0))
        sure = 30.0 * torch.nn.functional.one_hot((ids + 1) % 26, 26).float()
        return torch.where((torch.arange(ids.shape[1]) < 12)[:, None], sure, table[ids])


def test_beams_are_streamed_as_far_as_those_that_can_still_win_agree() -> None:
    model, calls, arrived = SureThenNot(), [0], list[int]()
    model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 30, "eos_token_id": (7, 3), "length_penalty": 0.4}
    expected = generate(model, [[0], [4, 5]], **options)
    calls[0] = 0
    ids: list[list[int]] = [[], []]
    for row, token in generate(model, [[0], [4, 5]], **options, stream=True):
        ids[row].append(token)
        arrived.append(calls[0])
        assert expected[row][: len(ids[row])] == ids[row]  # what was shown stays
    assert ids == expected and ids[0][:2] == [1, 2]
    assert arrived[0] < 20 < calls[0] + 20 and arrived[0] < calls[0]  # while the search goes on


# --- Samples, seeds, log-probabilities


def test_samples_of_a_prompt_read_it_once_and_differ() -> None:
    model, rows_read = byte_model(), []
    model.register_forward_pre_hook(lambda module, args: rows_read.append(tuple(args[0].shape)))
    texts = generate(model, ["Once", "a"], tokenizer=BYTES, num_samples=4, max_new_tokens=10)
    assert rows_read[0] == (2, 4) and rows_read[1] == (8, 1)
    assert [len(row) for row in texts] == [4, 4] and len({*texts[0], *texts[1]}) == 8
    assert generate(model, "Once", tokenizer=BYTES, num_samples=4, max_new_tokens=10) == texts[0]
    assert generate(model, [[79]], num_samples=2, max_new_tokens=3, seed=(4, 4))[0][0] == generate(
        model, [[79]], max_new_tokens=3, seed=4)[0]  # fmt: skip


def test_each_row_can_have_its_own_seed() -> None:
    model = byte_model()
    same = generate(model, ["Once"] * 3, tokenizer=BYTES, max_new_tokens=10, seed=(7, 8, 7))
    assert same[0] == same[2] != same[1]
    assert same[1] == generate(model, "Once", tokenizer=BYTES, max_new_tokens=10, seed=8)
    with pytest.raises(ValueError, match=r"seed holds 2 seeds; 3 prompts with num_samples=1 are 3 texts"):
        generate(model, ["a"] * 3, tokenizer=BYTES, max_new_tokens=10, seed=(1, 2))


def test_log_probabilities_are_the_models_own_or_those_drawn_from() -> None:
    model, options = byte_model(), {"temperature": 0.7, "top_k": 5, "max_new_tokens": 12, "seed": 2}
    raw, processed = (generate(model, IDS, **options, logprobs=kind) for kind in ("raw", "processed"))
    for prompt, a, b in zip(IDS, raw, processed):
        assert isinstance(a, Generated) and a.ids == b.ids and a.text is None
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *a.ids]]))[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(a.ids)[:, None]
        assert a.logprobs == pytest.approx(logits.log_softmax(1).gather(1, chosen)[:, 0].tolist(), abs=1e-4)
        lowest = logits.topk(5, dim=1).values[:, -1:]
        kept = torch.where(logits < lowest, -math.inf, logits / 0.7).log_softmax(1)
        assert b.logprobs == pytest.approx(kept.gather(1, chosen)[:, 0].tolist(), abs=1e-4)
    assert generate(model, IDS, **{**options, "temperature": 0}, logprobs="processed")[0].logprobs == [0.0] * 12


def test_details_say_what_ended_a_text() -> None:
    model = byte_model()
    options: dict[str, Any] = {"tokenizer": BYTES, "max_new_tokens": 20, "seed": 1, "details": True, "eos_token_id": ()}
    free = generate(model, "Once", **options)
    assert free.finish_reason == "length" and len(free.ids) == 20 and free.logprobs is None and free.score is None
    ended = generate(model, "Once", **{**options, "eos_token_id": (free.ids[5], 256)})
    assert ended.finish_reason == "eos" and ended.ids == free.ids[: free.ids.index(free.ids[5]) + 1]
    stop = next(character for character in free.text if character.isascii() and character.isprintable())
    stopped = generate(model, "Once", **options, stop=stop)
    assert stopped.finish_reason == "stop" and stopped.text == free.text[: free.text.index(stop)]


def test_no_end_counts_before_the_least_number_of_tokens() -> None:
    class SaysA(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            logits = torch.zeros(*ids.shape, 257)
            logits[..., 256], logits[..., 97] = 9.0, 8.0
            return logits

    options: dict[str, Any] = {"tokenizer": BYTES, "temperature": 0, "max_new_tokens": 9}
    assert generate(SaysA(), "x", **options) == ""
    assert generate(SaysA(), "x", **options, min_new_tokens=4) == "aaaa"
    assert generate(SaysA(), "x", **options, eos_token_id=()) == ""  # 256 is drawn, is no text, and ends nothing
    assert generate(SaysA(), "x", **options, banned_tokens=(256,), stop="a") == ""
    assert generate(SaysA(), "x", **options, banned_tokens=(256,), stop="aa", min_new_tokens=3) == "aa"
    assert generate(SaysA(), "x", **options, banned_tokens=(256,), stop="aa", min_new_tokens=4) == "aaa"


# --- Long texts


@pytest.mark.parametrize("family", ["ours", "gpt2", "llama"])
def test_a_sliding_context_is_the_window_run_again(family: str) -> None:
    """At every step the model's own forward over the window that the length says, in a ragged batch too."""
    model = model_of(family)
    prompts = [IDS[0] * 8, IDS[2] * 6, IDS[1]]  # 72, 156 and 1 tokens; the context is 96, half of it 48
    got = generate(model, prompts, temperature=0, max_new_tokens=150, long_text="sliding")
    for prompt, new in zip(prompts, got):
        text = list(prompt)
        for token in new:
            start = max(0, -(-(len(text) - 96) // 48)) * 48
            with torch.inference_mode():
                output = model(torch.tensor([text[start:]]))
            logits = (output if isinstance(output, Tensor) else output.logits)[0, -1]
            assert float(logits.max() - logits[token]) < 1e-3
            text.append(token)
        assert len(text) - max(0, -(-(len(text) - 96) // 48)) * 48 <= 96
    assert generate(model, prompts[1:2], temperature=0, max_new_tokens=150, long_text="sliding") == got[1:2]


def test_a_sliding_batch_outlives_its_longest_row() -> None:
    """The caches of the eager decoders count positions by the longest row, which may have left."""
    model, prompts = byte_model(), [IDS[0] * 9, [7]]  # 81 tokens and 1
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 60, "long_text": "sliding", "engine": "eager"}
    free = generate(model, prompts, **options)
    eos = next(token for token in free[0][:5] if token not in free[1])
    assert generate(model, prompts, **options, eos_token_id=eos) == [free[0][: free[0].index(eos) + 1], free[1]]


def test_a_truncated_prompt_is_its_end() -> None:
    model = byte_model()
    prompt = IDS[0] * 20
    options: dict[str, Any] = {"max_new_tokens": 10, "seed": 3}
    expected = generate(model, [prompt[-87:]], **options)
    assert generate(model, [prompt], **options, long_text="truncate_left") == expected
    assert generate(model, [[5, 6]], **options, long_text="truncate_left") == generate(model, [[5, 6]], **options)
    with pytest.raises(ValueError, match=r"max_new_tokens is 97.*at most 96 fit, or set long_text='sliding'"):
        generate(model, [prompt], max_new_tokens=97, long_text="truncate_left")
    assert len(generate(model, [prompt], max_new_tokens=96, long_text="truncate_left")[0]) == 96


# --- What cannot be meant


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0, "typical_p": 0.5}, "typical_p is 0.5; it needs a draw, but temperature=0 takes the likeliest"),
    ({"temperature": 0, "xtc_probability": 0.5}, "xtc_probability is 0.5; it needs a draw"),
    ({"temperature": 0, "num_samples": 2}, "num_samples is 2; it needs a draw"),
    ({"num_beams": 2, "top_p": 0.9}, "top_p is 0.9; it cannot be joined with num_beams=2: beam search keeps"),
    ({"num_beams": 2, "num_samples": 2}, "num_samples is 2; it cannot be joined with num_beams"),
    ({"num_beams": 2, "temperature": 0.7}, "temperature is 0.7; it means nothing with num_beams=2"),
    ({"num_beams": 2, "stop": ("a",)}, "cannot be joined with num_beams"),
    ({"num_beams": 2, "speculation": "lookup"}, "cannot be joined with num_beams"),
    ({"num_beams": 2, "long_text": "sliding"}, "use truncate_left"),
    ({"length_penalty": 2.0}, "length_penalty is 2.0; it acts on beam search only"),
    ({"early_stopping": "first"}, "early_stopping is 'first'; it acts on beam search only"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens is 9; it must lie in \[0, max_new_tokens=8\]"),
    ({"order": "exllama"}, "order is 'exllama'; it must be one of 'hf', 'llama.cpp', 'vllm'"),
    ({"long_text": "cut"}, "must be one of 'error', 'truncate_left', 'sliding'"),
    ({"typical_p": 0.0}, r"must lie in \(0, 1\]"), ({"epsilon": 1.0}, r"must lie in \[0, 1\)"),
    ({"xtc_threshold": 1.5}, r"must lie in \[0, 1\]"), ({"dry_base": 0.5}, "must be at least 1"),
    ({"no_repeat_ngram": -1}, "must not be negative"), ({"num_samples": 0}, "at least 1"), ({"seed": -1}, "seed is -1"),
    ({"logit_bias": {3: math.nan}}, "must map whole numbers to finite numbers"),
    ({"logit_bias": {"a": 1.0}}, "must map"),
    ({"banned_tokens": ("a",)}, "must hold whole numbers"), ({"eos_token_id": (1, "b")}, "hold whole numbers"),
    ({"dry_breakers": ("",)}, "must not hold an empty string"), ({"seed": ()}, "must be a whole number"),
])  # fmt: skip
def test_fields_that_contradict_each_other_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**options)


def test_a_config_survives_json_with_its_biases() -> None:
    config = GenerationConfig(logit_bias={3: -1.5, 7: 2.0}, banned_tokens=(1, 2), eos_token_id=(4, 5), seed=(1, 2))
    plain = to_dict(config)
    assert plain["logit_bias"] == {"3": -1.5, "7": 2.0} and from_dict(GenerationConfig, plain) == config
    assert generate(byte_model(), [[1]], config, max_new_tokens=2, seed=3)  # overrides go through the same door


@pytest.mark.parametrize(("options", "message"), [
    ({"stream": True, "details": True}, "stream=True yields pieces and details=True"),
    ({"stream": True, "logprobs": "raw"}, "choose one of them"),
    ({"logprobs": "both"}, "logprobs is 'both'; it must be 'raw', 'processed' or None"),
    ({"banned_tokens": (300,)}, r"banned_tokens holds token id 300; the model's ids lie in \[0, 257\)"),
    ({"logit_bias": {999: 1.0}}, "logit_bias holds token id 999"),
    ({"eos_token_id": 257}, "eos_token_id holds token id 257"),
    ({"draft_model": 3}, "draft_model is a int; pass a torch.nn.Module"),
    ({"draft_model": "other"}, "draft_model has 300 ids and the model 257; it must be trained with the same tokenizer"),
    ({"draft_model": "short"}, "draft_model's context is 8; the texts grow to 10 tokens"),
    ({"draft_model": "same", "speculation": "lookup"}, "both guess; give one of the two"),
    ({"draft_model": "same", "num_beams": 2}, "draft_model cannot be joined with num_beams=2"),
    ({"draft_model": "same", "long_text": "sliding"}, "moves the text under the guesses"),
    ({"tokenizer": None, "dry_multiplier": 0.8}, r"dry_breakers=.* needs a tokenizer .* or dry_breakers=\(\)"),
])  # fmt: skip
def test_requests_that_cannot_work_are_refused_before_anything_runs(options: dict[str, Any], message: str) -> None:
    model = byte_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    drafts = {"other": byte_model(vocab_size=300), "short": byte_model(max_seq_len=8), "same": byte_model()}
    if isinstance(options.get("draft_model"), str):
        options = {**options, "draft_model": drafts[options["draft_model"]]}
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2, 3]], **{"tokenizer": BYTES, "max_new_tokens": 8, **options})


class Breaks(nn.Module):
    """Logits of NaN for a text of 5 tokens that starts with 2."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = torch.randn(*ids.shape, 20, generator=torch.Generator().manual_seed(0))
        if ids.shape[1] == 5:
            logits[ids[:, 0] == 2] = math.nan
        return logits


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"typical_p": 0.5}, {"repetition_penalty": 1.2}, {"num_beams": 2}, {"speculation": "lookup"},
    {"num_samples": 2},
], ids=str)  # fmt: skip
def test_nan_logits_name_the_prompt_and_the_token_in_every_strategy(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"prompt 1, new token 2: .*NaN"):
        generate(Breaks(), [[1, 1, 1], [2, 1, 1], [3, 1, 1]], **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_bans_that_leave_nothing_say_so(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"new token 0: .*nothing but -inf"):
        generate(Breaks(), [[1]], banned_tokens=tuple(range(20)), **options)


# --- No trace in training


def test_generating_in_every_way_leaves_training_as_it_was() -> None:
    """Weights, random state, modes: after generating, the next training step is the one there would have been."""
    def state_of(model: GPT) -> list[Any]:
        return [torch.get_rng_state().tolist(), [m.training for m in model.modules()], torch.is_grad_enabled()]

    model, draft = byte_model(dropout=0.2).train(), byte_model(num_layers=1, dropout=0.2).train()
    trainer = Trainer(model=model, tokenizer=BYTES)
    x = torch.randint(0, 257, (2, 30), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    expected = model(x).sum()
    for options in [*STRATEGIES.values(), {"draft_model": draft}]:
        torch.manual_seed(4)
        before, draft_before = state_of(model), [m.training for m in draft.modules()]
        trainer.generate_text(["Once", "a b a b"], **{"max_new_tokens": 10, **options})
        assert state_of(model) == before and [m.training for m in draft.modules()] == draft_before
        assert torch.equal(model(x).sum(), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_field_changes_what_is_written() -> None:
    """A field that is read nowhere would pass every other test."""
    model = byte_model()
    base: dict[str, Any] = {"max_new_tokens": 40, "seed": 3, "temperature": 1.2}
    ends, low = tuple(range(0, 250, 5)), {"temperature": 0.2}
    changes: dict[str, Any] = {
        "max_new_tokens": 8, "num_samples": 2, "temperature": 0.4, "top_k": 4, "top_p": 0.5, "min_p": 0.3,
        "typical_p": 0.4, "epsilon": 0.05, "repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 1.0,
        "no_repeat_ngram": 1, "banned_tokens": tuple(range(200)), "logit_bias": dict.fromkeys(range(200), -5.0),
        "num_beams": 2, "stop": ("zh",), "eos_token_id": ends, "seed": 4,
    }  # fmt: skip
    again = {**low, "repetition_penalty": 0.5}  # rewards repeats, so that there are some
    beams = {"num_beams": 3, "temperature": 1.0, "eos_token_id": ends}
    dependent: dict[str, tuple[dict[str, Any], Any]] = {
        "min_new_tokens": ({"eos_token_id": ends}, 20),
        "xtc_probability": ({**low, "xtc_threshold": 0.02}, 1.0),
        "xtc_threshold": ({**low, "xtc_probability": 1.0}, 0.001),
        "order": ({"top_p": 0.7, "temperature": 3.0}, "llama.cpp"),
        "penalty_scope": ({"presence_penalty": 2.0}, "all"),
        "dry_multiplier": (again, 3.0),
        "dry_base": ({**again, "dry_multiplier": 0.05, "dry_allowed_length": 1}, 200.0),
        "dry_allowed_length": ({**again, "dry_multiplier": 3.0}, 1),
        "dry_breakers": ({**again, "dry_multiplier": 9.0}, tuple(map(chr, range(128)))),
        "length_penalty": (beams, -3.0),
        "early_stopping": ({**beams, "length_penalty": 3.0}, "first"),
    }
    # These must not change the text; that they act is seen elsewhere in this file.
    silent = {"speculation", "num_draft_tokens", "long_text", "weight_dtype"}
    assert {*changes, *dependent, *silent} == {field.name for field in dataclasses.fields(GenerationConfig)}
    prompt = "a cat and a cat and a"
    for name, value in changes.items():
        changed = {**base, name: value}
        if name == "num_beams":
            changed["temperature"] = 1.0
        plain = generate(model, prompt, tokenizer=BYTES, **base)
        assert generate(model, prompt, tokenizer=BYTES, **changed) != plain, name
    for name, (needs, value) in dependent.items():
        plain = generate(model, prompt, tokenizer=BYTES, **{**base, **needs})
        assert generate(model, prompt, tokenizer=BYTES, **{**base, **needs, name: value}) != plain, name
