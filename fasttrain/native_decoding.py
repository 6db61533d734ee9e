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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .backend import CPP_PROBLEM, extension

WeightDtype = Literal["model", "float32", "bfloat16", "int8"]

_LLAMA_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length of the text
_MOST_QUERIES_PER_HEAD, _LARGEST_HEAD = 24, 512  # the kernels' fixed buffers
_ALIGN = 64  # the packed MLP's halves start at a multiple


class _Unservable(Exception):
    """The model cannot run natively; the message says why."""


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor  # (D,)
    qkv: tuple[Tensor, ...]  # stacked: (H E + 2 K E, D)
    qkv_bias: tuple[Tensor, ...]  # stacked: (H E + 2 K E,), or none
    out: Tensor  # (D, H E)
    mlp_norm: Tensor  # (D,)
    gate: Tensor  # (I, D)
    up: Tensor  # (I, D)
    down: Tensor  # (D, I)


@dataclass(frozen=True)
class _Decoder:
    """What the C++ side needs to know of a model; the tensors are the model's own."""

    sizes: dict[str, int]
    norm_eps: float
    layers: list[_Layer]
    embedding: Tensor  # (V, D)
    head: Tensor | None  # (V, D); None: the embedding
    final_norm: Tensor  # (D,)
    angles: Callable[[int], tuple[Tensor, Tensor]]  # length -> cos, sin (length, E / 2) float32

    def matrices(self) -> list[Tensor]:
        """Every matrix, each once."""
        tensors = [self.embedding] + ([] if self.head is None else [self.head])
        for layer in self.layers:
            tensors += [*layer.qkv, layer.out, layer.gate, layer.up, layer.down]
        return tensors

    def tensors(self) -> list[Tensor]:
        """Everything that was copied: what must be unchanged for the copy to be good."""
        vectors = [self.final_norm]
        for layer in self.layers:
            vectors += [layer.attention_norm, layer.mlp_norm, *layer.qkv_bias]
        return self.matrices() + vectors


def native_problem(model: nn.Module, weight_dtype: WeightDtype = "model") -> str:
    """Why the native engine cannot serve this model, or an empty string."""
    try:
        decoder = _describe(model)
    except _Unservable as reason:
        return str(reason)
    needed = _bytes_needed(decoder, _format(decoder, weight_dtype))
    available = _available_memory()
    if model not in _PREPARED and needed > 0.8 * available:
        return (
            f"its packed weights need {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free; "
            "weight_dtype='bfloat16' or 'int8' needs less"
        )
    return ""


class NativeDecoder:
    """The Decoder protocol (decoding.py) in C++. Logits are float32 whatever the weights are."""

    def __init__(self, model: nn.Module, weight_dtype: WeightDtype = "model") -> None:
        problem = native_problem(model, weight_dtype)
        if problem:
            raise ValueError(f"engine='native' cannot serve {type(model).__name__}: {problem}. Use engine='auto'")
        self._decoder = _describe(model)
        self._weights = _prepared(model, self._decoder, weight_dtype)
        self._session: Any = None

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        cos, sin = self._decoder.angles(capacity)
        module: Any = extension()
        self._session = module.DecodeSession(self._weights, len(prompts), capacity, cos.data_ptr(), sin.data_ptr())
        return self.extend([list(prompt) for prompt in prompts])

    def step(self, tokens: Tensor) -> Tensor:
        return self.extend([[token] for token in tokens.tolist()])

    def extend(self, tokens: Sequence[Sequence[int]], every: bool = False) -> Tensor:
        """Appends tokens to each row: logits after each row's last (B, V), or after every one of them in order."""
        self._session.extend(tokens, every)
        count = sum(map(len, tokens)) if every else len(tokens)
        logits = torch.empty(count, self._decoder.sizes["vocab_size"])
        self._session.copy_logits(logits.data_ptr(), *logits.shape)
        return logits

    def keep_rows(self, rows: Tensor) -> None:
        self._session.keep(rows.tolist())

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forgets each row's positions from its length on."""
        self._session.rewind(list(lengths))

    def run(
        self, rounds: int, seeds: Sequence[int], vocabulary: int, ends: Sequence[int], callback: Any, **sampling: Any
    ) -> list[list[int]]:
        """Draws and reads up to `rounds` tokens a row after the present logits; see DecodeSession.run."""
        drawn: list[list[int]] = self._session.run(
            rounds=rounds, seeds=seeds, vocabulary=vocabulary, ends=ends, callback=callback, **sampling
        )
        return drawn


