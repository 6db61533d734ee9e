"""Batches of next-token windows whose order is computed, so that a run can stop and go on at any sample.

Tokens lie in memory-mapped files (token_store.py); `TokenDataset` sees them as windows of T + 1 ids, `TokenLoader`
hands them out as (x, y) batches. Which window comes when is a pure function of (seed, epoch, place in the epoch): no
index array, a position of a few integers, the same order for any batch size, number of ranks or prefetch depth.
Left out: padding, and masking between the documents inside a window (the end-of-text token tells the model).
Letters: B sequences in a batch, T tokens in a sequence, N windows in a dataset.
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .corpus import (
    STDIN,
    CorpusFile,
    Document,
    Source,
    Split,
    list_files,
    read_documents,
    split_documents,
    spool_stdin,
)
from .dealing import PASSED
from .permutation import Indices, permute
from .prefetch import prefetch
from .storage import make_directory
from .token_store import Progress, StoredSplit, build_token_store, check_token_ids, open_token_store
from .tokenization import Tokenizer, as_tokenizer, train_bpe

Batch: TypeAlias = tuple[Tensor, Tensor]

__all__ = ["Document", "TokenDataset", "TokenLoader", "corpus_bytes", "open_tokens", "prepare_tokens", "read_documents"]


class TokenDataset:
    """A row of token ids as N windows: window i is x = ids[iT : iT + T], y = ids[iT + 1 : iT + T + 1].

    Every id but the first is a target exactly once (short of a last partial window). Nothing is copied until an item or
    batch is asked for, and then only that. It has `__len__` and `__getitem__`, so a plain `DataLoader` takes it too.
    """

    def __init__(self, tokens: Tensor | NDArray[Any] | Sequence[int], seq_len: int, tokenizer: Any = None, *,
                 vocab_size: int | None = None, bytes_per_token: float | None = None, name: str = "data",
                 check_ids: bool = True) -> None:
        """
        Args:
            tokens: (L,) integers; an array or memory map is used as it is, not copied.
            seq_len: T, tokens per sequence; at least one window must fit: L >= T + 1.
            tokenizer: anything `as_tokenizer` takes, or None.
            vocab_size: number of ids (default: the tokenizer's); None: ids are only checked not to be negative.
            bytes_per_token: bytes of text that a token stands for on average; None: unknown.
            name: what errors call this data.
            check_ids: read all ids once and refuse one outside the vocabulary.
        """
        self.tokens = _as_array(tokens, name)
        self.seq_len = seq_len
        self.tokenizer: Tokenizer | None = None if tokenizer is None else as_tokenizer(tokenizer)
        self.vocab_size = self.tokenizer.vocab_size if vocab_size is None and self.tokenizer else vocab_size
        self.bytes_per_token = bytes_per_token
        self.name = name
        self.num_tokens = len(self.tokens)
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; a sequence has at least one token")
        if self.num_tokens < seq_len + 1:
            raise ValueError(f"seq_len is {seq_len}, so one sequence and its targets take {seq_len + 1} tokens, but "
                             f"the {name} has only {self.num_tokens}; shorten seq_len, or use more text (for a "
                             f"validation split: a larger val_fraction)")
        if check_ids:
            check_token_ids(self.tokens, np.iinfo(np.int64).max if self.vocab_size is None else self.vocab_size, name)
        self._view_windows()

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> Batch:
        """(x, y), each (T,) int64."""
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {self.name}, which has {len(self)}")
        x, y = self.batch(np.array([index % len(self)]))
        return x[0], y[0]

    def batch(self, indices: Indices) -> Batch:
        """(x, y), each (B, T) int64 and contiguous, of the windows with these indices."""
        x = torch.from_numpy(self._x[indices].astype(np.int64))  # (B, T)
        y = torch.from_numpy(self._y[indices].astype(np.int64))  # (B, T)
        return x, y

    def fingerprint(self) -> int:
        """48 bits that tell this data from another of the same length: a hash over 256 short pieces of it."""
        digest = hashlib.blake2b(f"{self.num_tokens} {self.seq_len}".encode(), digest_size=6)
        for start in np.linspace(0, max(self.num_tokens - 64, 0), num=256).astype(np.int64):
            digest.update(self.tokens[start:start + 64].astype("<i8").tobytes())
        return int.from_bytes(digest.digest(), "little")

    def _view_windows(self) -> None:
        covered = (self.num_tokens - 1) // self.seq_len * self.seq_len
        flat = np.asarray(self.tokens)  # a memory map as a plain view of it: cheaper to index
        self._x = flat[:covered].reshape(-1, self.seq_len)  # (N, T), a view
        self._y = flat[1:covered + 1].reshape(-1, self.seq_len)  # (N, T), a view

    def __getstate__(self) -> dict[str, Any]:
        """For DataLoader workers that are started, not forked: a file is opened again there, not sent."""
        state = {key: value for key, value in self.__dict__.items() if key not in ("_x", "_y")}
        if isinstance(self.tokens, np.memmap) and self.tokens.filename is not None:
            state["tokens"] = (str(self.tokens.filename), self.tokens.dtype.str)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.tokens, tuple):
            path, dtype = self.tokens
            self.tokens = np.memmap(path, dtype=dtype, mode="r")
        self._view_windows()


class TokenLoader:
    """(x, y) batches of a TokenDataset. One `iter()` is the rest of one epoch, from the current position.

    The position is (epoch, samples handed out in it over all ranks) and moves when a batch is handed out, whatever was
    prefetched. At the end of an epoch it moves to the start of the next. Counting in samples of the common order means
    that a run may go on with another batch size or number of ranks and still sees every sample in the same order.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, *, seed: int = 0, shuffle: bool = True,
                 drop_last: bool = True, rank: int = 0, world_size: int = 1, num_prefetch: int = 2) -> None:
        """
        Args:
            batch_size: B, sequences per batch and rank.
            shuffle: False: windows in the order of the text, every epoch the same.
            drop_last: leave out the windows at the end of an epoch that do not fill a batch on every rank. With False
                they come as a smaller batch, and a rank for which none is left gets one batch less: for evaluation.
            rank, world_size: rank r takes places r, r + world_size, ... of the common order.
            num_prefetch: batches that a thread assembles ahead; 0: none, each when it is asked for.
        """
        if batch_size < 1 or num_prefetch < 0:
            raise ValueError(f"batch_size is {batch_size} and num_prefetch is {num_prefetch}; they must be at least 1 "
                             f"and 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} and world_size is {world_size}; rank must lie in [0, world_size)")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; it must lie in [0, 2**63)")
        self.dataset, self.batch_size, self.num_prefetch = dataset, batch_size, num_prefetch
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._fingerprint = dataset.fingerprint()
        self.epoch = 0
        self.index = 0
        if not len(self):
            raise ValueError(f"batch_size is {batch_size} on {world_size} rank(s), but the {dataset.name} has only "
                             f"{len(dataset)} windows of {dataset.seq_len} tokens; use a smaller batch_size or "
                             f"seq_len, or drop_last=False")

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self._starts(0))

    def __iter__(self) -> Generator[Batch, None, None]:
        return self.deal(0, 1)

    def deal(self, first: int, every: int) -> Generator[Any, None, None]:
        """`iter()` for one of `every` ranks that share this order: the batches at places first, first + every, ... from
        here on, and `dealing.PASSED` in place of the others, which are not made."""
        epoch, num_samples = self.epoch, len(self.dataset)
        starts = self._starts(self.index)
        taken = self.batch_size * self.world_size
        # Closed when the caller leaves the loop early, so that the thread ends with it.
        with closing(prefetch(self._assembler(epoch), starts[first::every], self.num_prefetch)) as batches:
            for place, start in enumerate(starts):
                batch = next(batches) if place % every == first else PASSED
                self.epoch, self.index = epoch, min(start + taken, num_samples)
                yield batch
        self.epoch, self.index = epoch + 1, 0

    def from_start(self, epoch: int = 0, first: int = 0, every: int = 1) -> Generator[Batch, None, None]:
        """A whole epoch from its first sample (of it, the batches at places first, first + every, ...), without reading
        or moving the position: for evaluation."""
        return prefetch(self._assembler(epoch), self._starts(0)[first::every], self.num_prefetch)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of that epoch; naming the current one keeps the place in it, as a resumed run needs."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; it must not be negative")
        if epoch != self.epoch:
            self.epoch, self.index = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in."""
        return {"epoch": self.epoch, "index": self.index, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to that position in O(1). ValueError if it belongs to another order; batch size and ranks may differ."""
        missing = [name for name in ("epoch", "index", *self._identity()) if name not in state]
        if missing:
            raise ValueError(f"the data position lacks {', '.join(missing)} (it has {', '.join(state) or 'nothing'}); "
                             f"pass what TokenLoader.state_dict() returned")
        for name, own in self._identity().items():
            if state[name] != own:
                raise ValueError(f"the data position was saved with {name}={state[name]}, but this loader has {name}="
                                 f"{own}: its order is another one. {_WAY_OUT[name]}, or start a new run")
        if state["epoch"] < 0 or not 0 <= state["index"] <= len(self.dataset):
            raise ValueError(f"the data position is sample {state['index']} of epoch {state['epoch']}; samples lie in "
                             f"[0, {len(self.dataset)}] and epochs start at 0")
        self.epoch, self.index = int(state["epoch"]), int(state["index"])

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "shuffle": int(self.shuffle), "seq_len": self.dataset.seq_len,
                "num_samples": len(self.dataset), "fingerprint": self._fingerprint}

    def _starts(self, index: int) -> range:
        """The places, in the common order, at which this rank's remaining batches begin for all ranks together."""
        taken = self.batch_size * self.world_size
        end = len(self.dataset) - taken + 1 if self.drop_last else len(self.dataset) - self.rank
        return range(index, max(end, index), taken)

    def _assembler(self, epoch: int) -> Callable[[int], Batch]:
        """start -> batch, with today's settings and no reference to this loader (a thread holds it)."""
        dataset, num_samples, seed, shuffle = self.dataset, len(self.dataset), self.seed, self.shuffle
        rank, world_size, taken = self.rank, self.world_size, self.batch_size * self.world_size

        def assemble(start: int) -> Batch:
            places = np.arange(start + rank, min(start + taken, num_samples), world_size, dtype=np.int64)
            return dataset.batch(permute(places, num_samples, seed=seed, epoch=epoch) if shuffle else places)

        return assemble


