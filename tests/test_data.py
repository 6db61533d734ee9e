"""Token files, windows and the loader: the same samples in the same order, however and from wherever they are read."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import corpus, token_store
from fasttrain.data import TokenDataset, TokenLoader, corpus_bytes, open_tokens, prepare_tokens
from fasttrain.prefetch import prefetch
from fasttrain.tokenization import ByteTokenizer, JsonTokenizer


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(f"document {index} says hello\n" * 4)
    return folder


def _dataset(num_windows=23, seq_len=4):
    """Every token differs, so a window's first token tells which window it is: x[0] = seq_len * index."""
    return TokenDataset(np.arange(num_windows * seq_len + 1, dtype=np.uint16), seq_len)


def _ids(batches):
    """The window numbers of each batch."""
    return [[int(row[0]) // row.shape[0] for row in x] for x, _ in batches]


def _flat(batches):
    return list(itertools.chain.from_iterable(_ids(batches)))


# -- token files ------------------------------------------------------------------------------------------------------


def _expected(folder, split, val_fraction, seed):
    """What a split holds, written as plainly as possible: the documents of it, each followed by 256."""
    ids = []
    for path in sorted(folder.iterdir()):
        digest = hashlib.blake2b(f"{seed}\0{path.name}".encode(), digest_size=8).digest()
        is_val = int.from_bytes(digest, "little") / 2**64 < val_fraction
        if is_val == (split == "val"):
            ids += [*path.read_bytes(), 256]
    return ids


def test_tokens_are_the_documents_with_an_end_of_text_after_each(texts, tmp_path):
    for seed in (0, 1):
        pair = prepare_tokens(texts, "bytes", tmp_path / "cache", seq_len=8, val_fraction=0.2, seed=seed)
        for name, dataset in zip(("train", "val"), pair):
            expected = _expected(texts, name, 0.2, seed)
            assert dataset.tokens.tolist() == expected
            assert isinstance(dataset.tokens, np.memmap) and dataset.tokens.dtype == np.uint16
            assert dataset.bytes_per_token == (len(expected) - expected.count(256)) / len(expected)
            assert isinstance(dataset.tokenizer, ByteTokenizer) and dataset.vocab_size == 257


def test_a_second_call_reuses_the_files_and_a_change_of_corpus_tokenizer_or_split_does_not(texts, tmp_path):
    cache, calls = tmp_path / "cache", []

    def prepare(tokenizer="bytes", **options):
        calls.clear()
        datasets = prepare_tokens(texts, tokenizer, cache, seq_len=8, progress=lambda done, total: calls.append(done),
                                  **{"val_fraction": 0.2, **options})
        return bool(calls), [dataset.tokens.tolist() for dataset in datasets]

    assert prepare()[0]
    built, first = prepare()
    assert not built
    assert prepare(seed=1)[0] and prepare(val_fraction=0.3)[0] and prepare("bpe:270")[0]
    assert not prepare("bpe:270")[0]

    class Shouting(ByteTokenizer):
        """Differs from the plain one in nothing but the ids."""

        def encode(self, text):
            return super().encode(text.upper())

    assert prepare(Shouting())[0]
    (texts / "00.txt").write_text("changed")
    built, second = prepare()
    assert built and second != first
    (texts / "new.txt").write_text("added")
    assert prepare()[0]
    assert not [path for path in cache.iterdir() if "partial" in path.name]


def test_a_trained_bpe_is_kept_under_a_hash_of_the_texts(texts, tmp_path):
    train, _ = prepare_tokens(texts, "bpe:280", tmp_path / "a", seq_len=4, val_fraction=0.2)
    prepare_tokens(texts, "bpe:280", tmp_path / "b", seq_len=4, val_fraction=0.2)
    (first,), (second,) = ((tmp_path / name).glob("bpe-280-*.json") for name in "ab")
    assert first.name == second.name and first.read_bytes() == second.read_bytes()
    assert isinstance(train.tokenizer, JsonTokenizer)
    documents = "".join(path.read_text() for path in sorted(texts.iterdir())
                        if path.read_text() in train.tokenizer.decode(train.tokens.tolist()))
    assert train.tokenizer.decode(train.tokens.tolist()) == documents
    assert train.bytes_per_token == pytest.approx(len(documents.encode()) / train.num_tokens)
    os.utime(texts / "00.txt", ns=(0, 0))  # same content, another time: the tokenizer is not trained again
    before = first.stat().st_ino
    prepare_tokens(texts, "bpe:280", tmp_path / "a", seq_len=4, val_fraction=0.2)
    assert first.stat().st_ino == before
    (texts / "00.txt").write_text("another content under the same name")
    prepare_tokens(texts, "bpe:280", tmp_path / "a", seq_len=4, val_fraction=0.2)
    assert len(list((tmp_path / "a").glob("bpe-280-*.json"))) == 2


def test_parts_of_a_long_file_are_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 32)
    monkeypatch.setattr(token_store, "_BATCH_BYTES", 50)
    text = "".join(f"line {index}\n" for index in range(100))
    (tmp_path / "input.txt").write_text(text)
    train, val = prepare_tokens(tmp_path / "input.txt", "bytes", tmp_path / "cache", seq_len=8, val_fraction=0.25)
    joined = train.tokens.tolist()[:-1] + val.tokens.tolist()[:-1]
    assert bytes(joined).decode() == text
    assert train.tokens[-1] == val.tokens[-1] == 256
    assert corpus_bytes(tmp_path / "input.txt", val_fraction=0.25) == (
        bytes(train.tokens.tolist()[:-1]), bytes(val.tokens.tolist()[:-1]))


def test_standard_input_becomes_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"0123456\n" * 20)))
    train, val = prepare_tokens("-", "bytes", tmp_path, seq_len=8, val_fraction=0.5)
    assert bytes(train.tokens[:-1].tolist()) == bytes(val.tokens[:-1].tolist()) == b"0123456\n" * 10


