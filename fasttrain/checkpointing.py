"""Checkpoints: directories of verified files that a crash, a full disk or a flipped bit cannot turn into wrong weights.

`step-00000100/` holds, for each named tree, `<name>.json` and `<name>.safetensors`, and last `manifest.json` with every
size and SHA-256. It is built in a private directory, each file fsynced, and becomes visible by one rename. There is no
`latest` pointer to tear: the newest step that verifies is the latest. Loading hashes first and returns afterwards;
tensors are mapped from the file, so that no second copy of a model is made. No pickle anywhere.
Deliberately left out: what a training run consists of (state.py), when to save (training_loop.py), doing it behind the
training (saver.py) and what to keep (retention.py). One writer at a time is the caller's choice: hold
`lock_directory(root)` for the run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasttrain.manifest import (
    MANIFEST_NAME,
    Manifest,
    is_rank_tree,
    is_tree_name,
    open_manifest,
    parse_step_name,
    seal_manifest,
    step_directory_name,
)
from fasttrain.rank_parts import RankParts
from fasttrain.shard_files import SharedSave
from fasttrain.shards import joined
from fasttrain.storage import (
    CheckpointSpaceError,
    DirectoryInUseError,
    collect_orphans,
    lock_directory,
    make_directory,
    open_directory,
    open_regular,
    private_directory,
    read_all,
    require_space,
    retire,
    serialized,
    size_of,
    sync_directory,
    write_file,
)
from fasttrain.treefiles import describe, naming_file, read_tree, take_tree, verify_tree, write_trees
from fasttrain.trees import (
    JSON,
    MAX_JSON_BYTES,
    ReadBudget,
    Tree,
    dump_json,
    flatten_tree,
    iter_tensors,
    transform_tensors,
)

__all__ = [
    "CheckpointError", "CheckpointSpaceError", "DirectoryInUseError", "Manifest", "Snapshot", "latest_checkpoint",
    "list_checkpoints", "load_checkpoint", "load_into", "lock_directory", "read_manifest", "save_checkpoint",
    "snapshot_trees", "verify_checkpoint", "write_snapshot",
]


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or hostile; nothing of it was used."""


@dataclass(frozen=True)
class Snapshot:
    """Trees ready to be written: JSON text and tensors by tree name."""

    trees: Mapping[str, tuple[bytes, Mapping[str, Tensor]]]
    budget: ReadBudget
    """What is left for the manifest when it is read."""

    @property
    def num_bytes(self) -> int:
        """What the files hold, less headers and manifest."""
        return sum(len(text) + sum(t.numel() * t.element_size() for t in tensors.values())
                   for text, tensors in self.trees.values())


def save_checkpoint(root: Path | str, step: int, trees: Mapping[str, Tree], *, metadata: Mapping[str, JSON]) -> Path:
    """Writes `root/step-NNNNNNNN` durably and returns its path; the trees are read until it returns.

    A step that exists is replaced: the old directory is first renamed to `step-NNNNNNNN~`, which every reader here
    knows, so that there is a good one at each instant. Any error leaves the earlier checkpoints as they were and
    removes the private files. Dead processes' leftovers in `root` are collected first.

    Raises:
        TypeError, ValueError: a value that is not plain data (names its place), a bad tree name or step.
        CheckpointSpaceError: an OSError; too little room, found before writing or while writing.
        OSError: anything else the file system says.
    """
    return write_snapshot(root, step, snapshot_trees(trees), metadata=dict(metadata))


def snapshot_trees(trees: Mapping[str, Tree]) -> Snapshot:
    """Takes everything but the tensors' bytes (`saver.Arena.copy` takes these too)."""
    taken: dict[str, tuple[bytes, Mapping[str, Tensor]]] = {}
    budget = ReadBudget(0)
    for name, tree in trees.items():
        if not is_tree_name(name):
            raise ValueError(f"a tree is named {name!r}; use lower-case letters, digits and '_', and not 'manifest'")
        structure, tensors = flatten_tree(tree, name)
        taken[name] = (dump_json(structure), tensors)
    snapshot = Snapshot(taken, budget)
    budget.left = ReadBudget.of_size(snapshot.num_bytes).left
    for name, parts in taken.items():
        take_tree(budget, name, *parts)  # the reader's limits: what could not be read back is not written
    return snapshot


