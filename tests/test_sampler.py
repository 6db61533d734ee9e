"""What acts on logits before the filters: penalties, DRY, n-grams, bans, processors. Against transformers' processors
where they exist, against the formula token by token where they do not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain import backend
from fasttrain.config import GenerationConfig
from fasttrain.ngram_index import PythonNgramIndex
from fasttrain.penalties import Penalties, SeenTokens, penalized_reference
from fasttrain.repeats import Dry, RepeatIndex
from fasttrain.sampler import Sampler

CPU = torch.device("cpu")
ids_of_few = st.lists(st.integers(0, 4), max_size=40)


def sampler(prompts: list[list[int]], **options: Any) -> Sampler:
    extra = {name: options.pop(name) for name in ("eos", "processors", "text_of", "size") if name in options}
    return Sampler(GenerationConfig(**options), prompts, list(range(len(prompts))), device=CPU, **extra)


def logits_of(rows: int, vocabulary: int = 50, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


# --- Penalties on tokens


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sparse_edits_equal_the_formula_for_ragged_rows_that_grow_leave_and_branch(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.sampled_from([1.0, 0.6, 1.4]), st.sampled_from([0.0, 0.7, -0.3])
    penalties = Penalties(draw(sizes[0]), draw(sizes[1]), draw(sizes[1]), draw(st.booleans()), draw(st.booleans()))
    prompts = draw(st.lists(st.lists(st.integers(0, 19), max_size=30), min_size=1, max_size=5))
    new: list[list[int]] = [[] for _ in prompts]
    seen = SeenTokens(prompts, penalties, CPU)
    for step in range(draw(st.integers(0, 8))):
        if draw(st.booleans()):
            rows = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=6))
            prompts, new = [prompts[row] for row in rows], [list(new[row]) for row in rows]
            seen.select_rows(rows)
        tokens = draw(st.lists(st.integers(0, 19), min_size=len(prompts), max_size=len(prompts)))
        seen.add(tokens)
        for row, token in zip(new, tokens):
            row.append(token)
        x = logits_of(len(prompts), 20, step)
        edited = x.clone()
        seen.edit_inplace(edited)
        torch.testing.assert_close(edited, penalized_reference(x, prompts, new, penalties), rtol=1e-6, atol=1e-6)


def test_tokens_are_counted_after_a_selection_of_rows_that_hold_none() -> None:
    seen = SeenTokens([[], []], Penalties(1.0, 0.0, 0.5, False, False), CPU)
    seen.select_rows([1])
    seen.add([3])
    x = torch.zeros(1, 5)
    seen.edit_inplace(x)
    assert x.tolist() == [[0.0, 0.0, 0.0, -0.5, 0.0]]


def test_the_repetition_penalty_is_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    x, ids = logits_of(2), [[3, 9, 9, 20], [1, 1, 2, 49]]
    ours = sampler(ids, repetition_penalty=1.7).adjusted(x, 0)
    theirs = processors.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(ids), x.clone())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_frequency_and_presence_count_new_tokens_unless_told_otherwise() -> None:
    x, prompt = torch.zeros(1, 6), [0, 1, 1]
    expected = {
        "auto": [0.0, -1.25, -1.75, 0.0], "new": [0.0, -1.25, -1.75, 0.0], "all": [-1.25, -2.25, -1.75, 0.0],
    }  # presence 0.75, frequency 0.5; new tokens 1 2 2  # fmt: skip
    for scope, values in expected.items():
        chooser = sampler([prompt], frequency_penalty=0.5, presence_penalty=0.75, penalty_scope=scope)
        for token in (1, 2, 2):
            chooser.add([token])
        assert chooser.adjusted(x, 3)[0, :4].tolist() == values
    chooser = sampler([prompt], repetition_penalty=2.0, penalty_scope="new")
    chooser.add([2])
    assert chooser.adjusted(x + 1, 1)[0].tolist() == [1, 1, 0.5, 1, 1, 1]


def test_penalties_touch_the_tokens_seen_and_copy_the_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """O(seen) edits: apart from one copy no operation may be as large as the vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    V, sizes = 100_000, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append((str(func), result.numel()))
            return result

    options: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.1, "presence_penalty": 0.2}
    chooser = sampler([[1, 2, 3]], **options, logit_bias={7: 1.0}, banned_tokens=(9,))
    x = torch.randn(1, V)
    with Sizes():
        chooser.add([5])
        chooser.adjusted(x, 1)
    large = [name for name, size in sizes if size >= V]
    assert [name for name in large if "index_put" not in name] == ["aten._to_copy.default"], large


