"""Checkpoints for other programs: plain safetensors out and in, a folder for from_pretrained, and what inspect says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import Bigram, one_thread, tiny_gpt, tiny_trainer, tokens  # noqa: F401

from fasttrain import cli
from fasttrain.checkpointing import CheckpointError
from fasttrain.config import TrainConfig, to_dict
from fasttrain.export import describe_checkpoint, export_checkpoint, load_weights, newest_of
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.resume_rules import RULES, compare_configs
from fasttrain.trainer import Trainer


def test_exported_weights_are_the_models_and_load_into_a_fresh_one(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run")
    trainer.train()
    file = export_checkpoint(newest_of(tmp_path / "run"), tmp_path / "weights.safetensors")
    weights = load_file(file)
    own = dict(trainer.model.state_dict())
    assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)
    fresh = Trainer(tiny_gpt(seed=9))
    assert fresh.load_checkpoint(file) == file
    assert all(torch.equal(t, own[name]) for name, t in fresh.model.state_dict().items())
    with pytest.raises(ValueError, match="exists"):
        export_checkpoint(newest_of(tmp_path / "run"), file)
    assert not list(tmp_path.glob(".inflight*"))


def test_a_model_that_hugging_face_has_no_class_for_is_refused_by_name(tmp_path: Path) -> None:
    x = tokens(4 * 8).view(4, 8)
    tiny_trainer(tmp_path / "run", [(x, x)], Bigram()).train()
    with pytest.raises(ValueError, match=r"a Bigram, which has no Hugging Face config.*--to safetensors"):
        export_checkpoint(newest_of(tmp_path / "run"), tmp_path / "folder", "hf")
    assert not list(tmp_path.glob(".inflight*")) and not (tmp_path / "folder").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_our_gpt_comes_back_as_a_llama_with_the_same_logits(tmp_path: Path, tied: bool, kv_heads: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=29, num_layers=2, num_heads=4, num_kv_heads=kv_heads, hidden_size=32,
                          max_seq_len=64, rope_theta=500.0, norm_eps=1e-3, dropout=0.1, tie_embeddings=tied))
    tiny_trainer(tmp_path / "run", None, model, max_steps=3).train()
    folder = export_checkpoint(newest_of(tmp_path / "run"), tmp_path / "folder", "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(back).__name__ == "LlamaForCausalLM" and back.dtype == torch.float32
    ids = tokens(3 * 40, seed=5).view(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model.eval()(ids), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in back.parameters()) == model.num_parameters()


def test_weights_of_another_program_are_read_within_the_same_limits(tmp_path: Path) -> None:
    table = {"a.w": torch.randn(3, 4), "b": torch.arange(5), "half": torch.randn(7).to(torch.bfloat16)}
    save_file(table, tmp_path / "theirs.safetensors")
    read = load_weights(tmp_path / "theirs.safetensors")
    assert read.keys() == table.keys() and all(torch.equal(read[name], table[name]) for name in table)
    (tmp_path / "bad.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    (tmp_path / "link.safetensors").symlink_to("theirs.safetensors")
    for name in ("bad", "link", "missing"):
        with pytest.raises(CheckpointError, match=name):
            load_weights(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="belongs to another model"):
        Trainer(tiny_gpt()).load_checkpoint(tmp_path / "theirs.safetensors")


def test_a_hugging_face_model_comes_back_by_from_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=29, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0))
    ids = tokens(4 * 16).view(4, 16)
    tiny_trainer(tmp_path / "run", [{"input_ids": ids, "labels": ids}], model, max_steps=2).train()
    folder = export_checkpoint(newest_of(tmp_path / "run"), tmp_path / "folder", "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(back.eval()(ids).logits, model.eval()(ids).logits)


def test_inspect_names_the_step_the_config_and_every_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path).train()
    facts, tensors = describe_checkpoint(newest_of(tmp_path))
    assert ("config.max_steps", "6") in facts and any(name == "step" and text.startswith("6 ") for name, text in facts)
    assert ("model: token_embedding.weight", "(29, 16) F32") in tensors
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(tmp_path)])
    assert ended.value.code == 0 and "token_embedding.weight" in capsys.readouterr().out


def test_every_field_has_one_rule_for_a_changed_value() -> None:
    assert RULES.keys() == to_dict(TrainConfig()).keys()
    assert {rule for rule, _ in RULES.values()} == {"taken", "kept", "refused"}
    saved = to_dict(TrainConfig(max_steps=5, seed=1))
    lines = compare_configs(saved, TrainConfig(max_steps=9, seed=2))
    assert lines[0].startswith("max_steps: 5 -> 9 (taken: ") and lines[1].startswith("seed: 1 -> 2 (kept: ")
    narrow = TrainConfig(max_steps=5, seed=1, optimizer_state_dtype="int8")
    with pytest.raises(ValueError, match="dtype is 'int8', and the checkpoint was trained with 'float32'"):
        compare_configs(saved, narrow)
    assert "the optimizer was passed" in compare_configs(saved, narrow, own_optimizer=True)[0]


def test_a_refused_change_leaves_the_checkpoint_and_a_kept_one_goes_on(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"optimizer_state_dtype": "bfloat16"}
    tiny_trainer(tmp_path, max_steps=3, schedule="constant", **settings).train()
    with pytest.raises(ValueError, match="set it back"):
        tiny_trainer(tmp_path, max_steps=6, schedule="constant").train()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000003"]
    other = tiny_trainer(tmp_path, max_steps=6, schedule="constant", seed=7, **settings)
    other.train()
    assert "seed: 0 -> 7 (kept" in capsys.readouterr().out
    assert other.state is not None and other.state.optimizer.rounding_seed == 0  # type: ignore[attr-defined]
