"""One tree's two files in a checkpoint directory: written and hashed in one pass, verified and mapped in another.

`<name>.json` holds the plain data with a reference where a tensor stands, `<name>.safetensors` the tensors. What each
tensor is stands in the manifest, and for the tree of a single rank in its JSON, which is then written last.
Deliberately left out: when a checkpoint counts as complete, and which to use (checkpointing.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fasttrain.manifest import (
    FileEntry,
    TensorEntry,
    TreeEntry,
    is_rank_tree,
    structure_file,
    tensor_file,
    tensors_from_json,
    tensors_to_json,
)
from fasttrain.storage import CHUNK, checksum, checksum_range, hash_range, open_regular, read_all, write_file
from fasttrain.tensorfile import (
    TENSOR_BYTES,
    TensorSpec,
    header_length,
    layout,
    map_tensor,
    map_tensors,
    parse_header,
    tensor_bytes,
)
from fasttrain.trees import JSON, MAX_JSON_BYTES, ReadBudget, Tree, dump_json, parse_json, unflatten_tree

PARALLEL_BYTES = 8 * 2**20

_NOTHING = torch.empty(0)


def write_trees(directory: int, trees: Mapping[str, tuple[bytes, Mapping[str, Tensor]]]) -> dict[str, TreeEntry]:
    """Writes and fsyncs the files of each tree in `directory`; returns their entries for the manifest.

    From `PARALLEL_BYTES` on, all tensor files are hashed at once, each on a core, as one hashes slower than a disk
    writes; they are written one after the other, so that the largest, which comes first, is never hashed late.
    The small files go before: an fsync beside a large file in the making waits for that file's blocks, too.
    """
    structures = {name: FileEntry(*write_file(directory, structure_file(name), [text]))
                  for name, (text, _) in trees.items() if not is_rank_tree(name)}
    sizes = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, (_, tensors) in trees.items() if tensors}
    tables: dict[str, tuple[FileEntry, dict[str, TensorEntry]]] = {}
    errors: list[BaseException] = []
    turn = threading.Lock()

    def write(name: str) -> None:
        try:
            tables[name] = write_tensors(directory, name, trees[name][1], turn)
        except BaseException as error:  # not swallowed: raised below
            errors.append(error)

    if sum(sizes.values()) < PARALLEL_BYTES or len(sizes) == 1:
        tables = {name: write_tensors(directory, name, trees[name][1]) for name in sizes}
    else:
        # Daemons, and no executor: a process that is told to leave at once must not wait for them.
        threads = [threading.Thread(target=write, args=(name,), name=f"fasttrain-write-{name}", daemon=True)
                   for name in sorted(sizes, key=lambda name: -sizes[name])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    entries = {}
    for name, (text, _) in trees.items():
        file, tensors = tables.get(name, (None, {}))
        if is_rank_tree(name):
            written = write_file(directory, structure_file(name), [with_listing(text, tensors)])
            entries[name] = TreeEntry(FileEntry(*written), file, None)
        else:
            entries[name] = TreeEntry(structures[name], file, tensors)
    return entries


def with_listing(text: bytes, tensors: Mapping[str, TensorEntry]) -> bytes:
    """A tree's JSON together with the list of its tensors."""
    return b'{"tensors":%s,"tree":%s}' % (dump_json(tensors_to_json(tensors)), text)


def write_tensors(directory: int, name: str, tensors: Mapping[str, Tensor],
                  turn: AbstractContextManager[object] | None = None) -> tuple[FileEntry, dict[str, TensorEntry]]:
    """Writes and fsyncs the tensor file of tree `name`; returns its entry and that of each tensor.

    The file's SHA-256 is what loading checks (and `sha256sum` prints). Each tensor's checksum only tells which one is
    damaged, or differs from another checkpoint's (manifest.py says why it is no second SHA-256).
    """
    header, specs = layout(tensors, name)
    entries: dict[str, TensorEntry] = {}

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for key, spec in specs.items():  # one tensor at a time: a copy to the CPU lives no longer than its write
            view, total = tensor_bytes(tensors[key]), 0
            for start in range(0, len(view), CHUNK):
                chunk = view[start:start + CHUNK]
                yield chunk
                total += checksum(chunk)  # of bytes that writing has just brought into the cache
            entries[key] = TensorEntry(spec.dtype, spec.shape, f"{total % 2**64:016x}")

    return FileEntry(*write_file(directory, tensor_file(name), pieces(), turn)), entries


