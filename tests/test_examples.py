"""The examples run as their own text says, in a tiny form, and the model of each has learnt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_own_model_trains_and_writes(tmp_path: Path) -> None:
    text = run("examples/own_model.py", "--steps", "60", "--checkpoint-dir", tmp_path)
    assert float(re.findall(r"validation loss ([\d.]+)", text)[0]) < 1.0
    assert text.rstrip().splitlines()[-1].startswith("the quick brown")
    assert "step-00000060" in run("examples/own_model.py", "--steps", "61", "--checkpoint-dir", tmp_path)


def test_own_loop_compiles_to_one_graph_and_learns() -> None:
    losses = [
        float(loss)
        for loss in re.findall(r"loss ([\d.]+)", run("examples/own_loop.py", "--steps", "60", "--backend", "aot_eager"))
    ]
    assert losses[-1] < 0.6 * losses[0]


def test_every_example_is_short() -> None:
    for path in (ROOT / "examples").glob("own_*.py"):
        assert path.read_text().count("\n") < 60


def test_finetuning_ends_in_a_folder_that_from_pretrained_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz T.")}
    plain = Tokenizer(models.WordLevel({**letters, "?": len(letters)}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(tmp_path / "raw")
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                 num_attention_heads=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path / "raw")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 80)
    text = run("examples/finetune_hf.py", "--model", tmp_path / "raw", "--text", tmp_path / "text.txt", "--out",
               tmp_path / "out", "--steps", "20", "--length", "32", "--batch-size", "4")
    assert "no logits are made; checked on four tokens of LlamaForCausalLM" in text
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    raw = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "raw")
    assert not tuned.lm_head.weight.equal(raw.lm_head.weight)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")) == 30


def test_callbacks_act_in_a_real_run(tmp_path: Path) -> None:
    (tmp_path / "control").write_text("lr 0.5\n")
    text = run("examples/callbacks.py", "--out", tmp_path, "--steps", "60")
    assert "fastest interval" in text and "learning rate now" in text and "completed" in text
    assert {"metrics.csv", "metrics.jsonl"} <= {path.name for path in tmp_path.iterdir()}


def test_one_script_trains_under_torchrun_and_goes_on_alone(tmp_path: Path) -> None:
    text = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/train_parallel.py",
               "--steps", "20", "--parallel", "fsdp", "--checkpoint-dir", tmp_path)
    assert "2 ranks, step 20" in text and text.count("validation loss") == 1
    text = run("examples/train_parallel.py", "--steps", "40", "--checkpoint-dir", tmp_path)
    assert "step-00000020" in text and "1 ranks, step 40" in text
    assert float(re.findall(r"validation loss ([\d.]+)", text)[-1]) < 2.5