_PREPARED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()
"""Model -> (what its packed weights were made from, the packed weights)."""


def release(model: nn.Module) -> None:
    """Gives the memory of a model's packed weights back; the next native generation packs them again."""
    _PREPARED.pop(model, None)


def _prepared(model: nn.Module, decoder: _Decoder, weight_dtype: WeightDtype) -> Any:
    """The model's packed weights, packed again if any byte of it changed: training goes on between two texts.

    All bytes are summed, because not every change is counted in a tensor's version (`.data`, kernels of one's own); it
    costs as much as one token.
    """
    module: Any = extension()
    wanted = _format(decoder, weight_dtype)
    key: list[Any] = [wanted, torch.get_num_threads()]
    for tensor in decoder.tensors():
        key += [tuple(tensor.shape), tensor.dtype, module.checksum(tensor.data_ptr(), tensor.numel() * tensor.element_size())]
    if model in _PREPARED and _PREPARED[model][0] == key:
        return _PREPARED[model][1]
    _PREPARED.pop(model, None)  # first, so that the two never stand in memory together
    weights = module.DecoderWeights(
        **decoder.sizes, norm_eps=decoder.norm_eps, format=wanted, threads=torch.get_num_threads()
    )
    _pack(weights, decoder)
    _PREPARED[model] = (key, weights)
    return weights


def _pack(weights: Any, decoder: _Decoder) -> None:
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


