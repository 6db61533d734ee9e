"""One tree's two files in a checkpoint directory: written and hashed in one pass, verified and mapped in another.

`<name>.json` holds the plain data with a reference where a tensor stands, `<name>.safetensors` the tensors.
Deliberately left out: when a checkpoint counts as complete, and which to use (checkpointing.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping

from torch import Tensor

from fasttrain.manifest import FileEntry, TensorEntry, TreeEntry, structure_file, tensor_file
from fasttrain.storage import checksum, checksum_range, hash_range, open_regular, read_all, write_file
from fasttrain.tensorfile import TensorSpec, header_length, layout, map_tensors, parse_header, tensor_bytes
from fasttrain.trees import MAX_JSON_BYTES, Tree, parse_json, unflatten_tree

PARALLEL_BYTES = 8 * 2**20


def write_trees(directory: int, trees: Mapping[str, tuple[bytes, Mapping[str, Tensor]]]) -> dict[str, TreeEntry]:
    """`write_tree` for each; from `PARALLEL_BYTES` on all at once, since one core hashes slower than a disk writes."""
    size = sum(tensor.nbytes for _, tensors in trees.values() for tensor in tensors.values())
    if size < PARALLEL_BYTES or len(trees) == 1:
        return {name: write_tree(directory, name, *parts) for name, parts in trees.items()}
    entries: dict[str, TreeEntry] = {}
    errors: list[BaseException] = []

    def write(name: str) -> None:
        try:
            entries[name] = write_tree(directory, name, *trees[name])
        except BaseException as error:  # not swallowed: raised below
            errors.append(error)

    # Daemons, and no executor: a process that is told to leave at once must not wait for them.
    threads = [threading.Thread(target=write, args=(name,), name=f"fasttrain-write-{name}", daemon=True)
               for name in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {name: entries[name] for name in trees}


def write_tree(directory: int, name: str, text: bytes, tensors: Mapping[str, Tensor]) -> TreeEntry:
    """Writes and fsyncs the files of tree `name` in `directory`; returns their entry for the manifest.

    The file's SHA-256 is what loading checks (and `sha256sum` prints). Each tensor's checksum only tells which one is
    damaged, or differs from another checkpoint's: a second SHA-256 would cost more than the write.
    """
    structure = FileEntry(*write_file(directory, structure_file(name), [text]))
    if not tensors:
        return TreeEntry(structure, None, {})
    header, specs = layout(tensors, name)
    entries: dict[str, TensorEntry] = {}

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for key, spec in specs.items():  # one tensor at a time: a copy to the CPU lives no longer than its write
            view = tensor_bytes(tensors[key])
            entries[key] = TensorEntry(spec.dtype, spec.shape, f"{checksum(view):016x}")
            yield view

    return TreeEntry(structure, FileEntry(*write_file(directory, tensor_file(name), pieces())), entries)


def read_tree(directory: int, name: str, entry: TreeEntry, *, from_disk: bool = False) -> Tree:
    """The tree `name` once its files are those that `entry` describes; ValueError or OSError says which is not.

    Hashing, header and mapping use one descriptor, so the file that was verified is the file that is used.
    """
    file = structure_file(name)
    with naming_file(file), open_regular(directory, file) as descriptor:
        _check_size(descriptor, entry.structure)
        text = read_all(descriptor, MAX_JSON_BYTES)
        if hashlib.sha256(text).hexdigest() != entry.structure.sha256:
            raise ValueError("its SHA-256 is not the manifest's")
    structure = parse_json(text, file)
    if entry.tensor_file is None:
        return unflatten_tree(structure, {}, name)
    file = tensor_file(name)
    with naming_file(file), open_regular(directory, file) as descriptor:
        _check_size(descriptor, entry.tensor_file)
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if hash_range(descriptor, 0, entry.tensor_file.size) != entry.tensor_file.sha256:
            raise ValueError(f"its SHA-256 is not the manifest's; {_locate_damage(descriptor, entry)}")
        specs = read_header(descriptor, entry.tensor_file.size)
        listed = {key: (item.dtype, item.shape) for key, item in entry.tensors.items()}
        if {key: (spec.dtype, spec.shape) for key, spec in specs.items()} != listed:
            raise ValueError("its tensors are not those that the manifest lists")
        tensors = dict(map_tensors(descriptor, specs))
    return unflatten_tree(structure, tensors, name)


def read_header(descriptor: int, size: int) -> dict[str, TensorSpec]:
    """Each tensor's place in an open safetensors file of `size` bytes, by the rules of `parse_header`."""
    length = header_length(os.pread(descriptor, 8, 0), size, "header")
    return parse_header(os.pread(descriptor, 8 + length, 0), size, "header")


def _locate_damage(descriptor: int, entry: TreeEntry) -> str:
    try:
        specs = read_header(descriptor, os.fstat(descriptor).st_size)
    except ValueError as error:
        return str(error)
    bad = [key for key, spec in specs.items()
           if key not in entry.tensors or not _same_bytes(descriptor, spec, entry.tensors[key])]
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
