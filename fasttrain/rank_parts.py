"""The parts of spread tensors that single ranks wrote: looked up in their files when they are asked for.

A rank that resumes needs its own rows: of thousands of files it opens the one or few that hold them. Kept in memory are
each opened file's places, packed, and no descriptor: a run of thousands of ranks has more files than a process may
have open. Left out: what a part is (shards.py), and the files' form (treefiles.py).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .manifest import TreeEntry, is_rank_tree, tensor_file, tree_of_rank
from .shards import Part
from .storage import open_directory, open_regular
from .tensorfile import TensorSpec, map_tensor
from .treefiles import naming_file, read_specs, read_structure, read_tree
from .trees import ReadBudget, unflatten_tree

_Places = Mapping[str, tuple[int, TensorSpec]]
"""By the tensor's place: (index of its first number in `starts`, where its bytes lie)."""


@dataclass(frozen=True)
class _Opened:
    """One rank's file, as it was when it was read. Ranks whose parts have the same shapes share `places`."""

    identity: tuple[int, ...]
    places: _Places
    starts: array[int]


class RankParts:
    """The parts in the trees of ranks of one checkpoint.

    Args:
        path: the checkpoint's directory.
        trees: the entries of its manifest.
        budget: what reading may take; what is read and dropped again is given back.
        hashed: False trusts that others have verified the tensors' bytes.
    """

    def __init__(self, path: Path, trees: Mapping[str, TreeEntry], budget: ReadBudget, *, hashed: bool) -> None:
        self.ranks: Sequence[int] = sorted(int(name.rpartition("_")[2]) for name in trees if is_rank_tree(name))
        """Those that wrote a tree."""
        self._path, self._trees, self._budget, self._hashed = path, trees, budget, hashed
        self._room = ReadBudget(budget.left)  # for the tensors themselves, which the files hold, too
        self._opened: dict[int, _Opened] = {}
        self._shared: dict[tuple[tuple[str, TensorSpec], ...], _Places] = {}

    def part(self, rank: int, place: str) -> Part | None:
        """What a rank wrote of the tensor at `place`, mapped from its file; None if it has nothing of it. ValueError or
        OSError names the file."""
        if tree_of_rank(rank) not in self._trees:
            return None
        opened = self.open(rank)
        if place not in opened.places:
            return None
        index, spec = opened.places[place]
        file = tensor_file(tree_of_rank(rank))
        with open_directory(self._path, follow=True) as directory, naming_file(file), \
                open_regular(directory, file) as descriptor:
            if _identity(descriptor) != opened.identity:
                raise ValueError("it was replaced while it was read")
            tensor = map_tensor(descriptor, place, spec, self._budget)
        return tuple(opened.starts[index:index + tensor.dim()]), tensor

    def open(self, rank: int) -> _Opened:
        """Reads, once, what a rank's file holds, and verifies it."""
        if rank in self._opened:
            return self._opened[rank]
        name, passing = tree_of_rank(rank), ReadBudget(self._budget.left)
        entry = self._trees[name]
        with open_directory(self._path, follow=True) as directory:
            structure, listed = read_structure(directory, name, entry, passing)
            if entry.tensor_file is None:
                return self._keep(rank, _Opened((), {}, array("q")))
            file = tensor_file(name)
            with naming_file(file), open_regular(directory, file) as descriptor:
                specs = read_specs(descriptor, entry.tensor_file, listed, passing, hashed=self._hashed)
                identity = _identity(descriptor)
        starts: array[int] = array("q")
        places: dict[str, tuple[int, TensorSpec]] = {}
        for place, (start, reference) in _parts_in(structure, name, dict).items():
            key = reference.get("$tensor")
            if key not in specs or len(specs[key].shape) != len(start):
                raise ValueError(f"{name}: the part of {place[:80]!a} is not in its file, or of other dimensions")
            places[place] = len(starts), specs[key]
            starts.extend(start)
        together = tuple((place, spec) for place, (_, spec) in places.items())
        return self._keep(rank, _Opened(identity, self._shared.setdefault(together, places), starts))

    def all_of(self, rank: int) -> Iterator[tuple[str, Part]]:
        """(place, part) of everything that a rank wrote, verified before the first one and mapped together."""
        name = tree_of_rank(rank)
        with open_directory(self._path, follow=True) as directory:
            tree = read_tree(directory, name, self._trees[name], ReadBudget(self._budget.left), hashed=self._hashed)
        for place, (start, part) in _parts_in(tree, name, Tensor).items():
            yield place, (tuple(start), part)

    def rest_of(self, rank: int) -> dict[str, Any]:
        """What a rank wrote beside its parts (the state of its generators), without mapping these."""
        name, passing = tree_of_rank(rank), ReadBudget(self._budget.left)
        entry = self._trees[name]
        with open_directory(self._path, follow=True) as directory:
            structure, listed = read_structure(directory, name, entry, passing)
            in_parts = {part.get("$tensor") for _, part in _parts_in(structure, name, dict).values()}
            rest, tensors = {key: value for key, value in structure.items() if key != "parts"}, {}
            if entry.tensor_file is not None:
                file = tensor_file(name)
                with naming_file(file), open_regular(directory, file) as descriptor:
                    specs = read_specs(descriptor, entry.tensor_file, listed, passing, hashed=self._hashed)
                    tensors = {key: map_tensor(descriptor, key, spec, passing) for key, spec in specs.items()
                               if key not in in_parts}
        tree: dict[str, Any] = unflatten_tree(rest, tensors, name)
        return tree

    def reserve(self, num_bytes: int, place: str) -> None:
        """Before memory is taken for a whole tensor: ValueError where the checkpoint is too small to hold that."""
        self._room.take(num_bytes, f"tensor {place!r}")

    def _keep(self, rank: int, opened: _Opened) -> _Opened:
        self._budget.take(opened.starts.itemsize * len(opened.starts) + 512, tree_of_rank(rank))
        self._opened[rank] = opened
        return opened


def _parts_in(tree: Any, name: str, kind: type) -> dict[str, tuple[list[int], Any]]:
    """place -> (where it begins in the whole, the part), from {"parts": {place: {"start": ..., "part": ...}}}; a part
    is a tensor, or in plain data a reference to one."""
    found = {}
    parts = tree.get("parts") if isinstance(tree, dict) else None
    if not isinstance(parts, dict):
        raise ValueError(f"{name}: it holds no table of parts")
    for place, part in parts.items():
        start, content = (part.get("start"), part.get("part")) if isinstance(part, dict) else (None, None)
        if not isinstance(start, list) or not all(type(at) is int and 0 <= at < 2**63 for at in start) \
                or not isinstance(content, kind):
            raise ValueError(f"{name}: {str(place)[:80]!a} is no part of a tensor")
        found[str(place)] = start, content
    return found


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
