"""Checkpoints for other programs: what is in one, its weights as plain safetensors or as a Hugging Face folder, and
weights of other programs for a model here.

Files are read through the same limits and checks as any checkpoint. What is written carries no training state.
A folder for `from_pretrained` is written for models that came from Hugging Face, under the names and with the config
that they had, and for our GPT, which is a Llama whose q, k, v and whose gate, up are stacked.
Deliberately left out: any other conversion between architectures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from .checkpointing import CheckpointError, list_checkpoints, load_checkpoint, read_manifest
from .manifest import TreeEntry, is_rank_tree
from .models.gpt import GPTConfig
from .storage import make_directory, open_directory, open_regular, private_directory, sync_directory, write_file
from .tensorfile import layout, map_tensors, tensor_bytes
from .treefiles import describe, read_header
from .trees import ReadBudget
from .utils import format_bytes

ExportFormat = Literal["safetensors", "hf"]


def describe_checkpoint(path: Path | str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(facts, tensors) as rows of text: step, model, config, versions, file sizes; and of each tensor its name, shape,
    dtype and size. Read from the manifest, whose own seal is verified; the files are not read."""
    manifest = read_manifest(path)
    metadata = manifest.metadata
    facts = [("step", f"{manifest.step} (the one before: {manifest.parent_step})"),
             ("model", str(metadata.get("model_class", "?"))),
             *((name, str(metadata[name])) for name in ("precision", "val_loss", "tokens_seen", "finite")
               if metadata.get(name) is not None),
             ("written by", ", ".join(f"{name} {version}" for name, version in manifest.libraries.items()))]
    tensors = []
    parts = {name: entry for name, entry in manifest.trees.items() if is_rank_tree(name)}
    for tree, entry in manifest.trees.items():
        if entry.tensors is None:
            continue  # a rank's, which lists them itself
        facts.append((f"{tree}", f"{len(entry.tensors)} tensors, {format_bytes(_size_of(entry))}"))
        tensors += [(f"{tree}: {name}", f"{tuple(item.shape)} {item.dtype}") for name, item in entry.tensors.items()]
    if parts:
        facts.append(("ranks", f"{len(parts)}, {format_bytes(sum(map(_size_of, parts.values())))}"))
    for section in ("config", "model_config"):
        values = metadata.get(section)
        if isinstance(values, Mapping):
            facts += [(f"{section}.{key}", json.dumps(value)) for key, value in values.items()]
    return facts, tensors


def _size_of(entry: TreeEntry) -> int:
    return entry.structure.size + (entry.tensor_file.size if entry.tensor_file else 0)


def export_checkpoint(path: Path | str, out: Path | str, to: ExportFormat = "safetensors") -> Path:
    """Writes the weights of the checkpoint at `path`, verified first.

    Args:
        out: with "safetensors" the file to write, or an existing folder, which gets `model.safetensors`; with "hf" the
            folder, which gets config.json, model.safetensors and, if the checkpoint has one, tokenizer.json.

    Raises:
        ValueError: the checkpoint is damaged; `out` exists; or "hf" and the model is neither our GPT nor one of Hugging
            Face's.
    """
    metadata = read_manifest(path).metadata
    weights: dict[str, Tensor] = load_checkpoint(path, ["model"])["model"]
    out = Path(out)
    if to == "safetensors":
        target = out / "model.safetensors" if out.is_dir() else out
        return _write(target.parent, {target.name: weights})
    config, architecture, tokenizer = (metadata.get(key) for key in ("model_config", "model_class", "tokenizer"))
    if architecture == "GPT" and isinstance(config, Mapping) and config.keys() == GPTConfig.__dataclass_fields__.keys():
        eos = tokenizer.get("eos_token_id") if isinstance(tokenizer, Mapping) else None
        config, weights = _as_llama(GPTConfig(**config), weights, eos)
        architecture = "LlamaForCausalLM"
    if not isinstance(config, Mapping) or "model_type" not in config:
        raise ValueError(f"{str(path)!r} holds a {metadata.get('model_class')}, which has no Hugging Face config, so "
                         "no from_pretrained could read it; use --to safetensors")
    # Tied weights have two names for one tensor; the file holds it once, as save_pretrained does.
    once = {id(tensor): name for name, tensor in reversed(weights.items())}
    files: dict[str, Any] = {
        "config.json": {**config, "architectures": [architecture]},
        "model.safetensors": {name: weights[name] for name in once.values()},
    }
    text = tokenizer.get("json") if isinstance(tokenizer, Mapping) else None
    if isinstance(text, str):
        files["tokenizer.json"] = json.loads(text)
    _write(out, files)
    return out


def _as_llama(config: GPTConfig, weights: Mapping[str, Tensor], eos: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of the transformers.LlamaForCausalLM that computes what this GPT does: the same norms, pairs
    of rotary positions, groups of heads and MLP, and no bias. (Dropout of embeddings and residuals is training's only.)
    """
    theirs = {
        "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size, "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings, "bos_token_id": None, "eos_token_id": eos, "pad_token_id": None,
        "dtype": str(weights["token_embedding.weight"].dtype).removeprefix("torch."),
    }
    names = {"token_embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head",
             "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
             "attention.out": "self_attn.o_proj", "mlp.down": "mlp.down_proj"}
    groups = config.num_kv_heads * config.head_size
    stacks = {"attention.qkv": (("self_attn.q_proj", config.num_heads * config.head_size),
                                ("self_attn.k_proj", groups), ("self_attn.v_proj", groups)),
              "mlp.gate_up": (("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size))}
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        place = ""
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
            place = f"model.layers.{layer}."
        if module in stacks:
            start = 0
            for part, rows in stacks[module]:
                out[f"{place}{part}.weight"] = tensor[start:start + rows]
                start += rows
        else:
            out[f"{place}{names[module]}.weight"] = tensor
    return theirs, out


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file that any program wrote: `load_checkpoint`'s limits hold, CPU tensors are
    mapped from the file. There is no hash to check: such a file carries none. Raises CheckpointError."""
    path = Path(path)
    try:
        with open_directory(path.parent, follow=True) as directory, open_regular(directory, path.name) as descriptor:
            size = os.fstat(descriptor).st_size
            budget = ReadBudget.of_size(size)
            return dict(map_tensors(descriptor, read_header(descriptor, size, budget), budget))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{str(path)!r}: {describe(error)}") from error


def newest_of(path: Path | str) -> Path:
    """`path` if it is a checkpoint, else the newest one in it, unverified."""
    inside = list_checkpoints(path)
    return inside[-1] if inside else Path(path)


def _write(folder: Path, files: Mapping[str, Any]) -> Path:
    """JSON data and tables of tensors, all built aside, fsynced, renamed. Returns the last one's path."""
    for name in files:
        if (folder / name).exists():
            raise ValueError(f"{str(folder / name)!r} exists; name another place, or remove it")
    make_directory(folder)
    sizes = [sum(t.nbytes for t in value.values() if isinstance(t, Tensor)) for value in files.values()]
    with private_directory(folder, sum(sizes) + 2**16) as private:
        with open_directory(private) as directory:
            for name, value in files.items():
                write_file(directory, name, _pieces(value) if name.endswith(".safetensors") else [
                    json.dumps(value, indent=2).encode()])
        for name in files:
            os.rename(private / name, folder / name)
    sync_directory(folder)
    return folder / list(files)[-1]


def _pieces(weights: Mapping[str, Tensor]) -> Any:
    header, specs = layout(weights, "model")
    yield header
    for name in specs:
        yield tensor_bytes(weights[name])