_WAY_OUT = {
    "seed": "Pass the old seed",
    "shuffle": "Pass the old shuffle",
    "seq_len": "Pass the old seq_len",
    "num_samples": "Pass the data that the run was started with",
    "fingerprint": "Pass the data and tokenizer that the run was started with",
}


def prepare_tokens(source: Source, tokenizer: Any, cache_dir: str | Path, *, seq_len: int, val_fraction: float = 0.05,
                   seed: int = 0, progress: Progress | None = None) -> tuple[TokenDataset, TokenDataset]:
    """(train, validation) data of a corpus, tokenized once into memory-mapped files below `cache_dir`.

    Args:
        source: what `read_documents` takes; standard input is stored in `cache_dir` first.
        tokenizer: "bytes"; "bpe:N", a BPE of N ids trained on the training part and kept in `cache_dir`; or what
            `as_tokenizer` takes. Its end-of-text token follows each document.
        seq_len: T, tokens per sequence.
        val_fraction: share of documents that go to validation, each by a hash of (seed, its name), so that adding one
            moves no other. A corpus of one plain text file is divided inside: its end is the validation text.
        progress: called with (bytes done, bytes in all) while tokenizing.

    Raises ValueError for everything that `read_documents` refuses, an empty split, an id beyond the vocabulary, and a
    split shorter than one sequence.
    """
    folder = Path(cache_dir)
    files = [spool_stdin(folder) if file.path is None else file for file in list_files(source)]
    if isinstance(tokenizer, str) and tokenizer.startswith("bpe:"):
        adapted: Tokenizer = _corpus_bpe(lambda: _training_texts(files, val_fraction, seed),
                                         tokenizer.removeprefix("bpe:"), folder)
    else:
        adapted = as_tokenizer(tokenizer)
    store = build_token_store(files, adapted, folder, val_fraction=val_fraction, seed=seed, progress=progress)
    splits = open_token_store(store)
    assert splits is not None
    train, val = (_open_split(store, splits[name], name, seq_len, adapted) for name in ("train", "val"))
    return train, val


