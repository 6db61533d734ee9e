"""Do narrow moments cost accuracy? One small GPT under every kind of AdamW state: `python -m bench.narrow_moments`.

Byte-level text of this Python's standard library; each seed draws the initial weights and the order of the windows, the
same for every kind. A kind passes if its mean validation loss differs from float32's by less than the standard
deviation of float32's own seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.common import environment
from fasttrain import AdamW
from fasttrain.models.gpt import GPT, GPTConfig

KINDS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "int8": {"state_dtype": "int8"},
}
LENGTH = 64


def read_text() -> torch.Tensor:
    sources = sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()


def final_loss(text: torch.Tensor, options: dict[str, str], seed: int, steps: int) -> float:
    """Validation loss, nats a byte, after `steps` steps of 16 windows."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=256, num_layers=2, num_heads=2, hidden_size=64, max_seq_len=LENGTH))
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, max_grad_norm=1.0, **options)  # type: ignore[arg-type]
    optimizer.rounding_seed = seed
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]

    def loss_of(source: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        windows = source[starts[:, None] + torch.arange(LENGTH + 1)]  # (B, T + 1)
        logits = model(windows[:, :-1])
        logits = logits[0] if isinstance(logits, tuple) else logits
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss_of(train, torch.randint(len(train) - LENGTH, (16,))).backward()
        optimizer.step(zero_grads=True)
    with torch.no_grad():
        starts = torch.arange(0, len(held_out) - LENGTH - 1, (len(held_out) - LENGTH) // 256)
        return float(loss_of(held_out, starts))


def report(losses: dict[str, list[float]], steps: int) -> str:
    wide = losses["float32"]
    spread = statistics.stdev(wide)
    facts = environment()
    lines = [
        "# AdamW with narrow moments: the loss it reaches",
        "",
        f"Made by `python -m bench.narrow_moments --steps {steps}`. A GPT of 2 layers and width 64 on bytes, "
        f"{len(wide)} seeds. Standard deviation of float32's seeds: {spread:.4f}. "
        f"torch {facts['torch']}, {facts['cpu']}.",
        "",
        "| moments | validation loss, mean over seeds | each seed | from float32 | within the spread |",
        "|---|---|---|---|---|",
    ]
    for kind, values in losses.items():
        difference = statistics.mean(values) - statistics.mean(wide)
        each = ", ".join(f"{value:.3f}" for value in values)
        verdict = "" if kind == "float32" else "yes" if abs(difference) < spread else "NO"
        lines.append(f"| {kind} | {statistics.mean(values):.4f} | {each} | {difference:+.4f} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    text = read_text()
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in range(arguments.seeds):
        for kind, options in KINDS.items():
            losses[kind].append(final_loss(text, options, seed, arguments.steps))
            print(f"seed {seed} {kind}: {losses[kind][-1]:.4f}", flush=True)
    table = report(losses, arguments.steps)
    print(table)
    if arguments.out:
        arguments.out.write_text(table)


if __name__ == "__main__":
    main()
