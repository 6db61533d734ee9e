"""Which classes each rank holds, agreed on by all of them before anything else is sent.

Ranks that disagree about a shape wait for each other until the timeout, and ranks whose shards overlap train on a wrong
softmax without an error. So the first call of each kind gathers what every rank was given (a few numbers), and each of
them raises the same clear error. Later calls of that kind send nothing for it; a fingerprint of the targets rides along
with the sums of the loss.

Legend: N rows (tokens), D hidden size, V classes, S classes of this rank's shard.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .ops._dispatch import Impl, resolve
from .ops._linear_chunks import rows_per_chunk
from .ops.cross_entropy import Reduction, Terms, check_terms, raise_if_target_out_of_range
from .ops.linear_cross_entropy import _compute_dtype
from .utils import on_host

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")
_FINGERPRINT_BITS = 20  # its square, summed over thousands of ranks, is exact in float64


HiddenGrad = Literal["all", "own"]
"""Which rows of hidden's gradient a rank gets."""
_HIDDEN_GRADS = ("all", "own")


@dataclass(frozen=True)
class Shards:
    """This rank's part of the vocabulary, and how a call is computed."""

    group: dist.ProcessGroup
    num_ranks: int
    start: int
    size: int
    largest: int
    """Classes of the largest shard."""
    total: int
    """V."""
    terms: Terms
    impl: str
    compute: torch.dtype
    """Of the matrix products."""
    wide: torch.dtype
    """Of losses and sums."""
    hidden_grad: HiddenGrad = "all"

    def rows_per_chunk(self, count: int, device: torch.device) -> int:
        """Rows whose logits fit the workspace of the rank with the largest shard."""
        return rows_per_chunk(count, self.largest, self.compute.itemsize, device.type)

    def mismatch(self, sums: Tensor, mark: Tensor) -> Tensor:
        """Whether the ranks have other targets, () bool: `mark` is this rank's `fingerprint`, `sums` that of all ranks.

        Raises:
            ValueError: if so, where looking does not stall the device.
        """
        # One value is the mean, and its square the mean of the squares, only where all ranks have that value.
        differ = (sums != mark * self.num_ranks).any()
        if on_host(sums.device) and bool(differ):
            raise ValueError(f"the {self.num_ranks} ranks of the group were given different targets; every rank that "
                             f"holds a part of the vocabulary must see the same tokens{_WHICH_GROUP}")
        return differ


def fingerprint(targets: Tensor) -> Tensor:
    """(2,) float64: a hash of 20 bits and its square."""
    position = torch.arange(1, targets.numel() + 1, device=targets.device)
    mixed = ((targets.long() + 0x9E3779B1) * (position * 0x85EBCA6B + 0xC2B2AE35)).sum()
    hashed = ((mixed ^ (mixed >> 29)) & ((1 << _FINGERPRINT_BITS) - 1)).double()
    return torch.stack((hashed, hashed.square()))


def agree(group: dist.ProcessGroup, tensors: Mapping[str, Tensor], options: tuple[int, float, float, float | None],
          reduction: Reduction, impl: Impl, vocab_start: int | None, vocab_size: int | None,
          hidden_grad: HiddenGrad = "all") -> Shards:
    """The vocabulary's division over `group` and this rank's place in it; gathered once for each kind of call.

    Args:
        tensors: `targets` (N,), and `logits` (N, S) or `hidden` (N, D), `weight` (S, D) and perhaps `bias` (S,).
        options: ignore_index, label_smoothing, z_loss, softcap.
        vocab_start, vocab_size: as in `vocab_parallel.cross_entropy`.
        hidden_grad: as in `vocab_parallel.linear_cross_entropy`.

    Raises:
        ValueError: this rank's arguments, or another rank's, or both together.
        IndexError: a target out of range (CPU).
    """
    known, targets = _AGREED.setdefault(group, {}), tensors["targets"]
    try:
        check_terms(*options[1:], reduction)
        _check_tensors(tensors)
        _check_division(hidden_grad, targets.numel(), dist.get_world_size(group))
        chosen = _resolve(impl, tensors)
        if vocab_start is not None and vocab_start < 0:
            raise ValueError(f"vocab_start is {vocab_start}; it must not be negative, or None for shards in rank order")
    except ValueError:
        if not known:  # the others are at their first call too, and wait for this rank's description
            _gather(torch.zeros(len(_FIELDS), dtype=torch.float64, device=targets.device), group)
        raise
    terms = Terms(options[0], float(options[1]), float(options[2]), float(options[3] or 0.0))
    row = _describe(tensors, terms, reduction, vocab_start, vocab_size, hidden_grad)
    # Of what all ranks have in common alone: or one rank would know its call and another ask for a gathering.
    kind = (chosen, targets.device, *row[_OWN:])
    if kind not in known:
        known[kind] = row[:_OWN], _divide(row, group, terms, targets, chosen, hidden_grad)
    before, shards = known[kind]
    if before != row[:_OWN]:
        raise ValueError(f"this rank held {int(before[2])} classes (vocab_start {int(before[1])}) in an earlier call "
                         f"over this group and now {int(row[2])} (vocab_start {int(row[1])}; -1 is None); where one "
                         "group holds several vocabularies, pass vocab_size")
    if targets.device.type == "cpu":
        raise_if_target_out_of_range(targets, shards.total, terms.ignore_index)
    return shards