def open_tokens(path: str | Path, seq_len: int, tokenizer: Any = None, *, dtype: str = "uint16",
                vocab_size: int | None = None, bytes_per_token: float | None = None) -> TokenDataset:
    """Headerless token ids of another program (such as nanoGPT's train.bin), memory-mapped; every id is checked."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"token file {str(file)!r} does not exist; name a headerless file of {dtype} ids")
    size, item = file.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % item:
        raise ValueError(f"token file {str(file)!r} has {size} bytes, no whole number of {dtype} ids of {item} bytes; "
                         f"pass the dtype it was written with")
    return TokenDataset(np.memmap(file, dtype=dtype, mode="r"), seq_len, tokenizer, vocab_size=vocab_size,
                        bytes_per_token=bytes_per_token, name=file.name)


def corpus_bytes(source: Source, *, val_fraction: float = 0.05, seed: int = 0) -> tuple[bytes, bytes]:
    """The (train, validation) text as UTF-8 bytes, divided as `prepare_tokens` does: for the statistics of a corpus
    that fits in memory. Documents follow each other without anything between them."""
    files = list_files(source)
    if any(file.path is None for file in files):
        raise ValueError(f"{STDIN!r} is standard input, which can be read only once; store the text in a file first")
    pieces: dict[Split, list[bytes]] = {"train": [], "val": []}
    for split, document in split_documents(files, val_fraction=val_fraction, seed=seed):
        pieces[split].append(document.text.encode())
    return b"".join(pieces["train"]), b"".join(pieces["val"])


def _open_split(folder: Path, split: StoredSplit, name: str, seq_len: int, tokenizer: Tokenizer) -> TokenDataset:
    tokens = np.memmap(folder / split.file, dtype=split.dtype, mode="r")
    return TokenDataset(tokens, seq_len, tokenizer, bytes_per_token=split.text_bytes / split.num_tokens,
                        name=f"{name} split", check_ids=False)  # they were checked when they were written


def _training_texts(files: Sequence[CorpusFile], val_fraction: float, seed: int) -> Iterator[str]:
    """A tokenizer that had seen the validation text would make the model's bits per byte look better than they are."""
    return (document.text for split, document in split_documents(files, val_fraction=val_fraction, seed=seed)
            if split == "train")


def _corpus_bpe(texts: Callable[[], Iterator[str]], size: str, folder: Path) -> Tokenizer:
    """The BPE of these texts, trained the first time; the file's name carries a hash of what it was trained on."""
    if not size.isdigit():
        raise ValueError(f"tokenizer is 'bpe:{size}'; write the number of ids after the colon, as in 'bpe:4096'")
    digest = hashlib.sha256()
    for text in texts():
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    path = folder / f"bpe-{int(size)}-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        trained = train_bpe(texts(), int(size))
        make_directory(folder)
        partial = folder / f".{path.name}.{os.getpid()}.partial"
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(trained.backend.to_str(pretty=True))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    return as_tokenizer(path)


def _as_array(tokens: Tensor | NDArray[Any] | Sequence[int], name: str) -> NDArray[Any]:
    array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else tokens
    array = array if isinstance(array, np.ndarray) else np.array(array, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} tokens have shape {array.shape} and dtype {array.dtype}; pass a row of integer ids")
    return array
