"""The manifest that seals a checkpoint: what belongs to it, how large it is, and what every byte of it hashes to.

`manifest.json` is one line: {"sha256":"<of the rest>","manifest":{...}}. The hash covers the manifest's own text, so
that a flipped bit in it (say, in a validation loss) is found like one in a tensor. File names follow from the trees'
names and are never taken from the text: there is no path in it to attack.

A file has a SHA-256, and it is the plain one of its bytes: `sha256sum` and every other tool can check it without us. It
covers all tensors and is verified before one of them is used, so a hash per tensor proves nothing more; its purpose is
to name the damaged tensor, and to tell which of two checkpoints' tensors differ. For that 64 bits are enough. A second
SHA-256 of every byte would double the work that bounds a save's speed (2 GB/s a core against 20 for the sum), and one
over per-tensor digests in place of the file's could be checked by no other tool.

The tree of a single rank (`rank_00003`) lists its tensors in its own JSON, whose hash is here: thousands of ranks with
hundreds of tensors each would make a manifest of hundreds of megabytes, which every rank would have to read.
Deliberately left out: reading and writing files (storage.py, checkpointing.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fasttrain.trees import JSON, ReadBudget, Tree, dump_json, flatten_tree, is_tensor_name, parse_json, unflatten_tree

FORMAT, VERSION = "fasttrain-checkpoint", 3
READABLE_VERSIONS = (2, 3)  # in version 2 the trees of ranks, too, list their tensors here
MANIFEST_NAME = "manifest.json"
MAX_STEP = 10**15 - 1

_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{16}", re.ASCII)
_TREE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_RANK_TREE = re.compile(r"rank_\d{5,9}", re.ASCII)
_STEP_NAME = re.compile(r"step-(\d{8,15})(~?)", re.ASCII)
_SEALED = re.compile(rb'\{"sha256":"([0-9a-f]{64})","manifest":(\{.*\})\}\n', re.DOTALL)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a safetensors file: dtype as that format spells it, shape, `storage.checksum` of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str


@dataclass(frozen=True)
class TreeEntry:
    """One tree: `<name>.json`, and `<name>.safetensors` if it has tensors."""

    structure: FileEntry
    tensor_file: FileEntry | None
    tensors: Mapping[str, TensorEntry] | None
    """None: `<name>.json` lists them, as {"tensors": {...}, "tree": ...}."""


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents. `parent_step`: the newest earlier step on disk when this one was written."""

    step: int
    parent_step: int | None
    trees: Mapping[str, TreeEntry]
    metadata: Mapping[str, Tree]
    libraries: Mapping[str, str]


def step_directory_name(step: int) -> str:
    """100 -> 'step-00000100'."""
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise ValueError(f"step is {step!r}; it must be a whole number from 0 to {MAX_STEP}")
    return f"step-{step:08d}"


def parse_step_name(name: str) -> tuple[int, bool] | None:
    """'step-00000100' -> (100, True); 'step-00000100~', the copy kept while step 100 is replaced -> (100, False)."""
    found = _STEP_NAME.fullmatch(name)
    if found is None or step_directory_name(int(found[1])) != name.rstrip("~"):
        return None
    return int(found[1]), not found[2]


def is_tree_name(name: object) -> bool:
    """Lower-case words that make a file name; `manifest` is taken."""
    return isinstance(name, str) and _TREE_NAME.fullmatch(name) is not None and name != "manifest"


def tree_of_rank(rank: int) -> str:
    """3 -> 'rank_00003'."""
    return f"rank_{rank:05d}"


def is_rank_tree(name: str) -> bool:
    """Whether a tree holds what a single rank has, and lists its tensors itself."""
    return _RANK_TREE.fullmatch(name) is not None


def structure_file(tree: str) -> str:
    """The file of a tree's plain data."""
    return f"{tree}.json"


def tensor_file(tree: str) -> str:
    """The file of a tree's tensors."""
    return f"{tree}.safetensors"


