"""fsdp-vocab: the output head stays cut over the ranks, each of which scores all ranks' tokens against its own classes.

fsdp gathers a head of V x D numbers on every rank and sums as many gradients. Here each rank keeps its rows of the head
and is sent the others' hidden states instead, n N x D numbers for n ranks of N tokens, and their parts of its own ones'
gradient: less where the vocabulary is larger than the tokens of all ranks, and no rank ever holds the head, its
gradient or a logit of another's classes. The softmax over all classes is vocab_parallel's. Left out: tied heads
(looking tokens up needs all rows), and losses of the user's own.

Legend: n ranks, N rows (tokens) of the rank that has the most, D hidden size, V classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import GATHER
from .dealing import BLANK, is_blank
from .distributed import Team
from .heads import linear_head
from .losses import IGNORE, hidden_states, split_batch
from .utils import unwrap
from .vocab_parallel import linear_cross_entropy


class ShardedHead:
    """The head of one model, its rows divided over a mesh; `parameters` are what fully_shard must leave alone.

    Raises:
        ValueError: the model has no linear head that the loss can be computed from, or it is tied to another module.
    """

    def __init__(self, team: Team, model: nn.Module, mesh: Any) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        head, reason = linear_head(model)
        if head is None:
            raise ValueError(f"parallel='fsdp-vocab' divides the head's classes, and {reason}; use parallel='fsdp'")
        owned = {id(p) for p in head.module.parameters(recurse=False)}
        shared = [name for name, module in unwrap(model).named_modules() if module is not head.module
                  and any(id(p) in owned for p in module.parameters(recurse=False))]
        if shared or isinstance(head.module, nn.Embedding):
            raise ValueError("parallel='fsdp-vocab' divides the head's classes, and the head is tied to "
                             f"{(shared or ['the embedding'])[0]!r}, which needs all of them; untie it (GPTConfig("
                             "tie_embeddings=False)), or use parallel='fsdp'")
        self._team, self._head, self._group = team, head, mesh.get_group()
        for name, p in list(head.module.named_parameters(recurse=False)):
            part = distribute_tensor(p.detach(), mesh, [Shard(0)])
            head.module.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
        self.parameters = set(head.module.parameters(recurse=False))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(loss_sum, num_targets) of this rank's batch as `losses.batch_loss` gives them, but that the loss of all
        ranks is divided evenly: the sum over ranks, and each gradient, are the same. Every rank calls it together."""
        head, ranks = self._head, self._team.world_size
        parts = split_batch(batch[BLANK] if is_blank(batch) else batch)
        targets = parts.targets.reshape(-1)
        if is_blank(batch):
            targets = torch.full_like(targets, IGNORE)
        hidden = head.scaled(hidden_states(model, head, parts))
        rows = int(self._team.agree([targets.numel()])[0])
        missing = rows - targets.numel()
        hidden = _Gathered.apply(F.pad(hidden, (0, 0, 0, missing)), self)  # type: ignore[no-untyped-call]  # (n N, D)
        targets_of_all = self.gathered(F.pad(targets, (0, missing), value=IGNORE))
        total = linear_cross_entropy(hidden, head.weight, targets_of_all, bias=head.bias, ignore_index=IGNORE,
                                     softcap=head.softcap, reduction="sum", hidden_grad="own").float()
        # A rank's share in value; in gradient the whole, for no other rank has that of these classes and tokens.
        return total - total.detach() * (1 - 1 / ranks), (targets != IGNORE).sum()

    def gathered(self, mine: Tensor) -> Tensor:
        """(N, ...) of each rank -> (n N, ...) of all, in the order of the ranks."""
        every = mine.new_empty((self._team.world_size * mine.size(0), *mine.shape[1:]))
        self._team.bytes += every.nbytes
        with self._team.calling("gathering hidden states"):
            GATHER(every, mine.contiguous(), group=self._group)
        return every

    def mine(self, every: Tensor) -> Tensor:
        """This rank's part of what `gathered` gave."""
        return every.chunk(self._team.world_size)[self._team.rank]

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the head's module has all rows, without gradients; every rank calls it."""
        module = self._head.module
        parts = dict(module.named_parameters(recurse=False))
        for name, part in parts.items():
            with self._team.calling("gathering parameters"):
                full = part.full_tensor()  # type: ignore[attr-defined]
            module.register_parameter(name, nn.Parameter(full, requires_grad=False))
        try:
            yield
        finally:
            for name, part in parts.items():
                module.register_parameter(name, part)


class _Gathered(torch.autograd.Function):
    """All ranks' rows; the gradient that comes back has this rank's, summed over the ranks (see vocab_parallel)."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, head: ShardedHead) -> Tensor:
        ctx.head = head
        return head.gathered(mine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.head.mine(grads[0]), None