def write_snapshot(root: Path | str, step: int, snapshot: Snapshot, *, metadata: dict[str, JSON],
                   shared: SharedSave | None = None) -> Path:
    """Writes what `snapshot_trees` took; see `save_checkpoint`. With `shared`, other ranks write their trees too, and
    `metadata["finite"]` holds for all."""
    root = Path(root)
    final = root / step_directory_name(step)
    parents = [_step_of(path) for path in list_checkpoints(root) if _step_of(path) < step]
    draft = Manifest(step, parents[-1] if parents else None, {}, metadata, _library_versions())
    sealed = seal_manifest(draft)  # metadata that cannot be written, or read back, fails before anything is written
    open_manifest(sealed, replace(snapshot.budget))
    make_directory(root)
    _collect(root)
    needed = snapshot.num_bytes + len(sealed) + sum(
        8192 + sum(2 * len(key) + 256 for key in tensors) for _, tensors in snapshot.trees.values())
    require_space(root, needed)
    with private_directory(root, needed) as private:
        with open_directory(private) as directory:
            if shared is not None:
                shared.announce(private)
            trees = write_trees(directory, snapshot.trees)
            budget = replace(snapshot.budget)
            if shared is not None:
                others = shared.collect(metadata)
                budget.left += sum(entry.tensor_file.size for entry in others.values() if entry.tensor_file is not None)
                trees.update(others)
            sealed = seal_manifest(replace(draft, trees=trees))
            budget.take_text(sealed, MANIFEST_NAME, trees=2)
            write_file(directory, MANIFEST_NAME, [sealed])
            os.fsync(directory)
        with serialized(root):
            _publish(private, final)
    return final


def load_checkpoint(path: Path | str, names: Iterable[str] | None = None, *,
                    map_location: torch.device | str = "cpu", whole: bool = True,
                    hashed: bool = True) -> dict[str, Tree]:
    """The trees `names` (None: all but those of single ranks) of the checkpoint at `path`, verified before anything is
    returned. The tree of a single rank comes without its parts.

    CPU tensors are private mappings of the files: pages are read when touched, writing to them changes memory only, and
    they stay valid when the checkpoint is pruned. Tied tensors come back as one tensor.

    Args:
        whole: tensors that the ranks of a run wrote in parts are put together, in memory, one rank's parts after the
            other's; False: they come as `shards.Pieces`, of which any part can be copied from the files while the
            checkpoint is there.
        hashed: False trusts other ranks that have verified the files; of the ranks' files those are opened, and no
            others, whose parts are asked for.

    Raises:
        CheckpointError: damaged, incomplete or hostile; names the file and, where it can be told, the tensor.
        ValueError: a name that the checkpoint does not have.
    """
    with _opened(Path(path)) as (directory, manifest, budget):
        wanted = [name for name in manifest.trees if not is_rank_tree(name)] if names is None else list(names)
        for name in wanted:
            if name not in manifest.trees:
                raise ValueError(f"{str(path)!r} has no tree {name!r}; it has {sorted(manifest.trees)}")
        with _naming(Path(path)):
            parts = RankParts(Path(path), manifest.trees, budget, hashed=hashed)
            trees = {name: parts.rest_of(int(name.rpartition("_")[2])) if is_rank_tree(name) else
                     read_tree(directory, name, manifest.trees[name], budget, hashed=hashed)
                     for name in dict.fromkeys(wanted)}
            if parts.ranks:
                if hashed and not whole:
                    for rank in parts.ranks:
                        parts.open(rank)
                trees = joined(trees, parts, whole=whole)
    device = torch.device(map_location)
    return trees if device.type == "cpu" else {
        name: transform_tensors(tree, lambda tensor: tensor.to(device)) for name, tree in trees.items()}


def load_into(path: Path | str, name: str, target: Tree) -> None:
    """Copies the tensors of tree `name` into those at the same places of `target` (`model.state_dict()`, say),
    in place.

    Everything is verified and compared first: after a ValueError (places, shapes or dtypes differ) `target` is as it
    was. Leaves that are not tensors are left alone.
    """
    source = dict(iter_tensors(load_checkpoint(path, [name])[name], name))
    places = dict(iter_tensors(target, name))
    if source.keys() != places.keys():
        raise ValueError(f"{str(path)!r} and the target differ in tensors: only in the checkpoint "
                         f"{sorted(source.keys() - places.keys())[:5]}, only in the target "
                         f"{sorted(places.keys() - source.keys())[:5]}")
    for place, tensor in places.items():
        if (tensor.shape, tensor.dtype) != (source[place].shape, source[place].dtype):
            raise ValueError(f"{place} is {tuple(source[place].shape)} {source[place].dtype} in {str(path)!r} and "
                             f"{tuple(tensor.shape)} {tensor.dtype} in the target; build the target as it was saved")
    with torch.no_grad():
        for place, tensor in places.items():
            tensor.copy_(source[place])