def test_bias_comes_first_bans_last_and_the_callers_logits_stay() -> None:
    x = torch.full((1, 6), 2.0)
    before = x.clone()
    bias = {1: -4.0, 3: 0.5, 4: 100.0}
    out = sampler([[1, 2]], repetition_penalty=2.0, logit_bias=bias, banned_tokens=(4, 5)).adjusted(x, 0)
    assert out[0].tolist() == [2.0, -4.0, 1.0, 2.5, -math.inf, -math.inf]  # (2 - 4) * 2, 2 / 2, 2 + 0.5
    assert torch.equal(x, before)
    assert sampler([[1]]).adjusted(x, 0) is x  # nothing to do, nothing copied


def test_bias_and_bans_are_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    x, ids = logits_of(1), torch.tensor([[4, 5]])
    theirs = processors.SequenceBiasLogitsProcessor([[[3], 1.5], [[8], -2.0]])(ids, x.clone())
    theirs = processors.NoBadWordsLogitsProcessor([[11], [12]], eos_token_id=0)(ids, theirs)
    theirs = processors.MinNewTokensLengthLogitsProcessor(2, 3, 0)(ids, theirs)
    ours = sampler([[4, 5]], logit_bias={3: 1.5, 8: -2.0}, banned_tokens=(11, 12), min_new_tokens=3, eos=[0])
    assert torch.equal(ours.adjusted(x, 0), theirs)
    assert ours.adjusted(x, 2)[0, 0] == -math.inf and ours.adjusted(x, 3)[0, 0] == x[0, 0]


