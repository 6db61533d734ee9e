"""generate(): the same text alone, in a batch, streamed, with and without a cache; and no trace of it afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasttrain.backend import extension
from fasttrain.config import GenerationConfig
from fasttrain.generation import generate
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.text_stream import Detokenizer, PythonStopMatcher, TextStream
from fasttrain.tokenization import ByteTokenizer, JsonTokenizer, train_bpe

BYTES = ByteTokenizer()
PROMPTS = ["Once upon", "a", "The quick brown fox jumps", "naïve €uro", "Once more"]  # the first and last equally long


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def byte_model(**changes: Any) -> GPT:
    """A random model over bytes whose next token depends strongly on what came before."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 257, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32}
    model = GPT(GPTConfig(**{**sizes, "max_seq_len": 96, "tie_embeddings": False, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5.0)
    return model


class OnlyLogits(nn.Module):
    """The same function with nothing to recognise it by, in nanoGPT's output form: (logits, loss)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        output = self.inner(ids)
        return (output if isinstance(output, Tensor) else output.logits), None


def hugging_face(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=257, n_positions=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=257, max_position_embeddings=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def by_hand(model: Callable[[Tensor], Tensor], ids: list[int], count: int) -> list[int]:
    """Greedy decoding by running everything again."""
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids[-count:]


# --- The same text however it is asked for


def test_greedy_ids_are_the_argmax_of_the_full_forward() -> None:
    model = byte_model()
    prompt = list(b"Once upon")
    assert generate(model, [prompt], temperature=0, max_new_tokens=20) == [by_hand(model, prompt, 20)]


SETTINGS = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3, "seed": 11},
]


@pytest.mark.parametrize("options", SETTINGS, ids=["greedy", "sampled", "everything"])
def test_a_ragged_batch_equals_each_prompt_alone(options: dict[str, Any]) -> None:
    model = byte_model()
    config = GenerationConfig(max_new_tokens=40, **options)
    together = generate(model, PROMPTS, config, tokenizer=BYTES)
    seed = options.get("seed", 0)
    alone = [generate(model, prompt, config, tokenizer=BYTES, seed=seed + i) for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len(set(together)) == len(together)


@pytest.mark.parametrize("options", SETTINGS, ids=["greedy", "sampled", "everything"])
def test_a_model_without_a_cache_writes_the_same_text(options: dict[str, Any]) -> None:
    model = byte_model()
    options = {**options, "max_new_tokens": 24, "tokenizer": BYTES, "eos_token_id": 65}
    assert generate(OnlyLogits(model), PROMPTS, **options) == generate(model, PROMPTS, **options)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hugging_face_models_write_what_they_write_by_themselves(family: str) -> None:
    model: Any = hugging_face(family)
    ids = [list(prompt.encode()) for prompt in PROMPTS]
    ours = generate(model, ids, temperature=0, max_new_tokens=20)
    for prompt, new in zip(ids, ours):
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), max_new_tokens=20,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert theirs[0, len(prompt) :].tolist() == new
    # Rows that leave early are taken out of its cache.
    eos = generate(model, ids, seed=2, max_new_tokens=24)[1][6]
    sampled = generate(model, ids, seed=2, max_new_tokens=24, eos_token_id=eos)
    assert generate(OnlyLogits(model), ids, seed=2, max_new_tokens=24, eos_token_id=eos) == sampled
    assert len({len(row) for row in sampled}) > 1


def test_pieces_of_a_stream_join_to_the_text_that_is_not_streamed() -> None:
    for tokenizer in (BYTES, train_bpe(["ab äöü €uro naïve 漢字 " * 30] * 3, 300)):
        model = byte_model(vocab_size=tokenizer.vocab_size)
        for seed in range(4):
            options = {"tokenizer": tokenizer, "max_new_tokens": 60, "seed": seed, "temperature": 1.5}
            whole = generate(model, "naïve €", **options)
            pieces = list(generate(model, "naïve €", stream=True, **options))
            assert "".join(pieces) == whole and len(pieces) > 5 and all(pieces)
            ids = generate(model, [tokenizer.encode("naïve €")], **{**options, "tokenizer": None})[0]
            if tokenizer is BYTES and 256 not in ids:
                assert whole == tokenizer.decode(ids)


def test_a_streamed_batch_names_its_rows_and_ids_stream_as_ids() -> None:
    model = byte_model()
    texts = [""] * len(PROMPTS)
    for row, piece in generate(model, PROMPTS, tokenizer=BYTES, max_new_tokens=20, stream=True):
        texts[row] += piece
    assert texts == generate(model, PROMPTS, tokenizer=BYTES, max_new_tokens=20)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rows: list[list[int]] = [[], []]
    for row, token in generate(model, prompt, max_new_tokens=9, stream=True):
        rows[row].append(token)
    assert rows == generate(model, prompt, max_new_tokens=9) == generate(model, prompt.tolist(), max_new_tokens=9)


# --- Ends


def test_the_end_of_text_token_ends_a_row_and_finished_rows_cost_nothing() -> None:
    model = byte_model()
    ids = [list(prompt.encode()) for prompt in PROMPTS]
    free = generate(model, ids, temperature=0, max_new_tokens=30)
    eos = free[1][4]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    rows_run = 0

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal rows_run
        rows_run += args[0].shape[0]

    with_hook = model.register_forward_pre_hook(count)
    assert generate(model, ids, temperature=0, max_new_tokens=30, eos_token_id=eos) == expected
    with_hook.remove()
    assert rows_run == sum(len(row) for row in expected) < sum(len(row) for row in free)


def test_the_tokenizers_end_of_text_is_the_default_and_is_not_text() -> None:
    class EndsAfterThree(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            logits = torch.zeros(*ids.shape, 257)
            logits[:, :, 256 if ids.shape[1] >= 5 else ord("x")] = 9.0
            return logits

    assert generate(EndsAfterThree(), "ab", tokenizer=BYTES, temperature=0) == "xxx"
    assert generate(EndsAfterThree(), [[1, 2]], tokenizer=BYTES, temperature=0) == [[120, 120, 120, 256]]
    assert generate(EndsAfterThree(), "ab", tokenizer=BYTES, temperature=0, eos_token_id=ord("x")) == ""


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them_whatever_tokens_they_span(stream: bool) -> None:
    class Ascii(OnlyLogits):
        def forward(self, ids: Tensor) -> tuple[Tensor, None]:
            logits = self.inner(ids)
            logits[..., 128:] = -torch.inf
            return logits, None

    model = Ascii(byte_model())
    options: dict[str, Any] = {"tokenizer": BYTES, "max_new_tokens": 60, "seed": 2, "temperature": 0.5}
    free = generate(model, "Once upon", **options)
    assert len(free) == 60
    stop = free[17:21]
    for stops in (stop, [stop], ("never there", stop)):
        result = generate(model, "Once upon", **options, stop=stops, stream=stream)
        assert ("".join(result) if stream else result) == free[: free.index(stop)]
    # A stop string that begins and does not end is text after all.
    begun = free[-2:] + "\x00"
    assert generate(model, "Once upon", **options, stop=begun) == free


def test_a_repetition_penalty_acts_on_every_token_seen_and_once_on_repeated_ones() -> None:
    model, penalty = byte_model(), 1.7
    ids = [5, 9, 9, 9, 200]
    expected = list(ids)
    with torch.inference_mode():
        for _ in range(25):
            logits = model(torch.tensor([expected]))[0, -1]
            for token in set(expected):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            expected.append(int(logits.argmax()))
    got = generate(model, [ids, [1] * 9], temperature=0, max_new_tokens=25, repetition_penalty=penalty)
    assert got[0] == expected[5:]
    assert got[0] != generate(model, [ids], temperature=0, max_new_tokens=25)[0]

    class Negative(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            logits = torch.full((*ids.shape, 9), -9.0)
            logits[..., 3], logits[..., 4] = -1.0, -1.5  # a negative logit is pushed down by multiplying
            return logits

    assert generate(Negative(), [[3]], temperature=0, max_new_tokens=1, repetition_penalty=1.7) == [[4]]


def test_ids_that_the_tokenizer_does_not_have_are_never_written() -> None:
    model = byte_model(vocab_size=320)
    text = generate(model, PROMPTS, tokenizer=BYTES, temperature=5.0, max_new_tokens=70, eos_token_id=256)
    assert all(text)  # ByteTokenizer.decode raises on an id of 257 or more
    assert max(max(row) for row in generate(model, [[1]] * 4, temperature=5.0, max_new_tokens=80)) > 256


def test_the_whole_context_can_be_filled() -> None:
    model = byte_model()
    assert len(generate(model, [[7] * 90], max_new_tokens=7)[0]) == 7  # the 97th token is drawn, never read


# --- No trace


def test_generating_changes_no_random_state_no_mode_and_no_gradient_setting() -> None:
    model = byte_model(dropout=0.3).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]

    def untouched() -> bool:
        same = torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        same = same and np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]
        same = same and [module.training for module in model.modules()] == modes
        return same and not torch.is_inference_mode_enabled()

    text = generate(model, "Once", tokenizer=BYTES, max_new_tokens=12)
    assert untouched()
    assert text == generate(model.eval(), "Once", tokenizer=BYTES, max_new_tokens=12)  # no dropout either time
    for module, mode in zip(model.modules(), modes):
        module.training = mode
    for _ in generate(model, "Once", tokenizer=BYTES, max_new_tokens=12, stream=True):
        assert untouched() and torch.is_grad_enabled()
    for parameter in model.parameters():
        assert not parameter.is_inference()


def test_a_failure_half_way_puts_everything_back() -> None:
    class Fails(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            torch.rand(1)
            if ids.shape[1] == 6:
                raise RuntimeError("out of memory, say")
            return torch.zeros(*ids.shape, 300)

    model = Fails().train()
    state = torch.get_rng_state()
    for stream in (False, True):
        with pytest.raises(RuntimeError, match="out of memory"):
            list(generate(model, [[1, 2, 3]], stream=stream))
        assert model.training and not torch.is_inference_mode_enabled()
        assert torch.equal(torch.get_rng_state(), state)


def test_autocast_around_the_call_does_not_reach_into_it() -> None:
    model = byte_model()
    plain, enabled = generate(model, PROMPTS, tokenizer=BYTES, max_new_tokens=16), []
    model.register_forward_pre_hook(lambda *_: enabled.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(model, PROMPTS, tokenizer=BYTES, max_new_tokens=16) == plain
        assert torch.is_autocast_enabled("cpu")
    assert enabled and not any(enabled)


def test_a_compiled_model_is_run_uncompiled() -> None:
    model = byte_model()
    compiled = torch.compile(model, backend=lambda graph, inputs: pytest.fail("it was compiled"))
    assert generate(compiled, [[1, 2]], max_new_tokens=4) == generate(model, [[1, 2]], max_new_tokens=4)


# --- Errors


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt 0 is empty"),
        (["a", ""], {}, "prompt 1 is empty"),
        ("x" * 97, {"max_new_tokens": 8}, "prompt 0 has 97 tokens; the model's context is 96.*last 88 tokens"),
        ("x" * 90, {"max_new_tokens": 8}, "max_new_tokens is 8 after the 90 tokens.*at most 7 fit"),
        ("x", {"temprature": 0.5}, "did you mean 'temperature'"),
        ("x", {"temperature": -1.0}, "temperature is -1.0"),
        ("x", {"engine": "fast"}, "engine is 'fast'; it must be one of 'auto', 'native', 'eager'"),
        ([[1, 2, 300]], {}, r"prompt 0 holds token id 300; the model's ids lie in \[0, 257\)"),
        ([[-1]], {}, "token id -1"),
        (torch.zeros(2, 3), {}, "token ids are integers"),
        (["a", 3], {}, "pass a str"),
        (None, {}, "prompt is a NoneType"),
        ("x", {"tokenizer": None}, "a text prompt needs a tokenizer: pass tokenizer="),
        ([[1]], {"tokenizer": None, "stop": "a"}, r"stop=\('a',\) needs a tokenizer"),
        ("x", {"tokenizer": train_bpe(["text to merge " * 9] * 9, 264)}, "tokenizer has 264 ids and the model 257"),
        ("x", {"config": {"top_p": 0}}, "top_p is 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(prompt: Any, options: dict[str, Any], message: str) -> None:
    model = byte_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, **{"tokenizer": BYTES, "max_new_tokens": 8, **options})


def test_logits_without_a_distribution_name_the_prompt_and_the_token() -> None:
    class BreaksInRowTwo(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            logits = torch.zeros(*ids.shape, 257)
            logits[..., 1] = 50.0
            logits[ids[:, 0] == 0, :, 1], logits[ids[:, 0] == 0, :, 9] = 0.0, 50.0  # row 0 ends at once
            logits[(ids[:, 0] == 2) & (ids.shape[1] == 4)] = float("nan")
            return logits

    with pytest.raises(ValueError, match=r"prompt 2, new token 2: .*NaN"):
        generate(BreaksInRowTwo(), [[0, 5], [1, 5], [2, 5]], eos_token_id=9, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"the model returned a tensor of shape \(1, 3\)"):
        generate(nn.Sequential(nn.Embedding(9, 1), nn.Flatten()), [[1, 2, 3]])
    with pytest.raises(ValueError, match="model is a function"):
        generate(by_hand, [[1]])  # type: ignore[arg-type]


def test_the_models_own_tokenizer_is_used_when_none_is_passed() -> None:
    model = byte_model()
    expected = generate(model, "Once", tokenizer=BYTES, max_new_tokens=9)
    model.tokenizer = BYTES
    assert generate(model, "Once", max_new_tokens=9) == expected
    assert generate(model, [], max_new_tokens=9) == []


# --- Text from ids, and stop strings


def byte_fallback_tokenizer() -> JsonTokenizer:
    """Llama's kind: words with a leading mark, bytes for the rest, a run of bytes decoded as a whole."""
    words = ["▁", "▁the", "▁fox", "ing", "é"]
    vocabulary = {**{f"<0x{byte:02X}>": byte for byte in range(256)}, **{word: 256 + i for i, word in enumerate(words)}}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return JsonTokenizer(backend)


BPE = train_bpe(["the fox and the ox, naïve €uro 漢字 🙂 " * 20] * 3, 330)
FALLBACK = byte_fallback_tokenizer()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_text_of_all_ids(data: st.DataObject) -> None:
    """Any ids at all for byte-level tokenizers, whole characters for the one that decodes runs of bytes as a whole."""
    tokenizer: Any = data.draw(st.sampled_from([BYTES, BPE, FALLBACK]))
    if tokenizer is FALLBACK:
        word = st.integers(256, 260).map(lambda i: [i])
        character = st.characters(exclude_categories=["Cs"]).map(lambda c: list(c.encode()))
        ids = [i for run in data.draw(st.lists(st.one_of(word, character), max_size=60)) for i in run]
    else:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=120))
    stream = TextStream(tokenizer, ())
    pieces = [stream.push(token)[0] for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_characters_appear_with_their_last_byte_and_plain_text_at_once() -> None:
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]


