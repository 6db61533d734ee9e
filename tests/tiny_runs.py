"""Small models, loaders and trainers that several test modules share: all real, only the sizes are tiny."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fasttrain.config import TrainConfig
from fasttrain.data import TokenDataset, TokenLoader
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.trainer import Trainer

VOCAB, LENGTH, BATCH = 29, 8, 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being divided, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def tiny_gpt(dropout: float = 0.1, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=VOCAB, num_layers=1, num_heads=2, hidden_size=16, intermediate_size=16,
                         max_seq_len=LENGTH, dropout=dropout))


class Bigram(nn.Module):
    """(B, T) ids -> (B, T, V) logits; the smallest thing that learns."""

    def __init__(self, vocab: int = VOCAB, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(vocab, 8)
        self.head = nn.Linear(8, vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids))


def token_loader(num_batches: int = 5, seed: int = 3) -> TokenLoader:
    """Knows its position."""
    return TokenLoader(TokenDataset(tokens(num_batches * BATCH * LENGTH + 1), LENGTH), BATCH, seed=seed)


def plain_loader(num_batches: int = 5, **options: Any) -> DataLoader[Any]:
    """PyTorch's own, shuffling by the global generator: does not know its position."""
    x = tokens(num_batches * BATCH * LENGTH).view(-1, LENGTH)
    return DataLoader(TensorDataset(x, (x * 3 + 1) % VOCAB), batch_size=BATCH, shuffle=True, **options)


def tiny_trainer(directory: Path | None = None, loader: Any = None, model: nn.Module | None = None, *,
                 callbacks: Any = (), val_dataloader: Any = None, loss_fn: Any = None, optimizer: Any = None,
                 scheduler: Any = None, **config: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 6, "lr": 1e-2, "precision": "float32", "log_every_steps": 2,
                                "preflight": False, **config}
    return Trainer(model=tiny_gpt() if model is None else model,
                   train_dataloader=token_loader() if loader is None else loader, val_dataloader=val_dataloader,
                   config=TrainConfig(**settings), checkpoint_dir=directory,
                   callbacks=callbacks, loss_fn=loss_fn, optimizer=optimizer, scheduler=scheduler)


def copy_of(tree: Any) -> Any:
    """A tree that later training does not change."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copy_of(value) for key, value in tree.items()}
    return [copy_of(value) for value in tree] if isinstance(tree, (list, tuple)) else tree
