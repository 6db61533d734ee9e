"""The native decoder: the model's own numbers from C++, the same alone and in a batch, on every instruction set."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain import AdamW, backend, native_decoding, ops
from fasttrain.decoding import HuggingFaceDecoder, OwnCacheDecoder, decoder_for
from fasttrain.generation import generate
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.native_decoding import NativeDecoder, native_problem, release
from fasttrain.tokenization import ByteTokenizer

pytestmark = pytest.mark.skipif(backend.extension() is None, reason=backend.CPP_PROBLEM or "has the extension")
MODULE: Any = backend.extension()


def instruction_sets() -> list[tuple[str, bool]]:
    """Each with and without VNNI, where this CPU has it for that set."""
    if MODULE is None:
        return []
    before, found = MODULE.isa(), []
    for isa in MODULE.available_isas():
        MODULE.set_isa(isa)
        found += [(isa, False), *([(isa, True)] if MODULE.uses_vnni() else [])]
    MODULE.set_isa(before)
    return found


SETS = instruction_sets()
PROMPTS = [[5], [7, 1, 7, 2, 9, 0, 3], list(range(3, 143)), [8, 8, 8]]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SETS, ids=lambda pair: pair[0] + "-vnni" * pair[1])
def each_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = MODULE.isa()
    MODULE.set_isa(request.param[0])
    MODULE.allow_vnni(request.param[1])
    yield
    MODULE.set_isa(before)
    MODULE.allow_vnni(True)


def gpt(**changes: Any) -> GPT:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 203, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "hidden_size": 72}
    return stronger(GPT(GPTConfig(**{**sizes, "intermediate_size": 100, "max_seq_len": 300, **changes})))


def llama(family: str = "Llama", **changes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(2)
    sizes: dict[str, Any] = {
        "vocab_size": 150, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": None,
        "eos_token_id": None, "sliding_window": None,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    return stronger(getattr(transformers, f"{family}ForCausalLM")(config))


def stronger(model: Any) -> Any:
    """Random weights large enough that the next token depends on what came before; biases too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
            elif name.endswith("bias"):
                parameter.normal_()
    return model.eval()


@torch.inference_mode()
def logits_along(decoder: Any, prompts: list[list[int]], steps: int = 12, drop_at: int = 6) -> Tensor:
    """All logits of a run in which the same tokens are appended whatever they are, and half of the rows leave."""
    generator = torch.Generator().manual_seed(4)
    collected = [decoder.start(prompts, max(map(len, prompts)) + steps)]
    rows = torch.arange(len(prompts))
    for step in range(steps):
        tokens = torch.randint(0, 150, (len(prompts),), generator=generator)
        if step == drop_at:
            decoder.keep_rows(rows[::2])
            rows = rows[::2]
        collected.append(decoder.step(tokens[rows]))
    return torch.cat(collected)


def closeness(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("tied", [True, False])
def test_our_model_gets_the_logits_of_its_own_forward(each_isa: None, tied: bool) -> None:
    model = gpt(tie_embeddings=tied)
    got, want = (logits_along(kind(model), PROMPTS) for kind in (NativeDecoder, OwnCacheDecoder))
    assert closeness(got, want) < 2e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"head_dim": 24, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("Mistral", {}),
        ("Qwen2", {}),
    ],
)  # fmt: skip
def test_the_llama_family_gets_the_logits_of_its_own_forward(family: str, changes: dict[str, Any]) -> None:
    model = llama(family, **changes)
    prompts = [[token % 150 for token in prompt] for prompt in PROMPTS]
    got, want = (logits_along(kind(model), prompts) for kind in (NativeDecoder, HuggingFaceDecoder))
    assert closeness(got, want) < 2e-5


@pytest.mark.parametrize("weight_dtype", ["model", "bfloat16", "int8", "int4"])
def test_a_batch_equals_its_rows_bit_for_bit_on_any_number_of_threads(each_isa: None, weight_dtype: Any) -> None:
    model = gpt()
    batch = NativeDecoder(model, weight_dtype).start(PROMPTS, 200)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        alone = [NativeDecoder(model, weight_dtype).start([prompt], 200) for prompt in PROMPTS]
        assert torch.equal(torch.cat(alone), batch)