@pytest.mark.parametrize("token", [ord("a"), 0xFF, 0xE2])
def test_detokenising_costs_the_same_however_long_the_text(token: int) -> None:
    lengths = []

    class Counts:
        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return BYTES.decode(ids)

    detokenizer, pieces = Detokenizer(Counts()), []
    for _ in range(500):
        pieces.append(detokenizer.push(token))
    assert "".join(pieces) + detokenizer.flush() == BYTES.decode([token] * 500)
    assert max(lengths) <= 2 * Detokenizer.WINDOW and len(lengths) < 700


def cut_at_first_stop(data: bytes, stops: list[bytes]) -> tuple[bytes, bool]:
    for end in range(1, len(data) + 1):
        ending = [stop for stop in stops if data[:end].endswith(stop)]
        if ending:
            return data[: end - max(map(len, ending))], True
    return data, False


def matchers() -> list[Any]:
    compiled = extension()
    return [PythonStopMatcher, *([compiled.StopMatcher] if compiled is not None else [])]


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab\xe9", max_size=5).map(str.encode), max_size=12),
    stops=st.lists(st.text("ab\xe9", min_size=1, max_size=5).map(str.encode), max_size=4),
)
def test_both_stop_matchers_cut_where_a_plain_search_cuts_and_hold_back_the_least(
    pieces: list[bytes], stops: list[bytes]
) -> None:
    for make in matchers():
        matcher, out, found = make(stops), b"", False
        for _ in range(2):  # the second time after a reset
            out, found = b"", False
            for i, piece in enumerate(pieces):
                safe, found = matcher.feed(piece)
                out += safe
                if not found:
                    held = b"".join(pieces[: i + 1])[len(out) :]
                    longest = max(
                        (n for stop in stops for n in range(len(stop)) if b"".join(pieces[: i + 1]).endswith(stop[:n])),
                        default=0,
                    )
                    assert len(held) == longest
            assert (out + (b"" if found else matcher.flush()), found) == cut_at_first_stop(b"".join(pieces), stops)
            matcher.reset()


def test_stop_matchers_refuse_what_would_match_everywhere_and_what_is_no_bytes() -> None:
    for make in matchers():
        with pytest.raises(ValueError, match="empty string"):
            make([b"a", b""])
        with pytest.raises(TypeError):
            make(["text"])
        matcher = make([b"b"])
        assert matcher.feed(b"abc") == (b"a", True) and matcher.feed(b"x") == (b"", True) and matcher.flush() == b""