def take_tree(budget: ReadBudget, name: str, text: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Takes from `budget` what `read_tree` would: a tree that could not be read back raises ValueError."""
    header, specs = layout(tensors, f"tree {name!r}")
    if is_rank_tree(name):
        text = with_listing(text, {key: TensorEntry(spec.dtype, spec.shape, "0" * 16) for key, spec in specs.items()})
    parse_json(text, f"tree {name!r}", budget=budget, trees=1)
    budget.take_text(header[8:], f"tree {name!r}: header")
    budget.take(len(specs) * TENSOR_BYTES, f"tree {name!r}")


def read_tree(directory: int, name: str, entry: TreeEntry, budget: ReadBudget, *, hashed: bool = True) -> Tree:
    """The tree `name` once its files are those that `entry` describes; ValueError or OSError says which is not.

    Hashing, header and mapping use one descriptor, so the file that was verified is the file that is used. Without
    `hashed` the tensors' bytes are not read: for a rank, once another has verified them.
    """
    structure, listed = read_structure(directory, name, entry, budget)
    if entry.tensor_file is None:
        return unflatten_tree(structure, {}, name)
    file = tensor_file(name)
    with naming_file(file), open_regular(directory, file) as descriptor:
        specs = read_specs(descriptor, entry.tensor_file, listed, budget, hashed=hashed)
        tensors = dict(map_tensors(descriptor, specs, budget))
    return unflatten_tree(structure, tensors, name)


def verify_tree(directory: int, name: str, entry: TreeEntry, budget: ReadBudget, *, from_disk: bool = False) -> None:
    """Raises what `read_tree` would, without a mapping of more than one tensor. With `from_disk` the kernel is asked to
    forget its copy of the file first."""
    structure, listed = read_structure(directory, name, entry, budget)
    stands: dict[str, Tensor] = {}
    if entry.tensor_file is not None:
        file = tensor_file(name)
        with naming_file(file), open_regular(directory, file) as descriptor:
            specs = read_specs(descriptor, entry.tensor_file, listed, budget, from_disk=from_disk)
            stands = {key: map_tensor(descriptor, key, spec, budget) if spec.dtype == "BOOL" else _NOTHING
                      for key, spec in specs.items()}
    unflatten_tree(structure, stands, name)


def read_structure(directory: int, name: str, entry: TreeEntry, budget: ReadBudget) -> tuple[
        JSON, Mapping[str, TensorEntry]]:
    """(a tree's plain data, what its tensors are), always verified."""
    file = structure_file(name)
    with naming_file(file), open_regular(directory, file) as descriptor:
        _check_size(descriptor, entry.structure)
        text = read_all(descriptor, MAX_JSON_BYTES)
        if hashlib.sha256(text).hexdigest() != entry.structure.sha256:
            raise ValueError("its SHA-256 is not the manifest's")
    structure = parse_json(text, file, budget=budget, trees=1)
    if entry.tensors is not None:
        return structure, entry.tensors
    with naming_file(file):
        if not isinstance(structure, dict) or set(structure) != {"tensors", "tree"}:
            raise ValueError("it is not a table of tensors and a tree")
        return structure["tree"], tensors_from_json(structure["tensors"], file)


def read_specs(descriptor: int, entry: FileEntry, listed: Mapping[str, TensorEntry], budget: ReadBudget, *,
               from_disk: bool = False, hashed: bool = True) -> dict[str, TensorSpec]:
    """Where the tensors lie in an open file, once it is the one that `entry` and `listed` describe."""
    _check_size(descriptor, entry)
    if from_disk and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if hashed and hash_range(descriptor, 0, entry.size) != entry.sha256:
        raise ValueError(f"its SHA-256 is not the manifest's; {_locate_damage(descriptor, listed, budget)}")
    specs = read_header(descriptor, entry.size, budget)
    if {key: (spec.dtype, spec.shape) for key, spec in specs.items()} != {
            key: (item.dtype, item.shape) for key, item in listed.items()}:
        raise ValueError("its tensors are not those that are listed for it")
    return specs


def read_header(descriptor: int, size: int, budget: ReadBudget) -> dict[str, TensorSpec]:
    """Each tensor's place in an open safetensors file of `size` bytes, by the rules of `parse_header`."""
    length = header_length(os.pread(descriptor, 8, 0), size, "header")
    return parse_header(os.pread(descriptor, 8 + length, 0), size, "header", budget)


def _locate_damage(descriptor: int, listed: Mapping[str, TensorEntry], budget: ReadBudget) -> str:
    try:
        specs = read_header(descriptor, os.fstat(descriptor).st_size, budget)
    except ValueError as error:
        return str(error)
    bad = [key for key, spec in specs.items()
           if key not in listed or not _same_bytes(descriptor, spec, listed[key])]
    return f"damaged: tensor {', '.join(map(repr, bad[:5]))} ({len(bad)} in all)" if bad else "damaged: its header"


def _same_bytes(descriptor: int, spec: TensorSpec, entry: TensorEntry) -> bool:
    return f"{checksum_range(descriptor, spec.start, spec.end):016x}" == entry.checksum


def _check_size(descriptor: int, entry: FileEntry) -> None:
    size = os.fstat(descriptor).st_size
    if size != entry.size:
        raise ValueError(f"it has {size} bytes; the manifest says {entry.size}")


@contextlib.contextmanager
def naming_file(name: str) -> Iterator[None]:
    """Puts the file's name before whatever goes wrong inside."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {describe(error)}") from error


def describe(error: Exception) -> str:
    """The message, without Python's errno notation."""
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
