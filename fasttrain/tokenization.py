"""Text to token ids and back: bytes, a byte-level BPE trained on the corpus, and the tokenizers people already have.

Everything else in the package needs four things of a tokenizer: `encode`, `decode`, `vocab_size`, `eos_token_id`.
`as_tokenizer` gives any common one that form. Two ways to encode are kept apart: `encode` is for prompts and follows
the tokenizer's own rules (a beginning-of-text token, special tokens written out in the text); `encode_documents` is
for corpora, where text is only text: nothing is added, and a document that happens to spell "<|endoftext|>" does
not end there. `decode` gives text, so it leaves special tokens out. Left out: chat templates, normalisation.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

EOS = "<|endoftext|>"
# What files call the token that ends a text, where nothing beside them says so; the first one present is it.
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>", "[EOS]")
_PROBE = "The quick brown fox\n\tjumps over 13 lazy dogs.  def f(x): return x != 'é' # 漢字 🙂\r\n"


class Tokenizer(Protocol):
    """What the package asks of a tokenizer. `eos_token_id` also separates the documents of a corpus."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows that a model's embedding needs."""

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, ids: list[int], /) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, and 256 for the end of a text. Bytes that form no character decode to U+FFFD."""

    vocab_size = 257
    eos_token_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint8]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(token) for token in ids]
        for token in kept:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is no byte; ids lie in [0, 256], 256 being the end of a text")
        return bytes(token for token in kept if token != self.eos_token_id).decode(errors="replace")


class JsonTokenizer:
    """A `tokenizers.Tokenizer`, which is what a tokenizer.json holds. Its truncation and padding are not used."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_id: int | None = None) -> None:
        # Many files on the hub say "cut at 512 tokens", which would silently shorten every document.
        if backend.truncation is not None or backend.padding is not None:
            backend = tokenizers.Tokenizer.from_str(_untruncated(backend))  # a copy: the caller's stays as it is
        self.backend = backend
        self.vocab_size = _vocabulary_end(backend.get_vocab(with_added_tokens=True))
        self.eos_token_id = _known_eos(backend) if eos_token_id is None else eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text).ids)

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        before = self.backend.encode_special_tokens
        self.backend.encode_special_tokens = True  # "encode them as text", in that library's words
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = before
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=True))


class HuggingFaceTokenizer:
    """A `PreTrainedTokenizer` or `PreTrainedTokenizerFast` of the transformers library."""

    def __init__(self, backend: Any, eos_token_id: int | None = None) -> None:
        self.backend = backend
        self.vocab_size = max(len(backend), _vocabulary_end(backend.get_vocab()))
        self.eos_token_id = backend.eos_token_id if eos_token_id is None else eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text))

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        # verbose=False: a corpus may be longer than the model's context, it is cut into windows later.
        rows = self.backend(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [np.array(row, dtype=np.uint32) for row in rows["input_ids"]]

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(token) for token in ids]
        return str(self.backend.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TiktokenTokenizer:
    """A `tiktoken.Encoding`. Special tokens written out in a prompt are recognised."""

    def __init__(self, backend: Any, eos_token_id: int | None = None) -> None:
        self.backend = backend
        self.vocab_size: int = backend.n_vocab
        self.eos_token_id = backend._special_tokens.get(EOS) if eos_token_id is None else eos_token_id
        self._special = frozenset(backend._special_tokens.values())

    def encode(self, text: str) -> list[int]:
        return list(self.backend.encode(text, allowed_special="all"))

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(row, dtype=np.uint32) for row in self.backend.encode_ordinary_batch(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.backend.decode([int(token) for token in ids if int(token) not in self._special]))


class PlainTokenizer:
    """Any object with `encode` and `decode`; its vocabulary size is asked for only where it is needed."""

    def __init__(self, backend: Any, eos_token_id: int | None = None) -> None:
        self.backend = backend
        self.eos_token_id: int | None = getattr(backend, "eos_token_id", None) if eos_token_id is None else eos_token_id

    @property
    def vocab_size(self) -> int:
        for name in ("vocab_size", "n_vocab"):
            if hasattr(self.backend, name):
                return int(getattr(self.backend, name))
        if hasattr(self.backend, "__len__"):
            return len(self.backend)
        raise ValueError(f"tokenizer {type(self.backend).__name__} does not say how many ids it has; "
                         f"give it a `vocab_size` attribute (largest id + 1)")

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.backend.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.backend.decode([int(token) for token in ids]))


_ADAPTED = (ByteTokenizer, JsonTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, PlainTokenizer)