def test_progress_rises_to_the_size_of_the_corpus(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "_BATCH_BYTES", 500)
    calls = []
    prepare_tokens(texts, "bytes", tmp_path / "cache", seq_len=8, val_fraction=0.2,
                   progress=lambda *numbers: calls.append(numbers))
    total = sum(path.stat().st_size for path in texts.iterdir())
    assert len(calls) > 4 and calls == sorted(calls) and calls[-1] == (total, total)


def test_a_failure_or_kill_while_writing_leaves_no_store_and_the_next_call_succeeds(texts, tmp_path):
    cache = tmp_path / "cache"
    program = f"""
import os
from pathlib import Path
from fasttrain import corpus, token_store, tokenization
token_store._BATCH_BYTES = 500
def die(done, total):
    if done > 500:
        {{action}}
token_store.build_token_store(corpus.list_files({str(texts)!r}), tokenization.ByteTokenizer(), Path({str(cache)!r}),
                              val_fraction=0.2, seed=0, progress=die)
"""
    for action, left in (("raise RuntimeError('stop')", 0), ("os.kill(os.getpid(), 9)", 1)):
        ended = subprocess.run([sys.executable, "-c", program.replace("{action}", action)], capture_output=True)
        assert ended.returncode != 0
        assert not list(cache.glob("tokens-*")) and len(list(cache.glob(".*.partial"))) == left
    train, _ = prepare_tokens(texts, "bytes", cache, seq_len=8, val_fraction=0.2)
    assert train.tokens.tolist() == _expected(texts, "train", 0.2, 0)
    assert not list(cache.glob(".*.partial"))