_AGREED: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Any, tuple[list[float], Shards]]] = (
    weakref.WeakKeyDictionary())

_FIELDS = ("valid", "vocab_start", "shard size", "vocab_size", "hidden size", "input type", "weight type",
           "type of the products", "ignore_index", "label_smoothing", "z_loss", "softcap", "reduction",
           "whether a gradient is wanted", "which rows of hidden's gradient", "number of rows",
           "fingerprint of the targets")
_OWN = 3
"""So many first fields may differ from rank to rank."""

_WHICH_GROUP = " (is this the data-parallel group?)"


def _describe(tensors: Mapping[str, Tensor], terms: Terms, reduction: Reduction, vocab_start: int | None,
              vocab_size: int | None, hidden_grad: HiddenGrad) -> list[float]:
    """One number for each of _FIELDS but the last two; looks at no device."""
    weight, first = tensors.get("weight"), tensors["logits" if "logits" in tensors else "hidden"]
    wants = torch.is_grad_enabled() and first.requires_grad and weight is not None  # it is sent
    size = first.size(1) if weight is None else weight.size(0)
    products = first.dtype if weight is None else _compute_dtype(first, weight)
    return [1, -1 if vocab_start is None else vocab_start, size, -1 if vocab_size is None else vocab_size,
            first.size(1) if weight is not None else 0,
            _DTYPES.index(first.dtype), -1 if weight is None else _DTYPES.index(weight.dtype), _DTYPES.index(products),
            *terms, _REDUCTIONS.index(reduction), wants, _HIDDEN_GRADS.index(hidden_grad)]


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuses wrong shapes, types and devices, naming the argument."""
    targets, weight, bias = tensors["targets"], tensors.get("weight"), tensors.get("bias")
    name, letter = ("logits", "S") if "logits" in tensors else ("hidden", "D")
    first = tensors[name]
    if first.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(first.shape)}; it must be (N, {letter}): flatten with "
                         f"{name}.view(-1, {name}.size(-1))")
    if targets.shape != first.shape[:1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; they must be (N,) = ({first.size(0)},), one per "
                         f"row of {name}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets are {targets.dtype}; they must be class ids in int64 (or int32)")
    if weight is not None and (weight.dim() != 2 or weight.size(1) != first.size(1)):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (S, D) with D = {first.size(1)}, "
                         "hidden's last dimension")
    if bias is not None and weight is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be (S,) = ({weight.size(0)},), one per row of "
                         "this rank's weight")
    for name, tensor in tensors.items():
        if name != "targets" and tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
        if tensor.device != targets.device:
            raise ValueError(f"{name} is on {tensor.device} and targets on {targets.device}; all must be on one device")


def _check_division(hidden_grad: str, num_rows: int, num_ranks: int) -> None:
    if hidden_grad not in _HIDDEN_GRADS:
        raise ValueError(f"hidden_grad is {hidden_grad!r}; it must be 'all' or 'own'")
    if hidden_grad == "own" and num_rows % num_ranks:
        raise ValueError(f"hidden has {num_rows} rows, which {num_ranks} ranks cannot own evenly; pad each rank's to "
                         "one length before they are gathered, or use hidden_grad='all'")


def _resolve(impl: Impl, tensors: Mapping[str, Tensor]) -> str:
    """`impl` made definite; the Triton kernels compute in float32, so `auto` takes the reference for float64."""
    chosen = resolve("cross_entropy", impl, tensors["targets"])
    doubles = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    return "reference" if chosen == "triton" and impl == "auto" and doubles else chosen


def _divide(row: list[float], group: dist.ProcessGroup, terms: Terms, targets: Tensor, impl: str,
            hidden_grad: HiddenGrad) -> Shards:
    """Every rank's description, compared; the same ValueError on all ranks where they do not fit together."""
    mine = torch.tensor([*row, targets.numel(), float(fingerprint(targets)[0])], dtype=torch.float64)
    rows = _gather(mine.to(targets.device), group)
    for rank, theirs in enumerate(rows):
        if not theirs[0]:
            raise ValueError(f"rank {rank} of the group refused its arguments; its own error says why")
    for rank, theirs in enumerate(rows):
        for field, (first, other) in enumerate(zip(rows[0], theirs)):
            if field >= _OWN and first != other:
                raise ValueError(f"{_FIELDS[field]}: rank {rank} of the group has {_named(field, other)} and rank 0 "
                                 f"{_named(field, first)}; the ranks must agree in everything but their "
                                 f"shards{_WHICH_GROUP}")
    starts, sizes = [int(theirs[1]) for theirs in rows], [int(theirs[2]) for theirs in rows]
    if max(starts) < 0:
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    check_tiling(starts, sizes)
    if rows[0][_OWN] not in (-1, sum(sizes)):
        raise ValueError(f"vocab_size is {int(rows[0][_OWN])}, and the shards of the {len(rows)} ranks hold "
                         f"{sum(sizes)} classes together")
    here = dist.get_rank(group)
    compute = _DTYPES[int(row[_FIELDS.index("type of the products")])]
    wide = torch.float64 if compute == torch.float64 else torch.float32
    return Shards(group, len(rows), starts[here], sizes[here], max(sizes), sum(sizes), terms, impl, compute, wide,
                  hidden_grad)