def as_tokenizer(tokenizer: Any, *, eos_token_id: int | None = None) -> Tokenizer:
    """Any common tokenizer in the form that this package uses; one that has the form already is returned as it is.

    tokenizer: "bytes"; the path of a tokenizer.json or of a folder with one; a `tokenizers.Tokenizer`; a Hugging
    Face tokenizer; a `tiktoken.Encoding`; or any object with `encode(str)` and `decode(ids)`.
    eos_token_id: overrides the end-of-text token that the tokenizer names. Raises ValueError for anything else.
    """
    wrapper: Any
    if isinstance(tokenizer, (str, Path)):
        if tokenizer == "bytes":
            return ByteTokenizer()
        return _load_json_tokenizer(Path(tokenizer), eos_token_id)
    if isinstance(tokenizer, _ADAPTED):
        if eos_token_id in (None, tokenizer.eos_token_id):
            return tokenizer
        wrapper, tokenizer = type(tokenizer), getattr(tokenizer, "backend", tokenizer)
        wrapper = PlainTokenizer if wrapper is ByteTokenizer else wrapper
    elif isinstance(tokenizer, tokenizers.Tokenizer):
        wrapper = JsonTokenizer
    elif _comes_from(tokenizer, "transformers") and hasattr(tokenizer, "get_vocab"):
        wrapper = HuggingFaceTokenizer
    elif _comes_from(tokenizer, "tiktoken") and hasattr(tokenizer, "encode_ordinary_batch"):
        wrapper = TiktokenTokenizer
    elif callable(getattr(tokenizer, "encode", None)) and callable(getattr(tokenizer, "decode", None)):
        wrapper = PlainTokenizer
    else:
        raise ValueError(f"a {type(tokenizer).__name__} is no tokenizer; pass 'bytes', the path of a tokenizer.json, a "
                         f"Hugging Face, tokenizers or tiktoken object, or anything with encode(str) and decode(ids)")
    adapted: Tokenizer = wrapper(tokenizer, eos_token_id)
    return adapted


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[Any]]:
    """The ids of each text as a 1-D integer array; no special token is added or, where the tokenizer lets us say so,
    read out of the text."""
    if hasattr(tokenizer, "encode_documents"):
        rows: list[NDArray[Any]] = tokenizer.encode_documents(texts)
        return rows
    return [np.array(tokenizer.encode(text), dtype=np.int64) for text in texts]


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE (GPT-2's word splitting, no normalisation, so decoding is exact), the same for the same texts.

    vocab_size counts the 256 bytes and the end-of-text token (id 0); a small corpus may give fewer merges than asked.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level BPE has at least 257 ids: 256 bytes, 1 end of text")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=[EOS],
                                             initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return JsonTokenizer(backend)


def tokenizer_to_dict(tokenizer: Any) -> dict[str, Any] | None:
    """The whole tokenizer as JSON-ready data for a checkpoint, or None for one whose inside is not known here."""
    adapted = as_tokenizer(tokenizer)
    eos = adapted.eos_token_id
    if type(adapted) is ByteTokenizer:  # a subclass may encode otherwise
        return {"kind": "bytes"}
    if isinstance(adapted, JsonTokenizer):
        return {"kind": "json", "eos_token_id": eos, "json": _untruncated(adapted.backend)}
    if isinstance(adapted, HuggingFaceTokenizer) and hasattr(adapted.backend, "backend_tokenizer"):
        return {"kind": "json", "eos_token_id": eos, "json": _untruncated(adapted.backend.backend_tokenizer)}
    if isinstance(adapted, TiktokenTokenizer):
        backend = adapted.backend
        ranks = [[base64.b64encode(token).decode(), rank] for token, rank in backend._mergeable_ranks.items()]
        return {"kind": "tiktoken", "eos_token_id": eos, "name": backend.name, "pattern": backend._pat_str,
                "special": dict(backend._special_tokens), "ranks": ranks}
    return None


def tokenizer_from_dict(data: Mapping[str, Any]) -> Tokenizer:
    """Reads back what `tokenizer_to_dict` gave; a Hugging Face tokenizer comes back as the tokenizer.json inside it."""
    kind = data.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "json":
        return JsonTokenizer(tokenizers.Tokenizer.from_str(data["json"]), data["eos_token_id"])
    if kind == "tiktoken":
        import tiktoken

        ranks = {base64.b64decode(token): rank for token, rank in data["ranks"]}
        return TiktokenTokenizer(tiktoken.Encoding(data["name"], pat_str=data["pattern"], mergeable_ranks=ranks,
                                                   special_tokens=data["special"]), data["eos_token_id"])
    raise ValueError(f"tokenizer data has kind {kind!r}; known are 'bytes', 'json' and 'tiktoken' (written by a newer "
                     f"version?): pass the tokenizer itself")


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash that differs between tokenizers that encode differently; it decides whether stored tokens are reused.

    Where the inside is not known, it covers the class, every single token's text and the ids of a probe text.
    """
    data = tokenizer_to_dict(tokenizer)
    if data is None:
        data = {"kind": type(getattr(tokenizer, "backend", tokenizer)).__qualname__, "vocab_size": tokenizer.vocab_size,
                "texts": [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)
                          if token != tokenizer.eos_token_id],
                "eos_token_id": tokenizer.eos_token_id, "probe": tokenizer.encode(_PROBE)}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _load_json_tokenizer(path: Path, eos_token_id: int | None) -> JsonTokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer {str(file)!r} does not exist; give 'bytes', or the path of a tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer {str(file)!r} is no tokenizer.json: {error}") from None
    beside = file.with_name("tokenizer_config.json")
    if eos_token_id is None and beside.is_file():
        name = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        eos_token_id = backend.token_to_id(name) if isinstance(name, str) else None
    return JsonTokenizer(backend, eos_token_id)


def _untruncated(backend: tokenizers.Tokenizer) -> str:
    data = json.loads(backend.to_str())
    return json.dumps({**data, "truncation": None, "padding": None}, ensure_ascii=False)


def _known_eos(backend: tokenizers.Tokenizer) -> int | None:
    found = (backend.token_to_id(name) for name in _EOS_NAMES)
    return next((token for token in found if token is not None), None)


def _vocabulary_end(vocabulary: Mapping[str, int]) -> int:
    return max(vocabulary.values(), default=-1) + 1


def _comes_from(obj: object, package: str) -> bool:
    """Whether the object's class, or one it inherits from, is that package's; the package need not be installed."""
    return any(base.__module__.split(".")[0] == package for base in type(obj).__mro__)