def test_processors_get_each_rows_own_text_and_their_results_are_checked() -> None:
    seen: list[list[int]] = []

    def notes(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        assert ids.shape[0] == logits.shape[0] == 1 and logits.dtype == torch.float32
        return logits + 1

    chooser = sampler([[1, 2, 3], [4]], processors=(notes, lambda ids, logits: logits * 2))
    chooser.add([7, 8])
    assert torch.equal(chooser.adjusted(torch.ones(2, 9, dtype=torch.bfloat16), 1), torch.full((2, 9), 4.0))
    assert seen == [[1, 2, 3, 7], [4, 8]]
    chooser.select_rows([1])
    chooser.adjusted(torch.ones(1, 9), 1)
    assert seen[2:] == [[4, 8]]
    bad: list[Callable[[Tensor, Tensor], Any]] = [lambda i, x: x[0], lambda i, x: None, lambda i, x: x.long()]
    for processor in bad:
        with pytest.raises(ValueError, match=r"processor .* returned .* must return floating-point logits"):
            sampler([[1]], processors=(processor,)).adjusted(torch.ones(1, 9), 0)


# --- Repeats


@settings(max_examples=200, deadline=None)
@given(ids=ids_of_few)
def test_the_repeat_index_finds_every_earlier_place_of_the_end(ids: list[int]) -> None:
    index = RepeatIndex(ids)
    expected = set()
    for j in range(len(ids) - 1):
        length = 0
        while length <= j and ids[j - length] == ids[-1 - length]:
            length += 1
        if length:
            expected.add((length, j))
    assert set(index.repeats()) == expected
    other = index.copy()
    other.append(0)
    assert set(index.repeats()) == expected and index.ids == ids


@settings(max_examples=100, deadline=None)
@given(ids=ids_of_few, n=st.integers(1, 4))
def test_no_repeat_ngram_bans_what_transformers_bans(ids: list[int], n: int) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    x, ids = torch.zeros(1, 8), [*ids, 1]
    theirs = processors.NoRepeatNGramLogitsProcessor(n)(torch.tensor([ids]), x.clone())
    assert torch.equal(sampler([ids], no_repeat_ngram=n).adjusted(x, 0), theirs)


@settings(max_examples=150, deadline=None)
@given(ids=ids_of_few, allowed=st.integers(1, 4), breakers=st.booleans())
def test_dry_is_the_formula_searched_the_plain_way(ids: list[int], allowed: int, breakers: bool) -> None:
    """Token 4 breaks. For each token: the longest L such that the last L tokens, none of them a breaker, stood before
    and the token came next."""
    dry = Dry(RepeatIndex(ids), 0.8, 1.75, allowed, ("4",) if breakers else (), str)
    expected = {}
    unbroken = next((i for i, token in enumerate(reversed(ids)) if breakers and token == 4), len(ids))
    for token in set(ids) - ({4} if breakers else set()):
        for length in range(min(unbroken, len(ids) - 1), allowed - 1, -1):
            end = ids[len(ids) - length :]
            if any(ids[i : i + length] == end and ids[i + length] == token for i in range(len(ids) - length)):
                expected[token] = 0.8 * 1.75 ** (length - allowed)
                break
    assert dry.penalties() == pytest.approx(expected)


def test_dry_by_hand() -> None:
    # "a b c d a b c": the last three stood before, d came next: 0.8 * 1.75^(3 - 2).
    chooser = sampler([[1, 2, 3, 4, 1, 2]], dry_multiplier=0.8, dry_breakers=())
    assert chooser.adjusted(torch.zeros(1, 9), 0)[0].tolist() == pytest.approx([0, 0, 0, -0.8, 0, 0, 0, 0, 0])
    chooser.add([3])
    assert chooser.adjusted(torch.zeros(1, 9), 1)[0].tolist() == pytest.approx([0, 0, 0, 0, -1.4, 0, 0, 0, 0])
    # A long repeat does not overflow.
    chooser = sampler([[1] * 3000], dry_multiplier=0.8, dry_base=4.0, dry_breakers=())
    lost = chooser.adjusted(torch.zeros(1, 9), 0)[0, 1]
    assert bool(torch.isfinite(lost)) and lost < -1e30


def test_dry_breakers_are_found_in_text_and_across_tokens() -> None:
    texts = {0: "x", 1: "a", 2: "b", 3: "<|", 4: "end|>", 5: "say:", 6: "c"}
    def lost(ids: list[int], *breakers: str) -> dict[int, float]:
        return Dry(RepeatIndex(ids), 1.0, 2.0, 2, breakers, texts.__getitem__).penalties()

    assert lost([1, 2, 6, 0, 1, 2]) == {6: 1.0}
    assert lost([1, 5, 6, 0, 1, 5]) == {6: 1.0} and lost([1, 5, 6, 0, 1, 5], ":") == {}  # ends in a breaker
    assert lost([1, 2, 5, 0, 1, 2], ":") == {}  # the next token is a breaker, and free
    assert lost([3, 4, 1, 2, 6, 3, 4, 1, 2]) == {6: 4.0}
    assert lost([3, 4, 1, 2, 6, 3, 4, 1, 2], "<|end|>") == {6: 1.0}  # only the two after it count


KINDS = [PythonNgramIndex] + ([backend.extension().NgramIndex] if backend.extension() else [])  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_lookup_continues_the_longest_and_of_equals_the_latest_repeat(kind: Any) -> None:
    def found(ids: list[int], count: int, shortest: int = 2, longest: int = 16) -> list[int]:
        index = kind(shortest, longest)
        index.extend(ids)
        assert len(index) == len(ids)
        return index.continuation(count)

    assert found([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 2) == [9, 2]
    assert found([2, 3, 9, 2, 3, 7, 2, 3], 9) == [7, 2, 3]
    assert found([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 2, longest=2) == [7, 1]  # three agree there, two count
    assert found([2, 3, 9, 3], 9) == [] == found([], 3)
    assert found([2, 3, 9, 3], 9, shortest=1) == [9, 3]


@pytest.mark.skipif(backend.extension() is None, reason=backend.CPP_PROBLEM or "has the extension")
def test_the_compiled_lookup_proposes_what_the_reference_does_over_random_streams() -> None:
    module: Any = backend.extension()
    proposals = 0
    for seed in range(60):
        draw = random.Random(seed)
        shortest = draw.randint(1, 4)
        longest = shortest + draw.choice([0, 1, 3, 12])
        index, reference = module.NgramIndex(shortest, longest), PythonNgramIndex(shortest, longest)
        size, text = draw.choice([2, 3, 8, 50000]), list[int]()
        for _ in range(200):
            if text and draw.random() < 0.3:  # repeats longer than chance makes
                begin = draw.randrange(len(text))
                piece = text[begin : begin + draw.randint(1, 25)]
            else:
                piece = [draw.randrange(size)]
            text += piece
            index.extend(piece)
            reference.extend(piece)
            count = draw.randint(0, 9)
            assert index.continuation(count) == reference.continuation(count)
            proposals += bool(reference.continuation(count))
    assert proposals > 3000
    with pytest.raises(ValueError, match="shortest=3 and longest=2 must hold 1 <= shortest <= longest"):
        module.NgramIndex(3, 2)
