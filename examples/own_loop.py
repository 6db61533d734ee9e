"""Your own loop, compiled, with fasttrain's ops as drop-in replacements.

python examples/own_loop.py --steps 100
"""

import argparse

import torch
from torch import nn

from fasttrain import AdamW, ops


class Bigram(nn.Module):
    def __init__(self, vocab_size: int = 256, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(ids)))  # (N, V)


def main(steps: int, backend: str) -> float:
    torch.manual_seed(0)
    with open(__file__, "rb") as file:
        text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    model = Bigram()
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)  # clipping is part of the step

    @torch.compile(fullgraph=True, backend=backend)  # one graph: the op is no break
    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.cross_entropy(model(x), y, label_smoothing=0.01, z_loss=1e-4)

    for step in range(steps):
        start = torch.randint(len(text) - 257, (8,))
        window = torch.stack([text[i : i + 257] for i in start])  # (8, 257)
        loss = loss_of(window[:, :-1].flatten(), window[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  gradient norm {optimizer.grad_norm.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--backend", default="inductor", help="torch.compile's backend")
    main(**vars(parser.parse_args()))
