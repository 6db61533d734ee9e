"""A decoder in C++: the weights of a Llama-shaped model packed once, and the loop of passes and draws without Python.

Why it exists: one token of a small model costs less arithmetic than PyTorch needs to start its kernels, and more memory
traffic than it must have. Here a model's matrices are copied into panels that a core reads as one stream, in the
model's own dtype or a smaller one, and a pass is a few barriers between threads that wait for nothing else.

Serves models.gpt.GPT and Hugging Face's Llama, Mistral and Qwen2 on the CPU; `native_problem` says why not, where not.
A token's numbers depend neither on its batchmates nor on the number of threads: a batch equals its rows, bit for bit.
Left out: sliding windows, adapters, quantised modules (they run on the model's own forward).

Shapes: B rows, V vocabulary, D hidden size, H query heads, K key/value heads, E head size, I width of the MLP.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backend import CPP_PROBLEM, extension
from .config import WeightDtype
from .llama_weights import LlamaWeights, NotLlamaShaped, llama_weights

_MOST_QUERIES_PER_HEAD, _LARGEST_HEAD = 24, 512  # the kernels' fixed buffers
_ALIGN = 64  # the packed MLP's halves start at a multiple


def native_problem(model: nn.Module, weight_dtype: WeightDtype = "model") -> str:
    """Why the native engine cannot serve this model, or an empty string."""
    if CPP_PROBLEM:
        return CPP_PROBLEM
    try:
        decoder = llama_weights(model)
    except NotLlamaShaped as reason:
        return str(reason)
    sizes = decoder.sizes
    group = sizes["num_heads"] // sizes["num_kv_heads"]
    if sizes["head_size"] > _LARGEST_HEAD or sizes["head_size"] % 2 or group > _MOST_QUERIES_PER_HEAD:
        return (
            f"heads of size {sizes['head_size']} and {group} queries a key; it takes even sizes up to {_LARGEST_HEAD} "
            f"and up to {_MOST_QUERIES_PER_HEAD} queries"
        )
    needed = _bytes_needed(decoder, _format(decoder, weight_dtype))
    available = _available_memory()
    if model not in _PREPARED and needed > 0.8 * available:
        return (
            f"its packed weights need {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; "
            "weight_dtype='bfloat16', 'int8' or 'int4' needs less"
        )
    return ""


class NativeDecoder:
    """The Decoder protocol (decoding.py) in C++. Logits are float32 whatever the weights are."""

    def __init__(self, model: nn.Module, weight_dtype: WeightDtype = "model") -> None:
        problem = native_problem(model, weight_dtype)
        if problem:
            raise ValueError(
                f"engine='native' cannot serve {type(model).__name__}: {problem}. "
                "Use engine='auto', weight_dtype='model'"
            )
        self._decoder = llama_weights(model)
        self._weights = _prepared(model, self._decoder, weight_dtype)
        self._session: Any = None

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        cos, sin = self._decoder.angles(capacity)
        module: Any = extension()
        self._session = module.DecodeSession(self._weights, len(prompts), capacity, cos.data_ptr(), sin.data_ptr())
        return self.append([list(prompt) for prompt in prompts])

    def step(self, tokens: Tensor) -> Tensor:
        return self.append(tokens[:, None].tolist())

    def extend(self, tokens: Tensor) -> Tensor:
        return self.append(tokens.tolist(), every=True).view(*tokens.shape, -1)

    def append(self, tokens: Sequence[Sequence[int]], every: bool = False) -> Tensor:
        """Any number of tokens to each row: logits after each row's last (B, V), or after every one of them, row by
        row (sum of the numbers, V)."""
        self._session.extend(tokens, every)
        return self.logits(sum(map(len, tokens)) if every else len(tokens))

    def logits(self, count: int) -> Tensor:
        """The first `count` rows (count, V) of those that the last pass computed."""
        logits = torch.empty(count, self._decoder.sizes["vocab_size"])
        self._session.copy_logits(logits.data_ptr(), *logits.shape)
        return logits

    def select_rows(self, rows: Tensor) -> None:
        self._session.select(rows.tolist())

    keep_rows = select_rows

    def rewind(self, count: int) -> None:
        self._session.rewind(count)

    def run(
        self, rounds: int, seeds: Sequence[int], vocabulary: int, ends: Sequence[int], callback: Any, **sampling: Any
    ) -> list[list[int]]:
        """Draws and reads up to `rounds` tokens a row after the present logits; see DecodeSession.run."""
        drawn: list[list[int]] = self._session.run(
            rounds=rounds, seeds=seeds, vocabulary=vocabulary, ends=ends, callback=callback, **sampling
        )
        return drawn


@dataclass
class _Prepared:
    """Packed weights and what they were made from."""

    key: tuple[Any, ...]
    weights: Any
    sums: list[list[int]]  # of each part of the memory, for each tensor
    checked: int = 0  # calls that looked at a part


_PREPARED: weakref.WeakKeyDictionary[nn.Module, _Prepared] = weakref.WeakKeyDictionary()
_PARTS = 8  # csrc/checksums.cpp


def release(model: nn.Module) -> None:
    """Gives the memory of a model's packed weights back; the next native generation packs them again."""
    _PREPARED.pop(model, None)


