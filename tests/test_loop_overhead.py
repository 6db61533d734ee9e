"""The loop with its progress, metrics and checks costs about what the one that a person writes by hand does."""

from __future__ import annotations

import io
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_runs import one_thread, tokens  # noqa: F401

from fasttrain.batch_stream import BatchStream
from fasttrain.callbacks import Hooks, JsonlLogger, Run
from fasttrain.config import TrainConfig
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.ops.adamw import AdamW
from fasttrain.progress import Progress
from fasttrain.state import TrainState
from fasttrain.training_loop import Parts, fit

STEPS, ROUNDS = 40, 15
BATCHES = [(tokens(64, seed).view(4, 16), tokens(64, seed + 100).view(4, 16)) for seed in range(8)]


def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=29, num_layers=1, num_heads=2, hidden_size=32, intermediate_size=64,
                         max_seq_len=16))


def test_a_step_costs_about_what_it_does_in_a_hand_written_loop(tmp_path: Path) -> None:
    """4x16 tokens, clipping, AdamW (PyTorch's fused one there, ours here), in processor time and the best of
    interleaved rounds, so that a busy machine does not decide. The figures are `make bench`'s."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def by_hand() -> float:
        start = time.process_time()
        for step in range(STEPS):
            x, y = BATCHES[step % len(BATCHES)]
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 9:
                loss.item()
        return time.process_time() - start

    other = tiny()
    state = TrainState(other, AdamW(other.parameters(), lr=1e-3), BatchStream(BATCHES))
    writers = Hooks([JsonlLogger(tmp_path / "metrics.jsonl"), Progress(io.StringIO())])
    writers.fire("on_train_start", state, Run(TrainConfig(max_steps=1), tmp_path, None, STEPS * ROUNDS, print))

    def by_fit() -> float:
        start = time.process_time()
        fit(state, TrainConfig(max_steps=state.step + STEPS, log_every_steps=10), Parts(hooks=writers))
        return time.process_time() - start

    times = [(by_hand(), by_fit()) for _ in range(ROUNDS)]
    hand, ours = (min(each) for each in zip(*times[3:]))
    print(f"by hand {1e6 * hand / STEPS:.0f} us a step, fit() {1e6 * ours / STEPS:.0f} us: {ours / hand:.2f}x")
    assert ours < 1.5 * hand