def _describe(model: nn.Module) -> _Decoder:
    if CPP_PROBLEM:
        raise _Unservable(CPP_PROBLEM)
    kind = type(model)
    if kind.__name__ == "GPT" and kind.__module__ == "fasttrain.models.gpt":
        read = _read_gpt
    elif kind.__name__ in _LLAMA_FAMILY and kind.__module__.startswith("transformers."):
        read = _read_llama
    else:
        raise _Unservable(f"it serves fasttrain.models.gpt.GPT and transformers' {', '.join(_LLAMA_FAMILY)}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise _Unservable(f"module {name or 'model'!r} has forward hooks, which it would not call")
    decoder = read(model)
    for tensor in decoder.tensors():
        if tensor.device.type != "cpu":
            raise _Unservable(f"the weights are on {tensor.device}; it runs on the CPU")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not tensor.is_contiguous():
            raise _Unservable(f"a weight is {tensor.dtype} with strides {tensor.stride()}; it reads contiguous floats")
    sizes = decoder.sizes
    group = sizes["num_heads"] // sizes["num_kv_heads"]
    if sizes["head_size"] > _LARGEST_HEAD or sizes["head_size"] % 2 or group > _MOST_QUERIES_PER_HEAD:
        raise _Unservable(
            f"heads of size {sizes['head_size']} and {group} queries a key; it takes even sizes up to "
            f"{_LARGEST_HEAD} and up to {_MOST_QUERIES_PER_HEAD} queries"
        )
    return decoder


def _plain(module: Any, kind: type[nn.Module], bias: bool = False) -> Tensor:
    """The weight of exactly such a module; adapters and quantised modules are other types."""
    if type(module) is not kind or (not bias and getattr(module, "bias", None) is not None):
        raise _Unservable(f"it reads a plain {kind.__name__} where the model has {module!r}")
    weight: Tensor = module.weight
    return weight


def _read_gpt(model: Any) -> _Decoder:
    config = model.config
    layers = []
    for block in model.blocks:
        gate, up = _plain(block.mlp.gate_up, nn.Linear).chunk(2)
        layers.append(
            _Layer(
                attention_norm=_plain(block.attention_norm, nn.RMSNorm),
                qkv=(_plain(block.attention.qkv, nn.Linear),),
                qkv_bias=(),
                out=_plain(block.attention.out, nn.Linear),
                mlp_norm=_plain(block.mlp_norm, nn.RMSNorm),
                gate=gate,
                up=up,
                down=_plain(block.mlp.down, nn.Linear),
            )
        )

    def angles(length: int) -> tuple[Tensor, Tensor]:  # as models.gpt.rotary_angles
        exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
        turns = torch.arange(length)[:, None].float() * torch.pow(config.rope_theta, -exponents)
        return turns.cos(), turns.sin()

    return _Decoder(
        sizes={
            "vocab_size": config.vocab_size,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_size": config.head_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
        },
        norm_eps=config.norm_eps,
        layers=layers,
        embedding=_plain(model.token_embedding, nn.Embedding),
        head=None if model.head is None else _plain(model.head, nn.Linear),
        final_norm=_plain(model.final_norm, nn.RMSNorm),
        angles=angles,
    )


def _read_llama(model: Any) -> _Decoder:
    config, inner = model.config, model.model
    if config.hidden_act not in ("silu", "swish"):
        raise _Unservable(f"its MLP has hidden_act={config.hidden_act!r}; it computes silu")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        raise _Unservable(f"it attends through a sliding window of {config.sliding_window}")
    rope = getattr(inner.rotary_emb, "rope_type", "default")
    if rope not in _STATIC_ROPE:
        raise _Unservable(f"its rotary angles are {rope!r}; it takes {', '.join(_STATIC_ROPE)}")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norm = type(inner.norm)
    layers = []
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if abs(attention.scaling - head_size**-0.5) > 1e-9:
            raise _Unservable(f"its scores are scaled by {attention.scaling}; it computes 1 / sqrt(head size)")
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        layers.append(
            _Layer(
                attention_norm=_plain(layer.input_layernorm, norm),
                qkv=tuple(_plain(projection, nn.Linear, bias=True) for projection in projections),
                qkv_bias=tuple(projection.bias for projection in projections if projection.bias is not None),
                out=_plain(attention.o_proj, nn.Linear),
                mlp_norm=_plain(layer.post_attention_layernorm, norm),
                gate=_plain(mlp.gate_proj, nn.Linear),
                up=_plain(mlp.up_proj, nn.Linear),
                down=_plain(mlp.down_proj, nn.Linear),
            )
        )
    embedding = _plain(inner.embed_tokens, nn.Embedding)
    head = _plain(model.lm_head, nn.Linear)

    def angles(length: int) -> tuple[Tensor, Tensor]:
        cos, sin = inner.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])  # (1, length, E)
        if cos.shape[-1] != head_size:
            raise ValueError(f"the model turns {cos.shape[-1]} of {head_size} values of a head; use engine='eager'")
        return cos[0, :, : head_size // 2].contiguous(), sin[0, :, : head_size // 2].contiguous()

    return _Decoder(
        sizes={
            "vocab_size": head.shape[0],
            "num_layers": len(layers),
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_size": head_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
        },
        norm_eps=inner.norm.variance_epsilon,
        layers=layers,
        embedding=embedding,
        head=None if head.data_ptr() == embedding.data_ptr() else head,
        final_norm=_plain(inner.norm, norm),
        angles=angles,
    )


def _format(decoder: _Decoder, weight_dtype: WeightDtype) -> str:
    """What the packed weights are: for "model" the narrowest that holds every weight exactly."""
    if weight_dtype != "model":
        return weight_dtype
    return "bfloat16" if all(tensor.dtype == torch.bfloat16 for tensor in decoder.matrices()) else "float32"


def _bytes_needed(decoder: _Decoder, weights: str) -> float:
    each = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.04}[weights]
    return each * sum(tensor.numel() for tensor in decoder.matrices())


def _available_memory() -> float:
    """Bytes that this machine can give without swapping; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))
