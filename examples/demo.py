"""The main job, start to end: train a small GPT on real text, see that it learns, write text with it.

    python examples/demo.py --out runs/demo

The text is the source of the running Python's standard library. Interrupt it and run it again: it continues. The steps
are fixed, so two runs from scratch with one seed print the same losses. DEMO_STEPS=60 gives a one-minute form.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from fasttrain import TrainConfig, Trainer, evaluate
from fasttrain.checkpointing import read_manifest
from fasttrain.corpus_statistics import ngram_entropies, xz_bits_per_byte
from fasttrain.data import TokenLoader, corpus_bytes, prepare_tokens
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.progress import plot_losses, print_report
from fasttrain.utils import seed_all

PROMPTS = ("def read_lines(path):\n", "class Stack:\n    def push(self, item):\n")
SEQ_LEN, BATCH_SIZE = 256, 8


def main(out: Path, steps: int) -> int:
    started = time.monotonic()
    train, val = prepare_tokens("stdlib", "bpe:4096", out.parent / "cache", seq_len=SEQ_LEN, val_fraction=0.03)
    config = TrainConfig(
        max_steps=steps,
        warmup_steps=max(steps // 20, 1),
        lr=3e-3,
        min_lr=1e-4,
        weight_decay=0.1,
        precision="float32",  # as every machine has it; `auto` may choose bfloat16 where that is faster
        eval_every_steps=max(steps // 4, 1),
        eval_max_batches=20,
        save_every_steps=max(steps // 4, 1),
        log_every_steps=10,
    )
    seed_all(config.seed)
    model = GPT(
        GPTConfig(
            vocab_size=train.vocab_size, max_seq_len=SEQ_LEN, num_layers=4, num_heads=4, num_kv_heads=2, hidden_size=256
        )
    )
    val_loader = TokenLoader(val, BATCH_SIZE, shuffle=False, drop_last=False)
    trainer = Trainer(
        model=model,
        train_dataloader=TokenLoader(train, BATCH_SIZE, seed=config.seed),
        val_dataloader=val_loader,
        config=config,
        checkpoint_dir=out,
    )
    result = trainer.train()
    if result.status != "completed":
        return 130

    score = evaluate(model, val_loader)
    train_text, val_text = corpus_bytes("stdlib", val_fraction=0.03)
    unigram, bigram = ngram_entropies(train_text, val_text)
    assert score.bits_per_byte is not None
    print_report(
        "how well it predicts text it has not seen, in bits per byte",
        [
            ("every byte alike", "8.000"),
            ("unigram of bytes", f"{unigram:.3f}"),
            ("bigram of bytes", f"{bigram:.3f}"),
            ("xz, given all the training text", f"{xz_bits_per_byte(train_text, val_text, preset=1):.3f}"),
            (
                "this model",
                f"{score.bits_per_byte:.3f}  (loss {score.loss:.3f} nats per token, perplexity {score.perplexity:.1f})",
            ),
        ],
    )
    for prompt, text in zip(
        PROMPTS, trainer.generate_text(list(PROMPTS), max_new_tokens=80, temperature=0.7, top_p=0.95)
    ):
        print(f"\n----- {prompt.splitlines()[0]}\n{prompt}{text}")
    print()
    before = read_manifest(trainer.resumed_from).metadata["tokens_seen"] if trainer.resumed_from else 0
    seconds = sum(result.time_by_phase[phase] for phase in ("data", "forward_backward", "optimizer"))
    tokens = result.tokens_seen - before
    speed = f"{tokens / seconds:,.0f} tokens a second" if tokens else "nothing left to train"
    print_report(
        "where things are",
        [
            ("checkpoint", str(result.checkpoint)),
            ("metrics", str(out / "metrics.jsonl")),
            ("loss plot", str(plot_losses(out / "metrics.jsonl", out / "loss.png"))),
            ("speed", speed),
            ("time", f"{time.monotonic() - started:.0f} s in all"),
        ],
    )
    if score.bits_per_byte >= bigram:
        print(f"FAILED: {score.bits_per_byte:.3f} bits per byte do not beat the bigram's {bigram:.3f}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory of the run")
    parser.add_argument("--steps", type=int, default=int(os.environ.get("DEMO_STEPS", "400")), help="optimizer steps")
    arguments = parser.parse_args()
    raise SystemExit(main(arguments.out, arguments.steps))
