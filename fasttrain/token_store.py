"""Tokens on disk: a corpus is tokenized once into flat files of ids that every later run maps into memory.

A store is a folder `tokens-<key>` with `train.bin`, `val.bin` (little-endian uint16, or uint32 for more than 65536
ids, no header) and `index.json`. The key hashes everything that decides the ids: the file listing, the tokenizer, the
split. So a changed corpus gives another folder, and an old one is never patched. It is built aside under a lock,
synced to disk and renamed: a folder that has its name is complete. Old stores are left for the user to delete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .corpus import CorpusFile, Document, Split, split_documents
from .storage import make_directory, sync_directory
from .tokenization import Tokenizer, encode_documents, tokenizer_fingerprint

FORMAT = 1
SPLITS: tuple[Split, ...] = ("train", "val")
_BATCH_BYTES = 1 << 20  # text handed to the tokenizer at once; its own records take about 50 times that
_CHECK_TOKENS = 1 << 22  # ids looked at at once when a file is checked

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StoredSplit:
    """One file of ids and what is known about it."""

    file: str
    dtype: str
    num_tokens: int
    num_documents: int
    text_bytes: int
    """UTF-8 bytes of the text that the tokens stand for; the separators between documents stand for none."""
    sha256: str


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 65536 else "<u4"


def open_token_store(folder: Path) -> dict[Split, StoredSplit] | None:
    """The splits of a complete store, or None if there is none of that name. ValueError if a file was damaged."""
    if not (folder / "index.json").is_file():
        return None
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    splits: dict[Split, StoredSplit] = {name: StoredSplit(**index["splits"][name]) for name in SPLITS}
    for split in splits.values():
        path, wanted = folder / split.file, split.num_tokens * np.dtype(split.dtype).itemsize
        size = path.stat().st_size if path.exists() else None
        if size != wanted:
            raise ValueError(f"stored tokens {str(path)!r} have {size} bytes instead of {wanted}; delete the folder "
                             f"{str(folder)!r} and run again")
    return splits


def build_token_store(files: Sequence[CorpusFile], tokenizer: Tokenizer, cache_dir: Path, *, val_fraction: float,
                      seed: int, progress: Progress | None = None) -> Path:
    """The store for this corpus, tokenizer and split below `cache_dir`, built if it is not there. Returns its folder.

    progress(done, total) counts bytes of the corpus. Processes that ask at once wait for the first to finish.
    Raises ValueError where a split would be empty, an id does not fit the vocabulary, or the corpus changes meanwhile.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer names no end-of-text token, and documents need one between them; pass "
                         "fasttrain.tokenization.as_tokenizer(tokenizer, eos_token_id=...)")
    described = {"format": FORMAT, "tokenizer": tokenizer_fingerprint(tokenizer), "eos_token_id": eos,
                 "vocab_size": tokenizer.vocab_size, "val_fraction": val_fraction, "seed": seed,
                 "listing_sha256": _digest([file.stamp() for file in files]), "num_files": len(files)}
    folder = cache_dir / f"tokens-{_digest(described)[:16]}"
    make_directory(cache_dir)
    with _locked(cache_dir / f".{folder.name}.lock"):
        if open_token_store(folder) is not None:
            return folder
        partial = cache_dir / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # a killed run's; nobody else is writing, we hold the lock
        partial.mkdir()
        try:
            splits = _write_splits(files, tokenizer, partial, val_fraction=val_fraction, seed=seed, progress=progress)
            if _digest([file.stamp() for file in files]) != described["listing_sha256"]:
                raise ValueError("the corpus changed while it was read; run again when its files are complete")
            index = {**described, "splits": {name: asdict(split) for name, split in splits.items()}}
            with open(partial / "index.json", "w", encoding="utf-8") as stream:
                json.dump(index, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            sync_directory(partial)
            os.rename(partial, folder)
            sync_directory(cache_dir)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(partial)  # a full disk says what it was writing
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


def check_token_ids(tokens: NDArray[Any], vocab_size: int, where: str) -> None:
    """Raises ValueError naming the first id outside [0, vocab_size); reads in blocks, so memory stays small."""
    for start in range(0, len(tokens), _CHECK_TOKENS):
        block = tokens[start:start + _CHECK_TOKENS]
        if block.min() < 0 or block.max() >= vocab_size:
            at = int(np.flatnonzero((block < 0) | (block >= vocab_size))[0])
            raise ValueError(f"{where}: token {start + at} has id {int(block[at])}, beyond the vocabulary of "
                             f"{vocab_size} ids; use the tokenizer that made these tokens (or, for a file of another "
                             f"program, its dtype)")


class _SplitWriter:
    """Appends documents to one file of ids, with the end-of-text id between (and after) them."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.stream = open(path, "wb")  # noqa: SIM115 - open for as long as this object lives, closed by its owner
        self.vocab_size, self.eos = tokenizer.vocab_size, tokenizer.eos_token_id
        self.dtype = token_dtype(self.vocab_size)
        self.sha256 = hashlib.sha256()
        self.num_tokens = self.num_documents = self.text_bytes = 0

    def add(self, document: Document, ids: NDArray[Any]) -> None:
        if document.part == 0:
            self.end_document()
            self.num_documents += 1
        self.text_bytes += len(document.text.encode())
        if ids.size:
            check_token_ids(ids, self.vocab_size, f"tokenizing {document.name!r}")
            self._write(ids)

    def end_document(self) -> None:
        if self.num_documents:
            self._write(np.array([self.eos]))

    def finish(self) -> StoredSplit:
        self.end_document()
        self.stream.flush()
        os.fsync(self.stream.fileno())
        return StoredSplit(Path(self.stream.name).name, self.dtype, self.num_tokens, self.num_documents,
                           self.text_bytes, self.sha256.hexdigest())

    def _write(self, ids: NDArray[Any]) -> None:
        data = ids.astype(self.dtype).tobytes()
        self.sha256.update(data)
        self.stream.write(data)
        self.num_tokens += len(ids)


def _write_splits(files: Sequence[CorpusFile], tokenizer: Tokenizer, folder: Path, *, val_fraction: float, seed: int,
                  progress: Progress | None) -> dict[Split, StoredSplit]:
    total = sum(file.stamp()[2] for file in files)
    done = 0
    with contextlib.ExitStack() as stack:
        writers = {name: _SplitWriter(folder / f"{name}.bin", tokenizer) for name in SPLITS}
        for writer in writers.values():
            stack.enter_context(writer.stream)
        for batch in _batched(split_documents(files, val_fraction=val_fraction, seed=seed)):
            rows = encode_documents(tokenizer, [document.text for _, document in batch])
            for (name, document), ids in zip(batch, rows, strict=True):
                writers[name].add(document, ids)
            done += sum(len(document.text.encode()) for _, document in batch)
            if progress is not None:
                progress(min(done, total), total)
        for name, writer in writers.items():
            if not writer.num_documents:
                count = sum(writer.num_documents for writer in writers.values())
                raise ValueError(f"the {name} split is empty: none of {count} document(s) fell into it with "
                                 f"val_fraction={val_fraction} and seed={seed}; use more or smaller documents, another "
                                 f"val_fraction, or another seed (a single text file is divided inside)")
        splits = {name: writer.finish() for name, writer in writers.items()}
    if progress is not None:
        progress(total, total)
    return splits


def _batched(documents: Iterator[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    batch: list[tuple[Split, Document]] = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[1].text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock, which the system lets go of when the process dies."""
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