@pytest.mark.parametrize("weight_dtype", ["model", "bfloat16", "int8", "int4"])
def test_a_step_of_many_rows_equals_the_steps_of_each(each_isa: None, weight_dtype: Any) -> None:
    """Rows are multiplied in blocks (of 12 with integer weights, of 48 with others on AVX2) and tiles of fewer."""
    model, prompts = gpt(), [[i + 1, 2 * i + 3] for i in range(53)]
    decoder = NativeDecoder(model, weight_dtype)
    for size in (4, 5, 7, 11, 53):
        decoder.start(prompts[:size], 8)
        together = decoder.step(torch.arange(size))
        for i in {i for i in (0, 3, 4, 11, 12, 24, 47, 48, 52) if i < size}:
            decoder.start(prompts[i : i + 1], 8)
            assert torch.equal(decoder.step(torch.tensor([i])), together[i : i + 1])


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_vnni_computes_the_same_numbers_as_the_products_without_it(weight_dtype: Any) -> None:
    if not any(vnni for _, vnni in SETS):
        pytest.skip("this CPU has no VNNI")
    before, model = MODULE.isa(), gpt()
    try:
        for isa in {isa for isa, vnni in SETS if vnni}:
            MODULE.set_isa(isa)
            logits = []
            for allowed in (True, False):
                MODULE.allow_vnni(allowed)
                assert MODULE.uses_vnni() == allowed
                logits.append(logits_along(NativeDecoder(model, weight_dtype), PROMPTS))
            assert torch.equal(*logits)
    finally:
        MODULE.set_isa(before)
        MODULE.allow_vnni(True)


def test_a_prompt_in_pieces_equals_the_prompt_at_once() -> None:
    model, text = gpt(), [i * 37 % 203 for i in range(290)]  # more than one pass, more than two chunks of attention
    want = NativeDecoder(model).start([text], 290)
    decoder = NativeDecoder(model)
    decoder.start([text[:3]], 290)
    for begin, end in ((3, 4), (4, 130), (130, 289), (289, 290)):
        got = decoder.append([text[begin:end]])
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="outgrows"):
        decoder.append([[1] * 200])


def test_logits_of_every_token_and_positions_taken_back() -> None:
    decoder = NativeDecoder(gpt())
    decoder.start([[1, 2, 3], [4]], 40)
    every = decoder.extend(torch.tensor([[5, 6, 7], [7, 8, 9]]))  # (2, 3, V)
    decoder.rewind(3)
    for i, tokens in enumerate([[5, 7], [6, 8], [7, 9]]):
        assert torch.equal(every[:, i], decoder.step(torch.tensor(tokens)))
    ragged = decoder.append([[1], [2, 3]], every=True)  # (3, V)
    decoder.rewind(1)
    assert torch.equal(ragged[[0, 2]], decoder.append([[1], [3]]))
    with pytest.raises(ValueError, match="rewind got 9 positions; a row has"):
        decoder.rewind(9)


def test_rows_taken_several_times_go_on_apart() -> None:
    model = gpt()
    prompts = [[1, 2, 3], list(range(140))]
    decoder = NativeDecoder(model)
    decoder.start(prompts, 160)
    decoder.select_rows(torch.tensor([1, 0, 1, 0, 0]))
    decoder.step(torch.tensor([10, 11, 12, 13, 14]))
    decoder.select_rows(torch.tensor([4, 2, 2]))
    got = decoder.step(torch.tensor([20, 21, 22]))
    texts = [[*prompts[0], 14, 20], [*prompts[1], 12, 21], [*prompts[1], 12, 22]]
    assert torch.equal(got, NativeDecoder(model).start(texts, 160))


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int8"])
def test_narrow_weights_are_rounded_weights_with_exact_sums(each_isa: None, weight_dtype: Any) -> None:
    model = gpt()
    got = logits_along(NativeDecoder(model, weight_dtype), PROMPTS)
    rounded = gpt()
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(parameter.bfloat16().float() if weight_dtype == "bfloat16" else in_8_bits(parameter))
    want = logits_along(OwnCacheDecoder(rounded), PROMPTS)
    assert closeness(got, want) < 8e-3  # what is left: keys and values in float16
    assert closeness(got, logits_along(OwnCacheDecoder(model), PROMPTS)) > closeness(got, want)


