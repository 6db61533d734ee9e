"""Your own module and your own DataLoader in the Trainer: nothing to subclass, nothing to rename.

python examples/own_model.py --steps 200
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasttrain import TrainConfig, Trainer


class CharRNN(nn.Module):
    """Any module will do that returns logits (B, T, V)."""

    def __init__(self, vocab_size: int = 128, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(ids))[0])  # (B, T, V)


class Ascii:
    """A tokenizer needs encode and decode."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("ascii", errors="replace")


def main(steps: int, checkpoint_dir: str | None) -> None:
    ids = torch.tensor(Ascii().encode("the quick brown fox jumps over the lazy dog. " * 200))
    windows = ids.unfold(0, 65, 64)  # (N, 65)
    train = DataLoader(TensorDataset(windows[:-8, :-1], windows[:-8, 1:]), batch_size=8, shuffle=True)
    val = DataLoader(TensorDataset(windows[-8:, :-1], windows[-8:, 1:]), batch_size=8)
    model = CharRNN()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    trainer = Trainer(model=model, train_dataloader=train, val_dataloader=val, optimizer=optimizer, scheduler=scheduler,
                      config=TrainConfig(max_steps=steps), checkpoint_dir=checkpoint_dir, use_amp=True,
                      tokenizer=Ascii())
    result = trainer.train()
    print(f"validation loss {result.val_loss:.3f}")
    print("the quick" + trainer.generate_text("the quick", max_new_tokens=40, temperature=0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--checkpoint-dir", help="where to keep checkpoints; run again to continue")
    main(**vars(parser.parse_args()))
