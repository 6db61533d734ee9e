"""Tokenizers: exact round trips, text that stays text, and every kind people bring, built here without downloads."""

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.tokenization import (
    EOS,
    ByteTokenizer,
    as_tokenizer,
    encode_documents,
    tokenizer_fingerprint,
    tokenizer_from_dict,
    tokenizer_to_dict,
    train_bpe,
)

CORPUS = ["def add(a, b):\n    return a + b\n", "the quick brown fox jumps over the lazy dog\n" * 5,
          "naïve café 漢字 🙂\n"]
TEXTS = ["", "the fox", "def f(x):\r\n\treturn x\n", "unseen: Ω≈ç√∫ 🧑‍🚀\x00\x7f", f"spelt {EOS} out"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(CORPUS, 300)


def _word_level(**special):
    words = {"[UNK]": 0, "hello": 1, "world": 2, "[BOS]": 3, "[EOS]": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[BOS]", "[EOS]"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 3)])
    return backend


def _tiktoken():
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([value]): value for value in range(256)}
    ranks |= {b"he": 256, b"ll": 257, b"hell": 258}
    return tiktoken.Encoding("tiny", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={EOS: 260})


def _hugging_face():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=_word_level(), bos_token="[BOS]", eos_token="[EOS]",
                                                unk_token="[UNK]")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip_every_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == text


def test_bytes_that_form_no_character_decode_to_the_replacement_and_foreign_ids_are_refused():
    assert ByteTokenizer().decode([0xE9, 65]) == "\ufffdA"
    with pytest.raises(ValueError, match="token id 257"):
        ByteTokenizer().decode([65, 257])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_trained_bpe_round_trips_every_text(text):
    tokenizer = _SHARED
    (ids,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids.tolist()) == text
    assert all(0 < token < tokenizer.vocab_size for token in ids)


def test_a_trained_bpe_compresses_what_it_was_trained_on(bpe):
    assert 257 < bpe.vocab_size <= 300
    assert len(bpe.encode(CORPUS[1])) < len(CORPUS[1].encode()) / 2


def test_the_same_corpus_gives_the_same_bpe_in_another_process(bpe):
    program = ("import sys, json; from fasttrain.tokenization import *; "
               "print(tokenizer_fingerprint(train_bpe(json.load(sys.stdin), 300)))")
    for hash_seed, threads in (("1", "1"), ("2", "4")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": threads}
        output = subprocess.run([sys.executable, "-c", program], input=json.dumps(CORPUS), env=environment, text=True,
                                capture_output=True, check=True).stdout
        assert output.strip() == tokenizer_fingerprint(bpe)


def test_a_document_that_spells_a_special_token_does_not_become_it(bpe):
    tiktoken_like = as_tokenizer(_tiktoken())
    for tokenizer in (bpe, tiktoken_like):
        (ids,) = encode_documents(tokenizer, [f"a {EOS} b"])
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids.tolist()) == f"a {EOS} b"
        assert tokenizer.eos_token_id in tokenizer.encode(f"a {EOS} b")  # a prompt may ask for it


def test_hugging_face_prompts_follow_its_rules_and_documents_get_nothing_added():
    backend = _hugging_face()
    tokenizer = as_tokenizer(backend)
    assert tokenizer.encode("hello world") == backend("hello world")["input_ids"] == [3, 1, 2]
    (plain, spelt) = encode_documents(tokenizer, ["hello world", "hello [EOS] world"])
    assert plain.tolist() == [1, 2]
    assert 4 not in spelt
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (5, 4)
    assert tokenizer.decode([1, 4, 2]) == "hello world"


def test_a_tokenizer_json_is_read_from_its_file_or_folder(tmp_path, bpe):
    bpe.backend.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        loaded = as_tokenizer(path)
        assert loaded.eos_token_id == bpe.eos_token_id
        assert [loaded.encode(text) for text in TEXTS] == [bpe.encode(text) for text in TEXTS]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert as_tokenizer(tmp_path).eos_token_id == bpe.backend.token_to_id("a")


def test_truncation_and_padding_in_the_file_do_not_cut_documents(bpe):
    cutting = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=16)
    tokenizer = as_tokenizer(cutting)
    assert tokenizer.encode(CORPUS[1]) == bpe.encode(CORPUS[1])
    assert cutting.truncation is not None  # the caller's own object was left as it was
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(bpe)


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: train_bpe(CORPUS, 300), _word_level, _hugging_face, _tiktoken])
def test_a_checkpoint_brings_the_tokenizer_back(make):
    original = as_tokenizer(make())
    restored = tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(original))))
    assert (restored.vocab_size, restored.eos_token_id) == (original.vocab_size, original.eos_token_id)
    for text in ["hello world", *TEXTS]:
        ids = original.encode(text)
        assert restored.encode(text) == ids
        assert restored.decode(ids) == original.decode(ids)
        assert [row.tolist() for row in encode_documents(restored, [text])] == [
            row.tolist() for row in encode_documents(original, [text])]


class _Letters:
    """A user's own tokenizer: encode and decode, nothing else."""

    letters = "abcdef"

    def __init__(self, backwards=False):
        self.backwards = backwards

    def encode(self, text):
        return [self.letters.index(letter) for letter in (text[::-1] if self.backwards else text)]

    def decode(self, ids):
        return "".join(self.letters[token] for token in ids)


def test_encode_and_decode_are_all_a_tokenizer_needs(monkeypatch):
    tokenizer = as_tokenizer(_Letters())
    assert tokenizer.decode(tokenizer.encode("fade")) == "fade"
    assert tokenizer.eos_token_id is None and tokenizer_to_dict(tokenizer) is None
    with pytest.raises(ValueError, match="vocab_size"):
        _ = tokenizer.vocab_size
    monkeypatch.setattr(_Letters, "vocab_size", 6, raising=False)
    assert tokenizer.vocab_size == 6
    assert as_tokenizer(tokenizer) is tokenizer
    assert as_tokenizer(tokenizer, eos_token_id=5).eos_token_id == 5


def test_fingerprints_differ_when_the_ids_do(monkeypatch, bpe):
    class Reversed(_Letters):
        letters = "fedcba"
        vocab_size = 6

    monkeypatch.setattr(_Letters, "vocab_size", 6, raising=False)
    monkeypatch.setattr("fasttrain.tokenization._PROBE", "fade")
    tokenizers_ = [ByteTokenizer(), bpe, train_bpe(CORPUS, 290), as_tokenizer(bpe, eos_token_id=7),
                   as_tokenizer(_tiktoken()), as_tokenizer(_Letters()), as_tokenizer(_Letters(backwards=True)),
                   as_tokenizer(Reversed())]
    prints = [tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers_]
    assert len(set(prints)) == len(prints)
    assert prints == [tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers_]


def test_what_is_no_tokenizer_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="int is no tokenizer; pass 'bytes'"):
        as_tokenizer(3)
    with pytest.raises(ValueError, match="does not exist"):
        as_tokenizer(tmp_path / "missing.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        as_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(CORPUS, 100)
    with pytest.raises(ValueError, match="kind 'future'"):
        tokenizer_from_dict({"kind": "future"})


_SHARED = train_bpe(CORPUS, 300)  # hypothesis does not take module fixtures gladly
