"""The whole of it in a few seconds: text in, a model that learns, a checkpoint, the same run after a kill, text out."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tiny_runs import one_thread  # noqa: F401

from fasttrain import Trainer, evaluate
from fasttrain.callbacks import read_records
from fasttrain.data import TokenLoader, prepare_tokens
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.progress import plot_losses

TEXT = "the quick brown fox jumps over the lazy dog. pack my box with five dozen liquor jugs.\n"


def build(folder: Path, max_steps: int) -> Trainer:
    train, val = prepare_tokens(folder / "corpus", "bytes", folder / "cache", seq_len=32, val_fraction=0.2)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=train.vocab_size, num_layers=1, num_heads=2, hidden_size=32, max_seq_len=128))
    config = {"max_steps": max_steps, "lr": 1e-2, "warmup_steps": 5, "eval_every_steps": 20, "save_every_steps": 20,
              "precision": "float32", "log_every_steps": 5, "schedule": "constant"}
    return Trainer(model, TokenLoader(train, 8), TokenLoader(val, 8, shuffle=False, drop_last=False), config=config,
                   checkpoint_dir=folder / "run")


def test_text_in_text_out(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for index in range(30):
        (tmp_path / "corpus" / f"{index}.txt").write_text(TEXT * 6)

    whole = build(tmp_path, 60)
    result = whole.train()
    assert result.val_loss is not None and result.val_loss < 0.5 < math.log(256)
    scored = whole.evaluate()
    assert scored.bits_per_byte is not None and scored.bits_per_byte < 0.75
    assert whole.generate_text("the quick brown ", max_new_tokens=9, temperature=0.0) == "fox jumps"
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] / 4
    assert plot_losses(tmp_path / "run" / "metrics.jsonl", tmp_path / "loss.png").exists()

    loaded = Trainer(GPT(whole.model.config), checkpoint_dir=tmp_path / "run")  # type: ignore[arg-type]
    loaded.load_checkpoint(tmp_path / "run")
    # The tokenizer came along in the checkpoint.
    assert loaded.generate_text("pack my box ", max_new_tokens=9, temperature=0.0) == "with five"
    assert evaluate(loaded.model, whole.val_dataloader or ()).loss == scored.loss

    (tmp_path / "run").rename(tmp_path / "first")
    build(tmp_path, 40).train()
    continued = build(tmp_path, 60)
    continued.train()
    assert continued.resumed_from is not None
    for one, other in zip(whole.model.parameters(), continued.model.parameters()):
        assert torch.equal(one, other)