def in_8_bits(weight: Tensor) -> Tensor:
    """Rounded to 8 bits with one bfloat16 scale for each 64 inputs of an output."""
    groups = nn.functional.pad(weight, (0, -weight.shape[1] % 64)).unflatten(1, (-1, 64))
    scale = (groups.abs().amax(2, keepdim=True) / 127.0).bfloat16().float()
    return ((groups / scale).round().clamp(-127, 127) * scale).flatten(1)[:, : weight.shape[1]]


def on_the_4_bit_grid(weight: Tensor) -> Tensor:
    """Weights that are scale * n + least in each group of 32, with both ends of 0 .. 15 in use."""
    groups = nn.functional.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
    least, scale = groups.amin(2, keepdim=True).bfloat16().float(), (groups.std(2, keepdim=True) / 3).bfloat16().float()
    n = ((groups - least) / scale).round().clamp(0, 15)
    n[..., 0], n[..., 1] = 0, 15
    return (n * scale + least).flatten(1)[:, : weight.shape[1]]


def test_4_bits_keep_what_4_bits_can_hold_and_lose_more_than_8_of_the_rest(each_isa: None) -> None:
    model = gpt()
    before = logits_along(OwnCacheDecoder(model), PROMPTS)
    loss = {kind: closeness(logits_along(NativeDecoder(model, kind), PROMPTS), before) for kind in ("int8", "int4")}
    assert loss["int8"] < 0.3 * loss["int4"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                outer = "embedding" in name or "head" in name
                parameter.copy_((in_8_bits if outer else on_the_4_bit_grid)(parameter))
    got, want = logits_along(NativeDecoder(model, "int4"), PROMPTS), logits_along(OwnCacheDecoder(model), PROMPTS)
    assert closeness(got, want) < 8e-3  # keys and values in float16


def test_a_bfloat16_model_keeps_its_weights() -> None:
    model = gpt().bfloat16()
    exact = gpt().bfloat16().float()
    assert closeness(logits_along(NativeDecoder(model), PROMPTS), logits_along(OwnCacheDecoder(exact), PROMPTS)) < 8e-3


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01}]
)
def test_the_loop_in_cpp_draws_the_tokens_that_the_sampler_draws(each_isa: None, options: dict[str, Any]) -> None:
    model, seeds = gpt(), [11, 2**63 - 1, 5, 0]
    filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    decoder = NativeDecoder(model)
    logits = decoder.start(PROMPTS, 160)
    want = []
    for position in range(10):
        tokens = ops.sample(logits, seed=torch.tensor(seeds), position=position, impl="reference", **filters)
        want.append(tokens.tolist())
        logits = decoder.step(tokens)
    decoder = NativeDecoder(model)
    decoder.start(PROMPTS, 160)
    got = decoder.run(3, seeds, 203, [], None, **filters) + decoder.run(7, seeds, 203, [], None, **filters)
    assert got == want


def test_rows_leave_the_loop_at_an_end_token_or_when_the_callback_says_so() -> None:
    model = gpt()
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def run(ends: list[int], callback: Any) -> list[list[int]]:
        decoder = NativeDecoder(model)
        decoder.start(PROMPTS, 160)
        return decoder.run(8, [0] * 4, 203, ends, callback, **greedy)

    free = run([], None)
    end = free[2][1]
    going = [[i for i in range(4) if all(round[i] != end for round in free[:n])] for n in range(8)]
    assert run([end], None) == [[round[i] for i in rows] for round, rows in zip(free, going) if rows]
    seen: list[list[int]] = []

    def stop_after_three(tokens: list[int]) -> list[int] | None:
        seen.append(tokens)
        return [0, 2] if len(seen) == 3 else None

    called = run([], stop_after_three)
    assert called == seen and called[:3] == free[:3]
    assert called[3:] == [[round[0], round[2]] for round in free[3:]]


def test_generate_writes_the_same_text_with_either_engine() -> None:
    model = gpt()
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.95, "seed": 3}):
        native, eager = (
            generate(model, PROMPTS, max_new_tokens=40, engine=engine, **options) for engine in ("native", "eager")
        )
        assert native == eager == generate(model, PROMPTS, max_new_tokens=40, **options)


