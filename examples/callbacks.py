"""Callbacks, shipped and your own: stop early, average the weights, undo loss spikes, steer the run from outside.

python examples/callbacks.py --out runs/callbacks
echo "lr 0.5" >> runs/callbacks/control      # while it runs
"""

import argparse
from pathlib import Path

import torch

from fasttrain import Callback, TrainConfig, Trainer
from fasttrain.averaging import EMA
from fasttrain.callbacks import EarlyStopping
from fasttrain.control import ControlFile
from fasttrain.loggers import CsvLogger
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.profiling import Norms
from fasttrain.spikes import LossSpike


class Fastest(Callback):
    """Any object with some of the hooks in fasttrain/callbacks.py; those that are not there cost nothing."""

    observer = True  # an error in here is told and does not end the run

    def __init__(self) -> None:
        self.best, self.last = 0.0, (0, 0.0)

    def on_log(self, state, record) -> None:
        tokens, seconds = record["tokens"] - self.last[0], record["seconds"] - self.last[1]
        self.best, self.last = max(self.best, tokens / seconds), (record["tokens"], record["seconds"])

    def on_train_end(self, state, status) -> None:
        print(f"fastest interval: {self.best:,.0f} tokens/s")


def main(out: Path, steps: int) -> None:
    torch.manual_seed(0)
    text = torch.arange(4000) % 23 % 7  # (tokens,): something that can be learnt
    windows = text.unfold(0, 33, 32)
    train, val = list(windows[:-8].split(4)), list(windows[-8:].split(4))
    callbacks = [EarlyStopping(patience=3, min_delta=1e-3), EMA(0.95), LossSpike("rewind"), ControlFile(), Norms(),
                 CsvLogger(), Fastest()]
    model = GPT(GPTConfig(vocab_size=8, num_layers=2, num_heads=2, hidden_size=32, max_seq_len=33))
    config = TrainConfig(max_steps=steps, lr=3e-3, warmup_steps=10, schedule="wsd", eval_every_steps=50,
                         save_every_steps=50)
    result = Trainer(model=model, train_dataloader=train, val_dataloader=val, config=config, checkpoint_dir=out,
                     callbacks=callbacks).train()
    print(f"{result.status}: {result.reason}; validation loss {result.val_loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--steps", type=int, default=400, help="most optimizer steps")
    main(**vars(parser.parse_args()))
