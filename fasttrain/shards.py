"""Tensors that are spread over ranks (DTensor): which part of the whole a rank holds, cut out of it and put back.

FSDP gives each rank rows of every parameter; gradients and moments lie alike. A part is a box: where it begins in the
whole, and its shape. A checkpoint holds such boxes (`Pieces`), and any other division into boxes can be read from them,
copying what is asked for and nothing else. Left out: who moves the parts (sharding.py), and files (shard_files.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(where it begins in the whole, its shape)"""

# torch.distributed.tensor takes a second to import: only who has such tensors has it.


def is_shard(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, getattr(module, "DTensor", ()))


def local(tensor: Any) -> Tensor:
    """This rank's part, sharing its memory; a plain tensor as it is."""
    return cast(Tensor, tensor.to_local() if is_shard(tensor) else tensor)


def box_of(tensor: Any) -> Box:
    """(where this rank's part begins in the whole, its shape); of a plain tensor, all of it."""
    if not is_shard(tensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    start = tuple(at if size else 0 for at, size in zip(start, shape)) if math.prod(shape) else (0,) * len(shape)
    return start, tuple(shape)


@dataclass(frozen=True)
class Pieces:
    """A tensor that lies in pieces, such as the parts that the ranks of another run wrote."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: Sequence[tuple[tuple[int, ...], Tensor]]
    """(where it begins in the whole, the piece)"""

    def cut(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A copy of one box of the whole. ValueError if the pieces do not cover it exactly once."""
        box = torch.empty(shape, dtype=self.dtype)
        filled = 0
        for begin, piece in self.pieces:
            low = [max(a, b) for a, b in zip(start, begin)]
            high = [min(a + m, b + n) for a, m, b, n in zip(start, shape, begin, piece.shape)]
            if all(a < b for a, b in zip(low, high)):
                target = box[tuple(slice(a - at, b - at) for a, b, at in zip(low, high, start))]
                target.copy_(piece[tuple(slice(a - at, b - at) for a, b, at in zip(low, high, begin))])
                filled += target.numel()
        if filled != box.numel():
            raise ValueError(f"a tensor of shape {tuple(self.shape)} is not whole in the checkpoint: {filled} of "
                             f"{box.numel()} elements of the part at {start} are there")
        return box

    def whole(self) -> Tensor:
        return self.cut((0,) * len(self.shape), tuple(self.shape))


def cut(whole: Tensor | Pieces, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """One box of a tensor, as a view, or of pieces, as a copy."""
    if isinstance(whole, Pieces):
        return whole.cut(start, shape)
    return whole[tuple(slice(at, at + size) for at, size in zip(start, shape))]


def part_like(whole: Tensor | Pieces, like: Tensor) -> Tensor:
    """Of the whole tensor, what a rank holds of `like`, copied to its device and in the whole's type: as a DTensor laid
    out as `like` is, or whole where that is a plain tensor."""
    part = cut(whole, *box_of(like)).to(like.device, copy=True).contiguous()
    return spread_like(part, like) if is_shard(like) else part


def spread_like(part: Tensor, like: Any) -> Tensor:
    """The DTensor whose part on this rank is `part`, laid out as `like` is."""
    from torch.distributed.tensor import DTensor

    return cast(Tensor, DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape,
                                           stride=like.stride()))


def first_element(tensor: Tensor) -> int:
    """Index of the first element of this rank's part in the whole, row-major (parts are rows)."""
    start, _ = box_of(tensor)
    return start[0] * math.prod(tensor.shape[1:]) if start else 0


@torch.no_grad()
def overwrite(target: Tensor, whole: Tensor | Pieces) -> None:
    """Copies the whole tensor's values into `target` in place, of a spread one this rank's part."""
    local(target).copy_(cut(whole, *box_of(target)))


@torch.no_grad()
def exchange(one: Tensor, other: Tensor) -> None:
    """Swaps the contents of two tensors laid out alike, in place: FSDP keeps addresses of a parameter's memory."""
    here, there = local(one), local(other)
    kept = here.clone()
    here.copy_(there)
    there.copy_(kept)


def gathered(tree: Any, keep: bool) -> Any:
    """The tree with every spread tensor made whole, one at a time; every rank must call it. With `keep` False they are
    dropped at once, and an empty tensor stands in their place."""
    if is_shard(tree):
        whole = tree.full_tensor()
        return whole.cpu() if keep else torch.empty(0, dtype=whole.dtype)
    if isinstance(tree, dict):
        return {key: gathered(value, keep) for key, value in tree.items()}
    return type(tree)(gathered(value, keep) for value in tree) if isinstance(tree, (list, tuple)) else tree


def whole_tensors(tree: Any) -> Any:
    """The tree with its `Pieces` put together."""
    if isinstance(tree, Pieces):
        return tree.whole()
    if isinstance(tree, dict):
        return {key: whole_tensors(value) for key, value in tree.items()}
    return type(tree)(map(whole_tensors, tree)) if isinstance(tree, (list, tuple)) else tree


_SPREAD = "spread over ranks"
"""Key of what stands in a tree for a tensor whose parts are in others: {_SPREAD: shape, "dtype": name}."""


def divided(trees: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the trees with a note in place of each spread tensor, this rank's parts by the tensor's place). A part of which
    several ranks hold a copy is the first one's."""
    parts: dict[str, Any] = {}

    def walk(value: Any, place: str) -> Any:
        if is_shard(value):
            start, shape = box_of(value)
            if math.prod(shape) and _is_first_copy(value):
                parts[place] = {"start": list(start), "part": local(value)}
            return {_SPREAD: list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, dict):
            return {key: walk(item, f"{place}/{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item, f"{place}/{index}") for index, item in enumerate(value))
        return value

    return {name: walk(tree, name) for name, tree in trees.items()}, parts


def joined(trees: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], *, whole: bool) -> dict[str, Any]:
    """The inverse of `divided`, from all ranks' parts: `Pieces` in place of the notes, or with `whole` the tensors."""
    def walk(value: Any, place: str) -> Any:
        if isinstance(value, dict) and _SPREAD in value:
            own = [(tuple(part[place]["start"]), part[place]["part"]) for part in parts if place in part]
            found = Pieces(torch.Size(value[_SPREAD]), getattr(torch, value["dtype"]), own)
            return found.whole() if whole else found
        if isinstance(value, dict):
            return {key: walk(item, f"{place}/{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item, f"{place}/{index}") for index, item in enumerate(value))
        return value

    return {name: walk(tree, name) for name, tree in trees.items()}


def _is_first_copy(tensor: Any) -> bool:
    coordinates = tensor.device_mesh.get_coordinate()
    return all(place.is_shard() or not at for place, at in zip(tensor.placements, coordinates))