def test_streams_and_stop_strings_come_out_of_the_loop_in_cpp_as_they_do_from_python() -> None:
    tokenizer = ByteTokenizer()
    model = gpt(vocab_size=257)
    options = {"tokenizer": tokenizer, "max_new_tokens": 50, "temperature": 0.9, "top_k": 30, "seed": 5}
    prompts = ["a fox", "äöü and more of it", "x"]
    texts = generate(model, prompts, engine="eager", **options)
    assert generate(model, prompts, engine="native", **options) == texts
    stop = texts[0][10:12]
    stopped = generate(model, prompts, engine="eager", stop=stop, **options)
    assert stopped[0] != texts[0] and generate(model, prompts, engine="native", stop=stop, **options) == stopped
    pieces = ["", "", ""]
    for row, piece in generate(model, prompts, engine="native", stop=stop, stream=True, **options):
        pieces[row] += piece
    assert pieces == stopped


def test_a_model_in_training_keeps_no_packed_copy() -> None:
    model = gpt().train()
    generate(model, [[1, 2]], max_new_tokens=3, engine="native")
    assert model.training and model not in native_decoding._PREPARED
    model.eval()
    generate(model, [[1, 2]], max_new_tokens=3, engine="native")
    assert model in native_decoding._PREPARED


def test_weights_that_change_are_packed_again_and_those_that_stay_are_not() -> None:
    model = gpt()
    first = NativeDecoder(model)
    before = first.start([[1, 2]], 4)

    def all_grads() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)

    def step(optimizer: torch.optim.Optimizer) -> None:
        all_grads()
        optimizer.step()

    down = model.blocks[1].mlp.down
    changes: dict[str, Any] = {
        "torch's optimizer": lambda: step(torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)),
        "ours": lambda: step(AdamW(model.parameters(), lr=1e-2)),
        "load_state_dict": lambda: model.load_state_dict(gpt(tie_embeddings=True).state_dict()),
        "one number, counted": lambda: down.weight.detach()[3, 5].add_(1.0),
        ".data of a matrix": lambda: down.weight.data.mul_(1.5),
        ".data of some rows": lambda: down.weight.data[4:8].zero_(),
        "another tensor": lambda: setattr(down, "weight", nn.Parameter(down.weight.detach().clone() + 0.1)),
    }
    for name, change in changes.items():
        for _ in range(9):
            assert NativeDecoder(model)._weights is NativeDecoder(model)._weights, name
        before = NativeDecoder(model).start([[1, 2]], 4)
        change()
        after = NativeDecoder(model).start([[1, 2]], 4)
        assert not torch.equal(before, after), name
        assert closeness(after, logits_along(OwnCacheDecoder(model), [[1, 2]], steps=0)) < 2e-5, name
    kept = NativeDecoder(model)
    before = kept.start([[1, 2]], 4)
    down.weight.data[3, 5] += 1.0  # the least that can change, where nobody counts: seen within 8 calls
    seen = [not torch.equal(NativeDecoder(model).start([[1, 2]], 4), before) for _ in range(8)]
    assert seen == sorted(seen) and seen[-1]
    assert torch.equal(kept.start([[1, 2]], 4), before)  # a text under way keeps its weights


def test_weights_without_versions_are_read_whole_at_each_call() -> None:
    with torch.inference_mode():
        model = gpt()
    assert all(parameter.is_inference() for parameter in model.parameters())
    before = NativeDecoder(model).start([[1, 2]], 4)
    with torch.inference_mode():
        model.blocks[1].mlp.down.weight[3, 5] += 1.0
    assert not torch.equal(NativeDecoder(model).start([[1, 2]], 4), before)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 511, 512, 4999, 3 * 2**20 + 17])