def test_processes_that_ask_at_once_build_the_store_once(texts, tmp_path):
    """The first is held in the middle of its work until the second is surely waiting for it."""
    program = f"""
import sys
from pathlib import Path
from fasttrain import corpus, token_store, tokenization
def progress(done, total):
    built.append(done)
    if sys.argv[1] == "first" and len(built) == 1:
        print("writing", flush=True)
        sys.stdin.readline()
built = []
files, tokenizer = corpus.list_files({str(texts)!r}), tokenization.ByteTokenizer()
if sys.argv[1] == "second":
    print("asking", flush=True)
token_store.build_token_store(files, tokenizer, Path({str(tmp_path / "cache")!r}), val_fraction=0.2, seed=0,
                              progress=progress)
print("built" if built else "found")
"""
    def start(name, says):
        process = subprocess.Popen([sys.executable, "-c", program, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True)
        assert process.stdout.readline() == f"{says}\n"
        return process

    first, second = start("first", "writing"), start("second", "asking")
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    assert first.communicate("go on\n")[0] == "built\n"
    assert second.communicate()[0] == "found\n"


def test_a_damaged_store_is_refused_with_the_way_out(texts, tmp_path):
    train, _ = prepare_tokens(texts, "bytes", tmp_path / "cache", seq_len=8, val_fraction=0.2)
    os.truncate(train.tokens.filename, 10)
    with pytest.raises(ValueError, match=r"train\.bin' have 10 bytes instead of .*delete the folder"):
        prepare_tokens(texts, "bytes", tmp_path / "cache", seq_len=8, val_fraction=0.2)


def test_the_index_tells_what_the_files_hold(texts, tmp_path):
    train, _ = prepare_tokens(texts, "bytes", tmp_path / "cache", seq_len=8, val_fraction=0.2)
    (path,) = (tmp_path / "cache").glob("tokens-*/index.json")
    index = json.loads(path.read_text())
    assert index["splits"]["train"]["sha256"] == hashlib.sha256(path.with_name("train.bin").read_bytes()).hexdigest()
    assert index["splits"]["train"]["num_documents"] == train.tokens.tolist().count(256)
    assert index["num_files"] == 40


def test_a_large_vocabulary_takes_four_bytes_a_token(texts, tmp_path):
    class Wide:
        vocab_size, eos_token_id = 70_000, 69_999

        def encode(self, text):
            return [ord(letter) + 65_536 for letter in text]

        def decode(self, ids):
            return "".join(chr(token - 65_536) for token in ids if token >= 65_536)

    train, _ = prepare_tokens(texts, Wide(), tmp_path / "cache", seq_len=8, val_fraction=0.2)
    assert train.tokens.dtype == np.uint32 and train.tokens[0] == ord("d") + 65_536 and train.tokens[-1] == 69_999


def test_an_id_beyond_the_vocabulary_is_refused_when_written(texts, tmp_path):
    class Wrong(ByteTokenizer):
        vocab_size = 70
        eos_token_id = 0

        def decode(self, ids):
            return str(list(ids))

    wrong = Wrong()
    with pytest.raises(ValueError, match=r"tokenizing '\d\d\.txt': token 0 has id 100, beyond the vocabulary of 70"):
        prepare_tokens(texts, wrong, tmp_path / "cache", seq_len=8)
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_a_split_without_documents_or_shorter_than_a_sequence_says_what_to_do(texts, tmp_path):
    few = [texts / "00.txt", texts / "01.txt"]
    with pytest.raises(ValueError, match=r"the val split is empty: none of 2 document\(s\).*val_fraction=0\.001"):
        prepare_tokens(few, "bytes", tmp_path / "cache", seq_len=8, val_fraction=0.001)
    with pytest.raises(ValueError, match=r"seq_len is 9999, .* 10000 tokens, but the train split has only \d+"):
        prepare_tokens(texts, "bytes", tmp_path / "cache", seq_len=9999, val_fraction=0.2)
    with pytest.raises(ValueError, match="names no end-of-text token"):
        class Endless:
            vocab_size = 256
            encode = staticmethod(lambda text: list(text.encode()))
            decode = staticmethod(lambda ids: bytes(ids).decode())

        prepare_tokens(texts, Endless(), tmp_path / "cache", seq_len=8)
    with pytest.raises(ValueError, match="'bpe:many'; write the number"):
        prepare_tokens(texts, "bpe:many", tmp_path / "cache", seq_len=8)


def test_a_corpus_that_changes_while_it_is_read_is_refused(texts, tmp_path):
    def touch(done, total):
        (texts / "39.txt").write_text("changed meanwhile")

    with pytest.raises(ValueError, match="changed while it was read"):
        prepare_tokens(texts, "bytes", tmp_path / "cache", seq_len=8, val_fraction=0.2, progress=touch)
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_tokenizing_takes_memory_for_a_batch_not_for_the_corpus(tmp_path):
    (tmp_path / "big.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400_000)  # 18 MB
    tracemalloc.start()
    prepare_tokens(tmp_path / "big.txt", "bytes", tmp_path / "cache", seq_len=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


# -- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [5, 8, 9, 10, 41])
def test_every_token_but_the_first_is_a_target_once_and_follows_its_input(num_tokens):
    dataset = TokenDataset(np.arange(num_tokens), 4)
    windows = [dataset[index] for index in range(len(dataset))]
    targets = torch.cat([y for _, y in windows]).tolist()
    assert targets == list(range(1, len(windows) * 4 + 1)) and num_tokens - len(targets) <= 4
    assert all(torch.equal(x + 1, y) and x.dtype == y.dtype == torch.int64 for x, y in windows)


@pytest.mark.parametrize("tokens", [[1, 2, 3, 4, 5], torch.arange(1, 6).to(torch.int32), np.arange(1, 6, dtype="u2")])
def test_lists_tensors_and_arrays_are_tokens(tokens):
    x, y = TokenDataset(tokens, 2)[-1]
    assert x.tolist() == [3, 4] and y.tolist() == [4, 5]


def test_items_are_copies_and_the_tokens_are_not():
    tokens = np.arange(9)
    dataset = TokenDataset(tokens, 4)
    dataset[0][0].fill_(-1)
    assert tokens[0] == 0
    tokens[0] = 7
    assert dataset[0][0][0] == 7


def test_a_plain_dataloader_takes_it_even_in_started_workers(tmp_path):
    np.arange(101, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    dataset = open_tokens(tmp_path / "ids.bin", 4)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=False, num_workers=1,
                                         multiprocessing_context=multiprocessing.get_context("spawn"))
    assert _flat(loader) == list(range(25))
    assert len(str(dataset.__getstate__())) < 1000  # the path is sent, not the tokens


@pytest.mark.parametrize("tokens, options, message", [
    (np.arange(4), {}, r"seq_len is 4, .* take 5 tokens, but the data has only 4; shorten"),
    (np.array([0, 1, 2, 300, 4]), {"tokenizer": "bytes"}, r"data: token 3 has id 300, beyond the vocabulary of 257"),
    (np.array([0, 1, 2, -100, 4]), {}, r"token 3 has id -100"),
    (np.array([0, 1, 2, 3, 9]), {"vocab_size": 9}, r"token 4 has id 9, beyond the vocabulary of 9"),
    (np.zeros((5, 5), dtype=int), {}, r"shape \(5, 5\)"),
    (np.zeros(9), {}, "dtype float64"),
])
def test_tokens_that_cannot_be_trained_on_are_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        TokenDataset(tokens, 4, **options)


def test_a_foreign_token_file_is_checked_when_opened(tmp_path):
    path = tmp_path / "train.bin"
    np.array([1, 2, 3, 50_000, 5, 6], dtype=np.uint16).tofile(path)
    assert open_tokens(path, 2)[1][0].tolist() == [3, 50_000]
    with pytest.raises(ValueError, match=r"train\.bin: token 3 has id 50000, beyond the vocabulary of 257"):
        open_tokens(path, 2, "bytes")
    with pytest.raises(ValueError, match="no whole number of uint64"):
        open_tokens(path, 2, dtype="uint64")
    with pytest.raises(ValueError, match="does not exist"):
        open_tokens(tmp_path / "missing.bin", 2)
    with pytest.raises(IndexError, match="window 2 of"):
        open_tokens(path, 2)[2]


# -- the loader -------------------------------------------------------------------------------------------------------


def test_an_epoch_is_every_window_once_and_epochs_differ():
    loader = TokenLoader(_dataset(23), 5, seed=1, drop_last=False)
    epochs = [_flat(loader) for _ in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(loader) == 5
    assert epochs[0] != _flat(TokenLoader(_dataset(23), 5, seed=2, drop_last=False))
    assert epochs[0] == _flat(TokenLoader(_dataset(23), 5, seed=1, drop_last=False))


def test_unshuffled_windows_come_in_the_order_of_the_text():
    assert _ids(TokenLoader(_dataset(7), 3, shuffle=False)) == [[0, 1, 2], [3, 4, 5]]
    assert _ids(TokenLoader(_dataset(7), 3, shuffle=False, drop_last=False)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_targets_follow_inputs_in_every_batch():
    for x, y in TokenLoader(_dataset(23), 5):
        assert x.shape == (5, 4) and x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x + 1, y)


@pytest.mark.parametrize("num_prefetch", [1, 2, 50])
def test_any_prefetch_depth_gives_the_same_batches_and_positions(num_prefetch):
    def trace(depth):
        loader = TokenLoader(_dataset(23), 5, seed=3, num_prefetch=depth)
        return [(x.tolist(), y.tolist(), loader.state_dict()) for _ in range(2) for x, y in loader]

    assert trace(num_prefetch) == trace(0)


@settings(max_examples=40, deadline=None)
@given(num_windows=st.integers(1, 60), batch_size=st.integers(1, 7), world_size=st.integers(1, 5),
       drop_last=st.booleans())
def test_any_number_of_ranks_shares_one_global_order(num_windows, batch_size, world_size, drop_last):
    dataset = _dataset(num_windows)
    order = _flat(TokenLoader(dataset, 1, seed=7, num_prefetch=0))
    if drop_last and batch_size * world_size > num_windows:
        return
    loaders = [TokenLoader(dataset, batch_size, seed=7, rank=rank, world_size=world_size, drop_last=drop_last,
                           num_prefetch=0) for rank in range(world_size) if drop_last or rank < num_windows]
    per_rank = [_ids(loader) for loader in loaders]
    assert [len(batches) for batches in per_rank] == [len(loader) for loader in loaders]
    for step in range(max(map(len, per_rank))):
        taken = sorted(itertools.chain.from_iterable(batches[step] for batches in per_rank if step < len(batches)))
        start = step * batch_size * world_size
        assert taken == sorted(order[start:start + batch_size * world_size])
    if drop_last:
        assert len(set(map(len, per_rank))) == 1
    else:
        assert sorted(itertools.chain.from_iterable(map(itertools.chain.from_iterable, per_rank))) == sorted(order)


@settings(max_examples=30, deadline=None)
@given(stops=st.lists(st.integers(0, 9), min_size=1, max_size=6), drop_last=st.booleans(), depth=st.integers(0, 3))
def test_resuming_again_and_again_equals_an_uninterrupted_run(stops, drop_last, depth):
    """Each stop is a new process: a fresh loader that gets the saved integers, over several epochs."""
    def fresh():
        return TokenLoader(_dataset(23), 5, seed=4, drop_last=drop_last, num_prefetch=depth)

    def endless(loader):
        while True:
            yield from _flat_each(loader)

    def _flat_each(loader):
        for x, _ in loader:
            yield (x[:, 0] // 4).tolist()

    straight = list(itertools.islice(endless(fresh()), sum(stops)))
    pieces, state = [], fresh().state_dict()
    for count in stops:
        loader = fresh()
        loader.load_state_dict(json.loads(json.dumps(state)))
        pieces += itertools.islice(endless(loader), count)
        state = loader.state_dict()
    assert pieces == straight


def test_a_position_after_the_last_batch_ends_that_epoch_before_the_next():
    loader = TokenLoader(_dataset(23), 5, seed=4)
    straight = [_ids(loader) for _ in range(2)]
    loader = TokenLoader(_dataset(23), 5, seed=4)
    for _ in itertools.islice(loader, 4):
        pass
    resumed = TokenLoader(_dataset(23), 5, seed=4)
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(0)
    assert _ids(resumed) == []
    assert _ids(resumed) == straight[1]


def test_resuming_with_another_batch_size_or_number_of_ranks_keeps_the_order_of_samples():
    dataset = _dataset(60)
    order = _flat(TokenLoader(dataset, 1, seed=5))
    first = TokenLoader(dataset, 6, seed=5)
    seen = _flat(itertools.islice(first, 4))
    for batch_size, world_size in ((9, 1), (2, 3)):
        ranks = []
        for rank in range(world_size):
            loader = TokenLoader(dataset, batch_size, seed=5, rank=rank, world_size=world_size)
            loader.load_state_dict(first.state_dict())
            ranks.append(_ids(loader))
        rest = [sample for step in zip(*ranks) for turn in zip(*step) for sample in turn]
        assert seen + rest == order[:24 + len(rest)] and len(rest) == 36


def test_the_position_counts_what_was_handed_out_not_what_was_prefetched():
    loader = TokenLoader(_dataset(40), 4, num_prefetch=8)
    batches = iter(loader)
    for count in (1, 2, 3):
        next(batches)
        assert loader.state_dict()["index"] == 4 * count
    assert all(isinstance(value, int) for value in loader.state_dict().values())


def test_set_epoch_moves_to_another_epoch_and_keeps_the_place_in_the_current_one():
    loader = TokenLoader(_dataset(23), 5, seed=6)
    epochs = [_ids(loader) for _ in range(3)]
    loader.set_epoch(1)
    assert _ids(itertools.islice(loader, 2)) == epochs[1][:2]
    loader.set_epoch(1)
    assert _ids(loader) == epochs[1][2:]
    loader.set_epoch(0)
    assert _ids(loader) == epochs[0]


def test_from_start_reads_a_whole_epoch_and_leaves_the_position():
    loader = TokenLoader(_dataset(23), 5, seed=6)
    whole = _ids(TokenLoader(_dataset(23), 5, seed=6))
    next(iter(loader))
    before = loader.state_dict()
    assert _ids(loader.from_start()) == whole
    assert loader.state_dict() == before


@pytest.mark.parametrize("name, other, options", [
    ("seed", {"seed": 1}, {}),
    ("shuffle", {"shuffle": False}, {}),
    ("num_samples", {}, {"num_windows": 24}),
    ("seq_len", {}, {"num_windows": 20, "seq_len": 5}),
])
def test_a_position_in_another_order_is_refused(name, other, options):
    state = TokenLoader(_dataset(23), 5).state_dict()
    loader = TokenLoader(_dataset(**{"num_windows": 23, **options}), 5, **other)
    with pytest.raises(ValueError, match=f"saved with {name}=.*but this loader has {name}=.*Pass the"):
        loader.load_state_dict(state)
    assert loader.state_dict()["index"] == 0


def test_a_position_in_other_data_of_the_same_length_is_refused():
    tokens = np.arange(93) % 50
    state = TokenLoader(TokenDataset(tokens, 4), 5).state_dict()
    TokenLoader(TokenDataset(tokens.astype(np.uint16), 4), 5).load_state_dict(state)  # the same ids, stored otherwise
    with pytest.raises(ValueError, match="fingerprint"):
        TokenLoader(TokenDataset(tokens[::-1].copy(), 4), 5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"lacks epoch, index.*it has nothing"):
        TokenLoader(_dataset(), 5).load_state_dict({})
    with pytest.raises(ValueError, match="sample 999 of epoch 0"):
        TokenLoader(TokenDataset(tokens, 4), 5).load_state_dict({**state, "index": 999})


def test_a_loader_that_could_never_give_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"batch_size is 12 on 2 rank\(s\), but the data has only 23 windows"):
        TokenLoader(_dataset(23), 12, world_size=2)
    with pytest.raises(ValueError, match="rank is 2 and world_size is 2"):
        TokenLoader(_dataset(), 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        TokenLoader(_dataset(), 0)


def test_a_long_epoch_is_shuffled_and_resumed_without_memory_for_its_order():
    class Endless(TokenDataset):
        """A billion windows over one token, by a stride of zero: only an index array could take memory."""

        def _view_windows(self):
            self._x = self._y = np.broadcast_to(np.zeros(1, dtype=np.uint16), (10**9, self.seq_len))

    dataset = Endless([0] * 5, 4)
    tracemalloc.start()
    loader = TokenLoader(dataset, 8, seed=1)
    loader.load_state_dict({**loader.state_dict(), "epoch": 3, "index": 999_999_000})
    batches = sum(1 for _ in loader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batches == 125 and peak < 500_000


def test_the_prefetch_thread_ends_with_the_loop_however_it_is_left():
    loader = TokenLoader(_dataset(60), 2)
    earlier = set(threading.enumerate())  # an iterator that another test still holds

    def threads():
        return [t for t in threading.enumerate() if t.name == "fasttrain-prefetch" and t not in earlier]

    for _ in loader:
        assert threads()
        break
    assert not threads()
    for _ in loader:
        pass
    assert not threads()
    iterator = iter(loader)
    next(iterator)
    del iterator
    assert not threads()


def test_an_error_in_the_thread_is_raised_at_its_place():
    def make(item):
        if item == 3:
            raise OSError("disk gone")
        return item

    got = []
    with pytest.raises(OSError, match="disk gone"):
        for item in prefetch(make, range(9), 4):
            got.append(item)
    assert got == [0, 1, 2]


def test_prefetching_stays_within_its_depth():
    made = []
    items = prefetch(lambda item: made.append(item) or item, range(100), 3)
    assert next(items) == 0
    for _ in range(50):
        threading.Event().wait(0.002)
    assert len(made) == 4  # one handed out, three ahead
    items.close()


def test_a_program_may_end_in_the_middle_of_an_epoch():
    program = ("from fasttrain.prefetch import prefetch; "
               "batches = prefetch(str, range(99), 2); next(batches); print('end')")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("end\n", 0)