def seal_manifest(manifest: Manifest) -> bytes:
    """The content of `manifest.json`. Raises TypeError/ValueError for metadata that is not plain data."""
    metadata, tensors = flatten_tree(dict(manifest.metadata), "metadata")
    if tensors:
        raise TypeError(f"metadata holds a tensor ({next(iter(tensors))}); tensors belong in a tree, or call .item()")
    body = dump_json({
        "format": FORMAT, "version": VERSION, "step": manifest.step, "parent_step": manifest.parent_step,
        "libraries": dict(manifest.libraries), "metadata": metadata,
        "trees": {name: tree_to_json(name, entry) for name, entry in manifest.trees.items()},
    })
    return b'{"sha256":"%s","manifest":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def open_manifest(data: bytes, budget: ReadBudget | None = None) -> Manifest:
    """Reads `manifest.json`, within `budget` (None: that of a checkpoint of this size). Raises ValueError unless the
    seal holds and every entry is of its form."""
    budget = budget or ReadBudget.of_size(len(data))
    budget.take(len(data), MANIFEST_NAME)
    sealed = _SEALED.fullmatch(data)
    if sealed is None:
        raise ValueError(f"{MANIFEST_NAME} is torn, or not written by fasttrain")
    text = sealed[2]
    if hashlib.sha256(text).hexdigest().encode() != sealed[1]:
        raise ValueError(f"{MANIFEST_NAME} does not match its own SHA-256")
    body = parse_json(text, MANIFEST_NAME, budget=budget, trees=1)
    _need(body.get("format") == FORMAT, "format", body.get("format"), repr(FORMAT))
    _need(type(body.get("version")) is int and body["version"] in READABLE_VERSIONS, "version", body.get("version"),
          f"one of {READABLE_VERSIONS}; a newer fasttrain may read it")
    keys = {"format", "version", "step", "parent_step", "libraries", "metadata", "trees"}
    _need(set(body) == keys, "the set of keys", sorted(body), f"{sorted(keys)}")
    step, parent, libraries, trees = body["step"], body["parent_step"], body["libraries"], body["trees"]
    _need(_is_size(step) and step <= MAX_STEP, "step", step, f"a whole number from 0 to {MAX_STEP}")
    _need(parent is None or (_is_size(parent) and parent <= MAX_STEP), "parent_step", parent, "a step or null")
    _need(isinstance(libraries, dict) and all(isinstance(v, str) for v in libraries.values()), "libraries", libraries,
          "a table of texts")
    _need(isinstance(trees, dict) and all(map(is_tree_name, trees)), "trees", trees, "a table of trees by name")
    metadata = unflatten_tree(body["metadata"], {}, "metadata")
    _need(isinstance(metadata, dict), "metadata", metadata, "a table")
    entries = {name: tree_from_json(name, entry) for name, entry in trees.items()}
    return Manifest(step, parent, entries, metadata, libraries)


def tree_to_json(name: str, entry: TreeEntry) -> JSON:
    """A tree's entry as it stands in the manifest."""
    files = {structure_file(name): entry.structure}
    if entry.tensor_file is not None:
        files[tensor_file(name)] = entry.tensor_file
    table: JSON = {"files": {file: {"size": item.size, "sha256": item.sha256} for file, item in files.items()}}
    if entry.tensors is not None:
        table["tensors"] = tensors_to_json(entry.tensors)
    return table


def tree_from_json(name: str, entry: JSON) -> TreeEntry:
    """The inverse of `tree_to_json`; ValueError for anything of another form."""
    place = f"trees[{name!r}]"
    good = isinstance(entry, dict) and set(entry) - {"tensors"} == {"files"}
    _need(good, place, entry, "a table of files and tensors")
    listed = "tensors" in entry
    _need(listed or is_rank_tree(name), place, entry, "a table of files and tensors; only a rank's tree lists its own")
    files, tensors = entry["files"], entry.get("tensors")
    both = {structure_file(name), tensor_file(name)}
    wanted = [both if tensors else {structure_file(name)}] if listed else [both, {structure_file(name)}]
    _need(isinstance(files, dict) and set(files) in wanted, f"{place} files", files, f"a table of {sorted(wanted[0])}")
    parsed = {file: _file_from_json(file, item) for file, item in files.items()}
    return TreeEntry(parsed[structure_file(name)], parsed.get(tensor_file(name)),
                     tensors_from_json(tensors, place) if listed else None)


def tensors_to_json(tensors: Mapping[str, TensorEntry]) -> JSON:
    """{name: [dtype, shape, checksum]}."""
    return {key: [item.dtype, list(item.shape), item.checksum] for key, item in tensors.items()}


def tensors_from_json(tensors: JSON, place: str) -> dict[str, TensorEntry]:
    """The inverse of `tensors_to_json`; ValueError for anything of another form."""
    _need(isinstance(tensors, dict), f"{place} tensors", tensors, "a table")
    return {key: _tensor_from_json(key, item) for key, item in tensors.items()}


def _file_from_json(name: str, entry: JSON) -> FileEntry:
    good = (isinstance(entry, dict) and set(entry) == {"size", "sha256"} and _is_size(entry["size"])
            and _is_hash(entry["sha256"]))
    _need(good, name, entry, "a size and a sha256")
    return FileEntry(entry["size"], entry["sha256"])


def _tensor_from_json(name: str, entry: JSON) -> TensorEntry:
    good = (is_tensor_name(name) and isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)
            and isinstance(entry[1], list) and all(map(_is_size, entry[1]))
            and isinstance(entry[2], str) and _CHECKSUM.fullmatch(entry[2]) is not None)
    _need(good, f"tensor {name[:80]!r}", entry, "[dtype, shape, checksum] under a tensor's name")
    return TensorEntry(entry[0], tuple(entry[1]), entry[2])


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _need(holds: bool, field: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{MANIFEST_NAME}: {field!a} is {ascii(value)[:200]}; it must be {rule}")