def read_manifest(path: Path | str) -> Manifest:
    """The manifest of a checkpoint, its own seal verified but not the files'. Raises CheckpointError."""
    with _opened(Path(path)) as (_, manifest, _):
        return manifest


def verify_checkpoint(path: Path | str, *, from_disk: bool = False, names: Iterable[str] | None = None) -> list[str]:
    """Reads and hashes everything (of the trees `names`), as loading does; returns the problems by file and tensor
    (empty: sound).

    With `from_disk` the kernel is asked to forget its cached copy first, so that the disk itself has to answer.
    """
    problems = []
    try:
        with _opened(Path(path)) as (directory, manifest, budget):
            for name, entry in manifest.trees.items():
                if names is not None and name not in names:
                    continue
                # What a rank's tree takes is given back: there may be thousands, and each is dropped at once.
                passing = replace(budget) if is_rank_tree(name) else budget
                try:
                    verify_tree(directory, name, entry, passing, from_disk=from_disk)
                except (ValueError, OSError) as error:
                    problems.append(describe(error))
    except CheckpointError as error:
        problems.append(str(error))
    return problems


def list_checkpoints(root: Path | str) -> list[Path]:
    """The step directories of `root`, oldest first, unverified. `step-N~` (a replacement was cut short) stands before
    `step-N`."""
    try:
        with os.scandir(root) as entries:
            found = [(parse_step_name(e.name), e.name) for e in entries if e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [Path(root) / name for _, name in sorted((key, name) for key, name in found if key is not None)]


def latest_checkpoint(root: Path | str, *, log: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None; each newer one that does not is logged with what is wrong."""
    for _ in range(100):  # again when another process pruned or replaced one under our eyes
        paths = list_checkpoints(root)
        for path in reversed(paths):
            before = _identity(path)
            problems = verify_checkpoint(path)
            if not problems:
                return path
            if before is None or before != _identity(path):
                break
            log(f"CHECKPOINT NOT USED: {str(path)!r} is damaged: {'; '.join(problems)}")
        else:
            if paths:
                log(f"NO CHECKPOINT in {str(root)!r} verifies ({len(paths)} damaged)")
            return None
    raise CheckpointError(f"{str(root)!r} kept changing; is another process writing there?")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[int, Manifest, ReadBudget]]:
    with contextlib.ExitStack() as stack:
        with _naming(path):
            directory = stack.enter_context(open_directory(path, follow=True))
            budget = ReadBudget.of_size(size_of(directory))
            with naming_file(MANIFEST_NAME), open_regular(directory, MANIFEST_NAME) as descriptor:
                manifest = open_manifest(read_all(descriptor, MAX_JSON_BYTES), budget)
            named = parse_step_name(path.resolve().name)
            if named is not None and named[0] != manifest.step:
                raise ValueError(f"its manifest is that of step {manifest.step}: the directory was renamed or swapped")
        yield directory, manifest, budget


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{str(path)!r}: {describe(error)}") from error


def _publish(private: Path, final: Path) -> None:
    backup = final.with_name(final.name + "~")
    replaced = os.path.lexists(final)
    try:
        if replaced:
            if os.path.lexists(backup):
                retire(final)  # `_collect` left both, so neither verifies
            else:
                os.rename(final, backup)
            sync_directory(final.parent)
        os.rename(private, final)
    except OSError:
        if not os.path.lexists(final):
            with contextlib.suppress(OSError):
                os.rename(backup, final)
        raise
    sync_directory(final.parent)
    if os.path.lexists(backup):
        with contextlib.suppress(OSError):  # the new one is published; the next save collects what stays
            retire(backup)


def _collect(root: Path) -> None:
    """Settles what killed saves left: private directories go; of `step-N` and `step-N~` the sound one stays, as the
    former."""
    collect_orphans(root)
    for backup in list_checkpoints(root):
        final = backup.with_name(backup.name[:-1])
        if backup.name.endswith("~"):
            with serialized(root), contextlib.suppress(FileNotFoundError):
                if not verify_checkpoint(final):
                    retire(backup)
                elif not verify_checkpoint(backup):
                    if os.path.lexists(final):
                        retire(final)
                    os.rename(backup, final)


def _identity(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _step_of(path: Path) -> int:
    named = parse_step_name(path.name)
    assert named is not None, path
    return named[0]


def _library_versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("fasttrain")
    except importlib.metadata.PackageNotFoundError:
        own = "uninstalled checkout"
    return {"fasttrain": own, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