def _prepared(model: nn.Module, decoder: LlamaWeights, weight_dtype: WeightDtype) -> Any:
    """The model's packed weights, packed again if it changed: training goes on between two texts.

    What PyTorch counts (a tensor's version: every operation in place, optimizers, load_state_dict) and tensors put in
    another's place are noticed at once. What it does not count (`.data`, NumPy, kernels of one's own) is noticed by
    sums of the bytes, an eighth of the cache lines a call: at once where 1 KiB in a row has changed, else within 8
    calls. Inference tensors have no version: all their bytes are summed. `release` forces it.
    """
    module: Any = extension()
    wanted = _format(decoder, weight_dtype)
    threads = torch.get_num_threads()
    tensors = decoder.tensors()
    memory = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
    counted = not any(tensor.is_inference() for tensor in tensors)
    versions = tuple(tensor._version for tensor in tensors) if counted else None
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
    key = (wanted, threads, shapes, tuple(memory), versions)
    known = _PREPARED.get(model)
    if known is not None and known.key == key:
        parts = [known.checked % _PARTS] if counted else range(_PARTS)
        known.checked += 1
        if all(known.sums[part] == module.checksums(memory, threads, part) for part in parts):
            return known.weights
    del known
    _PREPARED.pop(model, None)  # first, so that the two never stand in memory together
    sums = [module.checksums(memory, threads, part) for part in range(_PARTS)]
    weights = module.DecoderWeights(**decoder.sizes, norm_eps=decoder.norm_eps, format=wanted, threads=threads)
    _pack(weights, decoder)
    _PREPARED[model] = _Prepared(key, weights, sums)
    return weights


def _pack(weights: Any, decoder: LlamaWeights) -> None:
    hidden, width = decoder.sizes["hidden_size"], decoder.sizes["intermediate_size"]
    padded = -(-width // _ALIGN) * _ALIGN

    def matrix(name: str, layer: int, outputs: int, *sources: tuple[Tensor, int]) -> None:
        rows = [
            (t.data_ptr(), str(t.dtype).removeprefix("torch."), t.shape[0], t.shape[1], t.stride(0), first)
            for t, first in sources
        ]
        weights.set_matrix(name, layer, outputs, sources[0][0].shape[1], rows)

    def vector(name: str, layer: int, *tensors: Tensor) -> None:
        weights.set_vector(name, layer, torch.cat([t.detach().float() for t in tensors]).tolist())

    vocab = decoder.sizes["vocab_size"]
    matrix("embedding", -1, vocab, (decoder.embedding, 0))
    if decoder.head is not None:
        matrix("head", -1, vocab, (decoder.head, 0))
    vector("final_norm", -1, decoder.final_norm)
    for i, layer in enumerate(decoder.layers):
        firsts = [sum(t.shape[0] for t in layer.qkv[:n]) for n in range(len(layer.qkv))]
        matrix("qkv", i, sum(t.shape[0] for t in layer.qkv), *zip(layer.qkv, firsts))
        matrix("out", i, hidden, (layer.out, 0))
        matrix("gate_up", i, 2 * padded, (layer.gate, 0), (layer.up, padded))
        matrix("down", i, hidden, (layer.down, 0))
        vector("attention_norm", i, layer.attention_norm)
        vector("mlp_norm", i, layer.mlp_norm)
        if layer.qkv_bias:
            vector("qkv_bias", i, *layer.qkv_bias)


def _format(decoder: LlamaWeights, weight_dtype: WeightDtype) -> str:
    """What the packed weights are: for "model" the narrowest that holds every weight exactly."""
    if weight_dtype != "model":
        return weight_dtype
    return "bfloat16" if all(tensor.dtype == torch.bfloat16 for tensor in decoder.matrices()) else "float32"


def _bytes_needed(decoder: LlamaWeights, weights: str) -> float:
    each = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.04, "int4": 0.63}[weights]
    outer = sum(tensor.numel() for tensor in (decoder.embedding, decoder.head) if tensor is not None)
    inner = sum(tensor.numel() for tensor in decoder.matrices()) - outer
    return each * inner + max(each, 1.04) * outer


def _available_memory() -> float:
    """Bytes that this machine can give without swapping; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))