def check_tiling(starts: Sequence[int], sizes: Sequence[int]) -> None:
    """Refuses shards [start, start + size) that are not all classes from 0 on, each once."""
    if min(starts) < 0:
        raise ValueError(f"vocab_start was given on some ranks only (rank {list(starts).index(min(starts))} has none); "
                         "give it on all of them, or on none for shards in rank order")
    if not sum(sizes):
        raise ValueError("no rank holds a class; there must be at least one")
    end, last = 0, None
    for start, size, rank in sorted(zip(starts, sizes, range(len(sizes)))):
        if not size:
            continue
        shard = f"rank {rank} holds classes [{start}, {start + size})"
        if start < end:
            raise ValueError(f"{shard} and rank {last} those before {end}: the shards overlap; vocab_start must be the "
                             "number of classes that all earlier shards hold together")
        if start > end:
            raise ValueError(f"{shard}, and no rank holds [{end}, {start}): the shards leave a hole; vocab_start must "
                             "be the number of classes that all earlier shards hold together")
        end, last = start + size, rank


def _named(field: int, value: float) -> str:
    name = _FIELDS[field]
    if "type" in name:
        return "none" if value < 0 else str(_DTYPES[int(value)])
    if "which rows" in name:
        return repr(_HIDDEN_GRADS[int(value)])
    if name == "reduction":
        return repr(_REDUCTIONS[int(value)])
    return f"{value:g}" if value != int(value) else str(int(value))


def _gather(row: Tensor, group: dist.ProcessGroup) -> list[list[float]]:
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    return [theirs.tolist() for theirs in rows]


def local_parts(group: dist.ProcessGroup | None, dim: int, sharded: Mapping[str, Tensor],
                replicated: Mapping[str, Tensor]) -> tuple[dist.ProcessGroup, dict[str, Tensor], int | None]:
    """The group that the vocabulary is divided over, this rank's plain tensors, and V, from DTensors where there are
    any; V is None where there are none.

    Args:
        dim: the dimension of the sharded tensors that counts classes.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("there is no process group; start the script with torchrun and call "
                         "torch.distributed.init_process_group() first")
    from torch.distributed.tensor import DTensor, Replicate, Shard  # half a second, and only here

    local, total = {**sharded, **replicated}, None
    for name, tensor in sharded.items():
        if not isinstance(tensor, DTensor):
            continue
        cut = [d for d, placement in enumerate(tensor.placements) if placement == Shard(dim)]
        if len(cut) != 1 or any(p != Replicate() for d, p in enumerate(tensor.placements) if d not in cut):
            raise ValueError(f"{name} is placed as {tensor.placements}; it must be Shard({dim}) over one dimension of "
                             "the mesh and Replicate() over the others")
        its_group = tensor.device_mesh.get_group(cut[0])
        if group is not None and group != its_group:
            raise ValueError(f"group is not the one that {name} is divided over; leave it out, or pass plain tensors")
        group, local[name], total = its_group, tensor.to_local(), tensor.size(dim)
    for name, whole in replicated.items():
        if isinstance(whole, DTensor):
            if any(placement != Replicate() for placement in whole.placements):
                raise ValueError(f"{name} is placed as {whole.placements}; every rank needs all of it: Replicate()")
            local[name] = whole.to_local(grad_placements=list(whole.placements))
    return group if group is not None else dist.distributed_c10d._get_default_group(), local, total
