"""Tensors that are spread over ranks (DTensor): which part of the whole a rank holds, cut out of it and put back.

FSDP gives each rank rows of every parameter; gradients and moments lie alike. A part is a box: where it begins in the
whole, and its shape. A checkpoint holds such boxes (`Pieces`), and any other division into boxes can be read from them,
copying what is asked for and nothing else. Left out: who moves the parts (sharding.py), and files (shard_files.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(where it begins in the whole, its shape)"""

Part = tuple[tuple[int, ...], Tensor]
"""(where it begins in the whole, the part)"""

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
    find: Callable[[Box], Iterable[Part]]
    """The pieces that may reach into a box of the whole."""

    def cut(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A copy of one box of the whole. ValueError if the pieces do not cover it exactly once."""
        box = torch.empty(shape, dtype=self.dtype)
        filled = sum(_copied(part, box, start) for part in self.find((start, shape))) if box.numel() else 0
        _check_filled(self.shape, filled, box.numel(), start)
        return box

    def whole(self) -> Tensor:
        return self.cut((0,) * len(self.shape), tuple(self.shape))


def _copied(part: Part, box: Tensor, start: tuple[int, ...]) -> int:
    """Copies what a part has of the box that begins at `start`; returns the number of elements."""
    begin, piece = part
    if len(begin) != box.dim() or piece.dim() != box.dim():
        return 0
    low = [max(a, b) for a, b in zip(start, begin)]
    high = [min(a + m, b + n) for a, m, b, n in zip(start, box.shape, begin, piece.shape)]
    if any(a >= b for a, b in zip(low, high)):
        return 0
    target = box[tuple(slice(a - at, b - at) for a, b, at in zip(low, high, start))]
    target.copy_(piece[tuple(slice(a - at, b - at) for a, b, at in zip(low, high, begin))])
    return target.numel()


def _check_filled(shape: torch.Size, filled: int, wanted: int, start: tuple[int, ...]) -> None:
    if filled != wanted:
        raise ValueError(f"a tensor of shape {tuple(shape)} is not whole in the checkpoint: {filled} of {wanted} "
                         f"elements of the part at {start} are there")


def cut(whole: Tensor | Pieces, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """One box of a tensor, as a view, or of pieces, as a copy."""
    if isinstance(whole, Pieces):
        return whole.cut(start, shape)
    return whole[tuple(slice(at, at + size) for at, size in zip(start, shape))]


def part_like(whole: Tensor | Pieces, like: Tensor) -> Tensor:
    """Of the whole tensor, what a rank holds of `like`, copied to its device and in the whole's type: as a DTensor laid
    out as `like` is, or whole where that is a plain tensor."""
    if is_shard(whole):  # laid out so already
        return cast(Tensor, whole).to(like.device, copy=True)
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
    """Copies the whole tensor's values into `target` in place, of a spread one this rank's part. What is spread itself
    lies as `target` does."""
    local(target).copy_(local(whole) if is_shard(whole) else cut(whole, *box_of(target)))


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


_SPREAD = "spread over ranks"
"""Key of what stands in a tree for a tensor whose parts are in others: {_SPREAD: shape, "dtype": name, "rows": each
rank's, or None where the parts do not lie in rows by rank}."""


class Parts(Protocol):
    """Where parts are found (rank_parts.py)."""

    @property
    def ranks(self) -> Sequence[int]:
        """Those that wrote any, in order."""

    def part(self, rank: int, place: str) -> Part | None:
        """What a rank has of the tensor at a place."""

    def all_of(self, rank: int) -> Iterable[tuple[str, Part]]:
        """Everything that a rank has, by place."""

    def reserve(self, num_bytes: int, place: str) -> None:
        """Called before memory for a whole tensor is taken."""


def divided(trees: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the trees with a note in place of each spread tensor, this rank's parts by the tensor's place). A part of which
    several ranks hold a copy is the first one's."""
    parts: dict[str, Any] = {}

    def walk(value: Any, place: str) -> Any:
        if is_shard(value):
            start, shape = box_of(value)
            if math.prod(shape) and _is_first_copy(value):
                parts[place] = {"start": list(start), "part": local(value)}
            return {_SPREAD: list(value.shape), "dtype": str(value.dtype).removeprefix("torch."),
                    "rows": _rows_per_rank(value)}
        return _walked(value, place, walk)

    noted, found = {name: walk(tree, name) for name, tree in trees.items()}, parts
    parts = {}  # `walk` refers to itself and lives until a garbage collection: it must not keep them
    return noted, found


def joined(trees: Mapping[str, Any], parts: Parts, *, whole: bool) -> dict[str, Any]:
    """The inverse of `divided`: `Pieces` in place of the notes, which find parts when they are asked for, or with
    `whole` the tensors, for which one rank's parts are read after the other's. ValueError for what `divided` could not
    have written."""
    notes = {place: note for name, tree in trees.items() for place, note in _notes(tree, name)}
    found: dict[str, Any] = {place: note.pieces(parts, place) for place, note in notes.items()}
    if whole:
        found = {}
        filled = dict.fromkeys(notes, 0)
        for rank in parts.ranks:
            for place, part in parts.all_of(rank):
                if place in notes:
                    if place not in found:
                        parts.reserve(math.prod(notes[place].shape) * notes[place].dtype.itemsize, place)
                        found[place] = torch.empty(notes[place].shape, dtype=notes[place].dtype)
                    filled[place] += _copied(part, found[place], (0,) * len(notes[place].shape))
        for place, note in notes.items():
            _check_filled(note.shape, filled[place], math.prod(note.shape), (0,) * len(note.shape))
            found.setdefault(place, torch.empty(note.shape, dtype=note.dtype))  # one without elements

    def walk(value: Any, place: str) -> Any:
        return found[place] if place in notes else _walked(value, place, walk)

    whole_trees = {name: walk(tree, name) for name, tree in trees.items()}
    found = {}  # as in `divided`
    return whole_trees


class _Note(NamedTuple):
    """What stands for a spread tensor, read."""

    shape: torch.Size
    dtype: torch.dtype
    rows: int | None

    def pieces(self, parts: Parts, place: str) -> Pieces:
        def find(box: Box) -> Iterator[Part]:
            start, shape = box
            ranks: Iterable[int] = parts.ranks
            if self.rows is not None:
                last = (start[0] + shape[0] - 1) // self.rows
                ranks = range(start[0] // self.rows, min(last, max(parts.ranks)) + 1)
            pieces = (parts.part(rank, place) for rank in ranks)
            return (piece for piece in pieces if piece is not None)

        return Pieces(self.shape, self.dtype, find)


def _notes(value: Any, place: str) -> Iterator[tuple[str, _Note]]:
    if isinstance(value, dict) and _SPREAD in value:
        shape, dtype, rows = value[_SPREAD], getattr(torch, str(value.get("dtype")), None), value.get("rows")
        good = (isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**53 for size in shape)
                and isinstance(dtype, torch.dtype)
                and (rows is None or (type(rows) is int and rows > 0 and len(shape) > 0)))
        if not good:
            raise ValueError(f"{place[:80]!a} is {ascii(value)[:200]}, which describes no tensor")
        yield place, _Note(torch.Size(shape), cast(torch.dtype, dtype), rows)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _notes(item, f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _notes(item, f"{place}/{index}")


def _walked(value: Any, place: str, walk: Callable[[Any, str], Any]) -> Any:
    """The value with `walk(item, its place)` for each item of a dict, list or tuple."""
    if isinstance(value, dict):
        return {key: walk(item, f"{place}/{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(walk(item, f"{place}/{index}") for index, item in enumerate(value))
    return value


def _rows_per_rank(tensor: Any) -> int | None:
    """How many rows each of the ranks 0, 1, 2, ... holds, the last ones fewer or none; None for another layout."""
    from torch.distributed.tensor import Shard

    mesh, (*copied, last) = tensor.device_mesh, tensor.placements
    ranks = mesh.mesh.reshape(-1, mesh.size(-1))[0]
    if type(last) is not Shard or last.dim != 0 or any(place.is_shard() or place.is_partial() for place in copied) \
            or not torch.equal(ranks, torch.arange(len(ranks), dtype=ranks.dtype)):
        return None
    return max(1, -(-int(tensor.shape[0]) // len(ranks)))


def _is_first_copy(tensor: Any) -> bool:
    coordinates = tensor.device_mesh.get_coordinate()
    return all(place.is_shard() or not at for place, at in zip(tensor.placements, coordinates))