def test_sums_of_parts_see_every_byte_once_and_a_whole_block_every_time(size: int) -> None:
    memory = torch.arange(size).to(torch.uint8)

    def sums() -> list[list[int]]:
        return [MODULE.checksums([(memory.data_ptr(), size)], 2, part) for part in range(8)]

    before, whole = sums(), MODULE.checksums([(memory.data_ptr(), size)], 1)
    for at in {0, size // 3, size // 2, size - 1}:
        memory[at] += 1
        assert sum(a != b for a, b in zip(sums(), before)) == 1
        assert MODULE.checksums([(memory.data_ptr(), size)], 2) != whole
        memory[at] -= 1
    assert sums() == before
    if size > 2000:
        memory[700 : 700 + 1024] += 1
        assert all(a != b for a, b in zip(sums(), before))


def test_memory_is_given_back_with_the_model_or_when_asked() -> None:
    model = gpt()
    NativeDecoder(model)
    assert model in native_decoding._PREPARED
    release(model)
    assert model not in native_decoding._PREPARED
    NativeDecoder(model)
    count = len(native_decoding._PREPARED)
    del model
    gc.collect()
    assert len(native_decoding._PREPARED) == count - 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_goes_on_without_its_parents_threads() -> None:
    model = gpt()
    decoder = NativeDecoder(model)
    want = [decoder.start([[1, 2]], 4), decoder.step(torch.tensor([3]))]
    decoder.rewind(1)
    child = os.fork()
    if child == 0:  # leaves by _exit whatever happens: pytest must not go on twice
        status = 1
        try:
            fresh = NativeDecoder(model)
            got = [fresh.start([[1, 2]], 4), decoder.step(torch.tensor([3]))]
            status = 0 if all(torch.equal(a, b) for a, b in zip(want, got)) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("now", [1, 4])
def test_another_number_of_threads_than_the_weights_were_packed_for_gives_the_same_text(now: int) -> None:
    model, before = gpt(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        decoder = NativeDecoder(model)
        want = decoder.start([[1, 2, 3]], 4)
        torch.set_num_threads(now)
        assert torch.equal(decoder.start([[1, 2, 3]], 4), want)
    finally:
        torch.set_num_threads(before)


def test_two_texts_at_once_on_one_model_do_not_mix() -> None:
    model = gpt()
    alone = [logits_along(NativeDecoder(model), [prompt], steps=0) for prompt in PROMPTS[:2]]
    decoders = [NativeDecoder(model), NativeDecoder(model)]
    together = [decoder.start([prompt], 20) for decoder, prompt in zip(decoders, PROMPTS[:2])]
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    steps = [decoder.step(torch.tensor([9])) for decoder in decoders]
    assert not torch.equal(*steps)


def test_what_cannot_be_served_says_why_and_auto_goes_on_without() -> None:
    class Mine(GPT):
        pass

    hooked = gpt()
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    adapted = gpt()
    adapted.blocks[0].mlp.down = nn.Sequential(adapted.blocks[0].mlp.down)
    odd = gpt().double()
    cases: list[tuple[nn.Module, str]] = [
        (Mine(gpt().config), "it reads fasttrain.models.gpt.GPT"),
        (hooked, "module 'blocks.0' has forward hooks"),
        (adapted, "it reads a plain Linear where the model has Sequential"),
        (odd, "a weight is torch.float64,"),
        (llama("Mistral", sliding_window=16), "sliding window of 16"),
        (llama(attention_bias=True), "it reads a plain Linear"),
        (llama(hidden_act="gelu"), "hidden_act='gelu'"),
        (
            llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rotary angles are 'dynamic'",
        ),
    ]
    for model, reason in cases:
        assert reason in native_problem(model)
        with pytest.raises(ValueError, match="engine='native' cannot serve") as error:
            generate(model, [[1, 2]], max_new_tokens=2, engine="native")
        assert reason in str(error.value)
        assert not isinstance(decoder_for(model), NativeDecoder)
    with pytest.raises(ValueError, match="weight_dtype='int8' needs the native engine"):
        generate(gpt(), [[1]], max_new_tokens=1, engine="eager", weight_dtype="int8")


def test_too_large_a_model_is_left_to_the_eager_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt()
    monkeypatch.setattr(native_decoding, "_available_memory", lambda: 1000.0)
    assert "weight_dtype='bfloat16', 'int8' or 'int4' needs less" in native_problem(model)
    assert isinstance(decoder_for(model), OwnCacheDecoder)


@pytest.mark.parametrize("weight_dtype", ["model", "int8", "int4"])
def test_bad_logits_and_ids_are_errors(weight_dtype: Any) -> None:
    model = gpt()
    with torch.no_grad():
        model.final_norm.weight[0] = float("nan")
    decoder = NativeDecoder(model, weight_dtype)
    decoder.start([[1], [2]], 4)
    with pytest.raises(ValueError, match="row 0 of the logits holds NaN"):
        decoder.run(1, [0, 0], 203, [], None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    with pytest.raises(ValueError, match="prompt 0, new token 0: logits: row 0 holds NaN"):
        generate(model, [[1], [2]], max_new_tokens=2, engine="native", weight_dtype=weight_dtype)
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        NativeDecoder(model).start([[203]], 4)
