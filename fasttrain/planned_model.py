"""A model for `fasttrain plan`: found by name, built without memory, and reduced to the shapes that a plan needs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpointing import read_manifest
from .export import newest_of
from .models.gpt import GPT, GPTConfig
from .optimizations import repeated_blocks


@dataclass(frozen=True)
class PlannedModel:
    """What a plan asks a model."""

    name: str
    build: Callable[[torch.dtype, int], nn.Module]
    """(type of the weights, longest sequence) -> the model on the default device."""
    shapes: list[tuple[int, ...]]
    """Of every parameter, tied ones once."""
    blocks: list[list[tuple[int, ...]]]
    """Of each of the repeated blocks' parameters."""
    outside: list[tuple[int, ...]]
    """Of the parameters outside of the repeated blocks, but for `head`'s."""
    head: list[tuple[int, ...]]
    """Of the output head's, which fsdp-vocab divides by classes; none where it is tied to another module."""
    vocab_size: int
    hidden_size: int
    recompute: tuple[str, ...]
    """Ways of activation checkpointing that the model allows, the least recomputation first."""

    @property
    def num_parameters(self) -> int:
        return numel(self.shapes)


def numel(shapes: Iterable[Sequence[int]]) -> int:
    """Elements of all of them."""
    return sum(math.prod(shape) for shape in shapes)


def planned_model(model: str, sizes: Mapping[str, int], seq_len: int) -> PlannedModel:
    """The model that `--model` names.

    Args:
        model: "gpt" or "llama", of `sizes`; else a path: a config.json or a folder that holds one (Hugging Face's, or
            a GPTConfig's fields), or a checkpoint, or a run.
        sizes: layers, dim, heads, kv_heads, intermediate, vocab, and for gpt perhaps tie_embeddings (0 or 1).

    Raises:
        ValueError: nothing of that name, or a config that is not of a causal language model.
    """
    if model == "gpt":
        name, build = f"gpt {sizes['layers']} x {sizes['dim']}", _gpt({
            "vocab_size": sizes["vocab"], "num_layers": sizes["layers"], "num_heads": sizes["heads"],
            "num_kv_heads": sizes["kv_heads"], "hidden_size": sizes["dim"],
            "intermediate_size": sizes["intermediate"], "tie_embeddings": bool(sizes.get("tie_embeddings", True))})
    elif model == "llama":
        width = sizes["intermediate"] or -(-sizes["dim"] * 8 // (3 * 64)) * 64
        name, build = f"llama {sizes['layers']} x {sizes['dim']}", _hugging_face({
            "model_type": "llama", "vocab_size": sizes["vocab"], "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"], "num_key_value_heads": sizes["kv_heads"] or sizes["heads"],
            "hidden_size": sizes["dim"], "intermediate_size": width, "tie_word_embeddings": False})
    else:
        config = _config_at(Path(model))
        name, build = model, _hugging_face(config) if "model_type" in config else _gpt(config)
    with torch.device("meta"):
        return describe(name, build, build(torch.float32, seq_len))


def describe(name: str, build: Callable[[torch.dtype, int], nn.Module], built: nn.Module) -> PlannedModel:
    """The shapes of `built`, a result of `build`, on any device."""
    blocks = repeated_blocks(built)
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    parameters = list(built.parameters())
    head = built.get_output_embeddings()  # type: ignore[operator]
    own = {id(parameter) for parameter in head.parameters(recurse=False)}
    if isinstance(head, nn.Embedding) or any(id(p) in own for module in built.modules() if module is not head
                                             for p in module.parameters(recurse=False)):
        own = set()
    vocab_size, hidden_size = head.weight.shape
    return PlannedModel(name, build, _shapes(parameters), [_shapes(block.parameters()) for block in blocks],
                        _shapes(p for p in parameters if id(p) not in in_blocks | own),
                        _shapes(p for p in parameters if id(p) in own), vocab_size, hidden_size,
                        ("none", "selective", "full") if blocks else ("none",))


def _shapes(parameters: Iterable[nn.Parameter]) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in parameters]


def _gpt(config: Mapping[str, Any]) -> Callable[[torch.dtype, int], nn.Module]:
    def build(dtype: torch.dtype, seq_len: int) -> nn.Module:
        with _default_dtype(dtype):
            return GPT(GPTConfig(**{**config, "max_seq_len": seq_len}))

    return build


def _hugging_face(config: Mapping[str, Any]) -> Callable[[torch.dtype, int], nn.Module]:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError(f"a model of type {config['model_type']!r} is built by transformers, which is not installed; "
                         "pip install transformers, or use --model gpt with sizes") from None
    options = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}

    def build(dtype: torch.dtype, seq_len: int) -> nn.Module:
        made = AutoConfig.for_model(config["model_type"], **options)
        with _default_dtype(dtype):
            model: nn.Module = AutoModelForCausalLM.from_config(made)
        if not isinstance(getattr(model, "base_model", None), nn.Module) or model.get_output_embeddings() is None:  # type: ignore[operator]
            raise ValueError(f"{type(model).__name__} has no base_model with an output head; a plan needs both")
        return model.train()

    return build


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New weights have this type: fake ones cannot be given another afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _config_at(path: Path) -> dict[str, Any]:
    """The model's config at a path, as data."""
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            config = json.loads(file.read_text())
        except ValueError as problem:
            raise ValueError(f"model {str(file)!r} is not JSON ({problem}); it must be a model's config.json") from None
        if isinstance(config, dict) and ("model_type" in config or "hidden_size" in config):
            return config
        raise ValueError(f"model {str(file)!r} is not a model's config: it has neither model_type (Hugging Face) nor "
                         "hidden_size (GPTConfig)")
    if path.is_dir():
        config = read_manifest(newest_of(path)).metadata.get("model_config")
        if isinstance(config, dict):
            return config
    raise ValueError(f"model is {str(path)!r}, which is neither 'gpt', 'llama', nor a file or folder with a model's "
                     "config; pass sizes with --model gpt, a config.json, or a run")
