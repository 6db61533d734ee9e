"""One script for one process and for many: how many there are is torchrun's business.

python examples/train_parallel.py --steps 60
torchrun --nproc-per-node 2 examples/train_parallel.py --steps 60 --parallel fsdp --checkpoint-dir run

Run the second with another number, or the first with --checkpoint-dir run: it goes on where the others stopped, with
the same samples in the same order. The model is built without memory, so it may be larger than one process holds.
"""

import argparse

import torch

from fasttrain import TrainConfig, Trainer
from fasttrain.data import TokenDataset, TokenLoader
from fasttrain.models.gpt import GPT, GPTConfig

TEXT = b"the quick brown fox jumps over the lazy dog. " * 400


def main(steps: int, parallel: str, checkpoint_dir: str | None) -> None:
    ids = torch.tensor(list(TEXT))
    train = TokenLoader(TokenDataset(ids[:-2049], seq_len=64), batch_size=4, seed=1)
    val = TokenLoader(TokenDataset(ids[-2049:], seq_len=64), batch_size=4, shuffle=False)
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=128, num_layers=2, num_heads=2, hidden_size=64, max_seq_len=64))
    config = TrainConfig(max_steps=steps, global_batch_size=16, lr=3e-3, parallel=parallel,
                         activation_checkpointing="full", save_every_steps=max(1, steps // 2))
    trainer = Trainer(model=model, train_dataloader=train, val_dataloader=val, config=config,
                      checkpoint_dir=checkpoint_dir)
    result = trainer.train()
    if trainer.team.leads:
        print(f"{trainer.team.world_size} ranks, step {result.step}, validation loss {result.val_loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--parallel", default="auto", help="auto, none, ddp, fsdp, fsdp-vocab or hsdp")
    parser.add_argument("--checkpoint-dir", help="where to keep checkpoints; run again to continue")
    main(**vars(parser.parse_args()))
