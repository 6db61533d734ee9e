"""What a decoder of the Llama shape is made of, read off a model: its matrices, norms, sizes and rotary angles.

Knows models.gpt.GPT and Hugging Face's Llama, Mistral and Qwen2, by their exact types: a subclass, a hook or an adapter
may compute something else, and then the answer is a reason and no description. Nothing is copied here.

Shapes: V vocabulary, D hidden size, H query heads, K key/value heads, E head size, I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LLAMA_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length of the text


class NotLlamaShaped(Exception):
    """The model is of another shape, or may be; the message says what was found."""


@dataclass(frozen=True)
class LlamaLayer:
    """The weights of one decoder block."""

    attention_norm: Tensor  # (D,)
    qkv: tuple[Tensor, ...]  # stacked: (H E + 2 K E, D)
    qkv_bias: tuple[Tensor, ...]  # stacked: (H E + 2 K E,), or none
    out: Tensor  # (D, H E)
    mlp_norm: Tensor  # (D,)
    gate: Tensor  # (I, D)
    up: Tensor  # (I, D)
    down: Tensor  # (D, I)


@dataclass(frozen=True)
class LlamaWeights:
    """A whole decoder; the tensors are the model's own."""

    sizes: dict[str, int]
    norm_eps: float
    layers: list[LlamaLayer]
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


def llama_weights(model: nn.Module) -> LlamaWeights:
    """Raises NotLlamaShaped where the model is not certain to be one."""
    kind = type(model)
    if kind.__name__ == "GPT" and kind.__module__ == "fasttrain.models.gpt":
        read = _read_gpt
    elif kind.__name__ in LLAMA_FAMILY and kind.__module__.startswith("transformers."):
        read = _read_llama
    else:
        raise NotLlamaShaped(f"it reads fasttrain.models.gpt.GPT and transformers' {', '.join(LLAMA_FAMILY)}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotLlamaShaped(f"module {name or 'model'!r} has forward hooks, which it would not call")
    weights = read(model)
    for tensor in weights.tensors():
        if tensor.device.type != "cpu":
            raise NotLlamaShaped(f"the weights are on {tensor.device}; it runs on the CPU")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not tensor.is_contiguous():
            raise NotLlamaShaped(f"a weight is {tensor.dtype}, strides {tensor.stride()}; it reads contiguous floats")
    return weights


def _plain(module: Any, kind: type[nn.Module], bias: bool = False) -> Tensor:
    """The weight of exactly such a module; adapters and quantised modules are other types."""
    if type(module) is not kind or (not bias and getattr(module, "bias", None) is not None):
        raise NotLlamaShaped(f"it reads a plain {kind.__name__} where the model has {module!r}")
    weight: Any = module.weight
    return weight  # type: ignore[no-any-return]


def _read_gpt(model: Any) -> LlamaWeights:
    config = model.config
    layers = []
    for block in model.blocks:
        gate, up = _plain(block.mlp.gate_up, nn.Linear).chunk(2)
        layers.append(
            LlamaLayer(
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

    return LlamaWeights(
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


def _read_llama(model: Any) -> LlamaWeights:
    config, inner = model.config, model.model
    if config.hidden_act not in ("silu", "swish"):
        raise NotLlamaShaped(f"its MLP has hidden_act={config.hidden_act!r}; it computes silu")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        raise NotLlamaShaped(f"it attends through a sliding window of {config.sliding_window}")
    rope = getattr(inner.rotary_emb, "rope_type", "default")
    if rope not in _STATIC_ROPE:
        raise NotLlamaShaped(f"its rotary angles are {rope!r}; it takes {', '.join(_STATIC_ROPE)}")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norm = type(inner.norm)
    layers = []
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if abs(attention.scaling - head_size**-0.5) > 1e-9:
            raise NotLlamaShaped(f"its scores are scaled by {attention.scaling}; it computes 1 / sqrt(head size)")
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        layers.append(
            LlamaLayer(
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

    return LlamaWeights(
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


