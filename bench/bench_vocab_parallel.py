"""A head that is gathered (fsdp) against one that stays cut (fsdp-vocab), two processes with one thread each.

    python -m bench.bench_vocab_parallel          writes its section of bench/results/parallel.md

The same untied GPT with a large vocabulary and the same batches for both, in turn; the losses are compared first. Bytes
are those that the loopback interface carried between two steps (run it on a quiet machine). What the head takes of
them, for n ranks of N tokens: (n - 1) / n of V x D numbers gathered and as many gradients summed, from each rank;
against (n - 1) / n of n N x D hidden states gathered and as many numbers for their gradients.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
from typing import Any

import torch

from bench.bench_parallel import Meter, start_ranks, write_section

MODEL = {"vocab_size": 32768, "num_layers": 2, "num_heads": 4, "hidden_size": 256, "max_seq_len": 128,
         "tie_embeddings": False}
STEPS, WARM, BATCH = 8, 2, 4
NAMES = {"fsdp": "fsdp, the head gathered", "fsdp-vocab": "fsdp-vocab"}


def work(parallel: str) -> None:
    """One rank."""
    from fasttrain import TrainConfig, Trainer
    from fasttrain.data import TokenDataset, TokenLoader
    from fasttrain.models.gpt import GPT, GPTConfig
    from fasttrain.utils import peak_rss_bytes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    length = MODEL["max_seq_len"]
    tokens = torch.randint(0, MODEL["vocab_size"], (2 * BATCH * STEPS * length + 1,))
    with torch.device("meta"):
        model = GPT(GPTConfig(**MODEL))  # type: ignore[arg-type]
    meter = Meter(WARM, STEPS)
    trainer = Trainer(model, TokenLoader(TokenDataset(tokens, length), BATCH), callbacks=[meter],
                      config=TrainConfig(max_steps=STEPS, parallel=parallel, precision="float32",  # type: ignore[arg-type]
                                         preflight=False, log_every_steps=STEPS))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.progress.stream = io.StringIO()
        result = trainer.train()
    if trainer.team.leads:
        (wire, _, told), (wire_end, _, told_end) = meter.counts
        each = [b - a for a, b in zip(meter.ends[WARM - 1:], meter.ends[WARM:])]
        print(json.dumps({"loss": result.train_loss, "step_ms": 1e3 * statistics.median(each),
                          "share": (told_end - told) / sum(each), "wire": (wire_end - wire) / (STEPS - WARM),
                          "peak_mib": peak_rss_bytes() / 2**20}))


def main(rounds: int = 2) -> None:
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for _ in range(rounds):  # in turn: the machine's speed drifts
        for name in NAMES:
            printed = start_ranks("bench.bench_vocab_parallel", [name], 2)[0]
            seen[name].append(json.loads(printed.splitlines()[-1]))
            print(name, seen[name][-1], flush=True)
    losses = [rows[0]["loss"] for rows in seen.values()]
    assert max(losses) - min(losses) < 1e-4, losses
    V, D, tokens = MODEL["vocab_size"], MODEL["hidden_size"], 2 * BATCH * MODEL["max_seq_len"]
    head = {"fsdp": 2 * V * D * 4, "fsdp-vocab": 2 * tokens * D * 4}  # the two ranks together send it once
    lines = [
        f"`python -m bench.bench_vocab_parallel`, torch {torch.__version__}, {os.cpu_count()} cores, one thread each. "
        f"GPT of {MODEL}, {tokens} tokens a step in all; medians of {rounds} runs. Losses agree to "
        f"{max(losses) - min(losses):.1e}.", "",
        "| | step, ms | communication and waiting | on the wire a step, MiB | of it the head's, by formula, MiB | "
        "peak of a rank, MiB |", "|---|---|---|---|---|---|"]
    for name, title in NAMES.items():
        middle = {key: statistics.median(row[key] for row in seen[name]) for key in seen[name][0]}
        lines.append(f"| {title} | {middle['step_ms']:.0f} | {middle['share']:.0%} | {middle['wire'] / 2**20:.1f} | "
                     f"{head[name] / 2**20:.1f} | {middle['peak_mib']:.0f} |")
    write_section("A head that is never gathered", lines)


if __name__ == "__main__":
    work(sys.argv[1]) if len(sys.argv) > 1 else main()
