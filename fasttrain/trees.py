"""Nested plain data with tensors <-> JSON plus a flat table of tensors: what every checkpoint file is made of.

A *tree* is any nesting of dict, list and tuple over tensors, str, int, float, bool and None. It comes back exactly:
tuples stay tuples, integer keys stay integers, floats keep their bits, and one tensor held in two places is stored once
and comes back as one tensor. `parse_json` is the only reader of JSON from disk and treats the text as hostile.
Deliberately left out: objects. What is not plain data is a TypeError that names its place, never a pickle.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

JSON: TypeAlias = Any
Tree: TypeAlias = Any

MAX_DEPTH = 64  # levels of a tree; far above any optimizer state, far below the interpreter's recursion limit
MAX_JSON_BYTES = 64 * 2**20
FREE_BYTES = 64 * 2**20  # of memory that reading a checkpoint may take whatever its size
NODE_BYTES = 96  # of memory at worst for a value of JSON, parsed, and as much again for its place in a tree
MAX_INT_DIGITS = 100  # 128-bit generator states fit; the quadratic cost of int() on megabytes of digits does not
MAX_NAME = 512

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]*", re.ASCII)
_FLOAT_BITS = re.compile(r"[0-9a-f]{16}", re.ASCII)
_HINTS: Mapping[type, str] = {
    bytes: "store it as a uint8 tensor",
    np.ndarray: "store it as a tensor (torch.from_numpy)",
    torch.dtype: "store str(dtype)",
    torch.device: "store str(device)",
    set: "store a sorted list",
}


@dataclass
class ReadBudget:
    """What reading one checkpoint may still take in memory, in bytes, beside the pages of its mapped tensors: at first
    its size and 64 MiB. So it never takes more than twice its size and 64 MiB, whoever made it.

    Each reader takes what its text can cost at worst before it parses it; ValueError where that is too much.
    """

    left: int

    @classmethod
    def of_size(cls, num_bytes: int) -> ReadBudget:
        return cls(num_bytes + FREE_BYTES)

    def take(self, num_bytes: int, what: str) -> None:
        self.left -= num_bytes
        if self.left < 0:
            raise ValueError(f"{what}: reading it might take over twice the checkpoint's size and "
                             f"{FREE_BYTES >> 20} MiB of memory; keep long lists in tensors")

    def take_text(self, data: bytes, what: str, *, trees: int = 0) -> None:
        """JSON, parsed, and `trees` copies of its structure."""
        nodes = sum(map(data.count, (b"{", b"[", b",", b":")))
        # The bytes, their text, its strings; escapes make these from pieces, and one wide letter makes all of it wide.
        copies = 3 if data.isascii() and b"\\" not in data else 4 if data.isascii() and b"\\u" not in data else 14
        self.take(len(data) * copies + nodes * NODE_BYTES * (1 + trees), what)


def is_tensor_name(name: object) -> bool:
    """Names that are the same text in every file system, shell and JSON library."""
    return isinstance(name, str) and len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None and ".." not in name


def flatten_tree(tree: Tree, where: str) -> tuple[JSON, dict[str, Tensor]]:
    """Splits `tree` into JSON-ready data and its tensors by name; `where` names the tree in errors.

    A tensor stands in the JSON as {"$tensor": name}; its name is its path ("state/0/exp_avg"), or a number where the
    path is no fit name. Tensors are neither copied nor moved. Two entries that are the same memory seen the same way
    (tied weights) share one name; other overlapping views are stored one by one, as copies.
    Mappings may be dict, OrderedDict (comes back as dict) or Counter; NumPy scalars come back as Python numbers.

    Raises:
        TypeError: for anything else, naming its place in the tree.
        ValueError: nested deeper than 64 (or cyclic); an integer of more than 100 digits.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[object, str] = {}

    def name_of(tensor: Tensor, path: tuple[str, ...]) -> str:
        key = _memory_key(tensor)
        if key not in names:
            wanted = "/".join(path) or "tensor"
            name = wanted if is_tensor_name(wanted) and wanted not in tensors else f"tensor:{len(tensors)}"
            while name in tensors:
                name += ":"
            names[key] = name
            tensors[name] = tensor.detach()
        return names[key]

    def encode(value: Tree, path: tuple[str, ...], place: str) -> JSON:
        if len(path) > MAX_DEPTH:
            raise ValueError(f"{place} is nested deeper than {MAX_DEPTH} levels; is there a cycle?")
        kind = type(value)
        if isinstance(value, Tensor):
            return {"$tensor": name_of(_check_tensor(value, place), path)}
        if kind in (dict, OrderedDict, Counter):
            keys = [_encode_key(key, place) for key in value]
            items = [encode(item, (*path, str(key)), f"{place}[{key!r}]") for key, item in value.items()]
            if kind is not Counter and all(isinstance(key, str) and not key.startswith("$") for key in keys):
                return dict(zip(keys, items))
            return {"$counter" if kind is Counter else "$dict": [[key, item] for key, item in zip(keys, items)]}
        if kind in (list, tuple):
            items = [encode(item, (*path, str(i)), f"{place}[{i}]") for i, item in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        return _encode_scalar(value, place)

    structure, found = encode(tree, (), where), tensors
    tensors = {}  # `encode` refers to itself and lives until a garbage collection: it must not keep them
    return structure, found


def unflatten_tree(structure: JSON, tensors: Mapping[str, Tensor], where: str) -> Tree:
    """The inverse of `flatten_tree`. Raises ValueError for data that it could not have produced."""
    used: set[str] = set()

    def fail(place: str, why: str) -> NoReturn:
        raise ValueError(f"{place!a}: {why}")

    def decode(value: JSON, depth: int, place: str) -> Tree:
        if depth > MAX_DEPTH:
            fail(where, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, list):
            return [decode(item, depth + 1, place) for item in value]
        if not isinstance(value, dict):
            return value
        tag = next((key for key in value if key.startswith("$")), None)
        if tag is None:
            return {key: decode(item, depth + 1, f"{place}[{key!r}]") for key, item in value.items()}
        content = value[tag]
        if len(value) != 1:
            fail(place, f"{tag!r} stands beside other keys")
        if tag == "$tensor" and isinstance(content, str):
            if content not in tensors:
                fail(place, f"tensor {content!r} is not in the file")
            used.add(content)
            return tensors[content]
        if tag == "$tuple" and isinstance(content, list):
            return tuple(decode(item, depth + 1, place) for item in content)
        if tag in ("$dict", "$counter") and isinstance(content, list):
            pairs: dict[Any, Tree] = {}
            for pair in content:
                if not isinstance(pair, list) or len(pair) != 2:
                    fail(place, f"an entry of {tag!r} is not a pair")
                key = decode(pair[0], depth + 1, place)
                if not (key is None or isinstance(key, (str, int, float))) or key in pairs:
                    fail(place, f"{tag!r} holds a key twice or one that is not plain: {key!r}")
                pairs[key] = decode(pair[1], depth + 1, f"{place}[{key!r}]")
            return pairs if tag == "$dict" else Counter(pairs)
        if tag == "$float" and isinstance(content, str) and _FLOAT_BITS.fullmatch(content):
            return struct.unpack(">d", bytes.fromhex(content))[0]
        fail(place, f"unknown or malformed {tag!r}")

    tree = decode(structure, 0, where)
    if len(used) != len(tensors):
        fail(where, f"tensors that nothing refers to: {sorted(set(tensors) - used)[:3]}")
    tensors = {}  # as in `flatten_tree`; a mapped one holds a descriptor, too
    return tree


def iter_tensors(tree: Tree, where: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a tree with its place, in order."""
    if isinstance(tree, Tensor):
        yield where, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from iter_tensors(item, f"{where}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        for i, item in enumerate(tree):
            yield from iter_tensors(item, f"{where}[{i}]")


def transform_tensors(tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    """The tree with `change(tensor)` for each tensor; one that stands in two places is changed once and stays one."""
    changed: dict[int, Tensor] = {}

    def walk(value: Tree) -> Tree:
        if isinstance(value, Tensor):
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]
        if isinstance(value, dict):
            return type(value)({key: walk(item) for key, item in value.items()})
        return type(value)(map(walk, value)) if isinstance(value, (list, tuple)) else value

    result = walk(tree)
    changed = {}  # as in `flatten_tree`
    return result


def dump_json(value: JSON) -> bytes:
    """Compact ASCII JSON. NaN and infinity are refused: `flatten_tree` has already encoded them."""
    return json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def parse_json(data: bytes, what: str, *, max_bytes: int = MAX_JSON_BYTES, budget: ReadBudget | None = None,
               trees: int = 0) -> JSON:
    """Reads JSON that anyone may have written; `what` names it in errors. See ReadBudget for `budget` (None: the
    text's own) and `trees`.

    Raises ValueError for anything beyond the limits on bytes, memory and digits, for duplicate keys, for numbers that
    are not finite, for nesting beyond the interpreter's limit and for text that is not UTF-8 JSON.
    """
    if len(data) > max_bytes:
        raise ValueError(f"{what}: {len(data)} bytes of JSON; at most {max_bytes} are read")
    # Counted in the raw bytes, before the parser turns two of them into a hundred.
    (budget or ReadBudget.of_size(len(data))).take_text(data, f"{what} (JSON)", trees=trees)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant,
                          parse_int=_short_int, parse_float=_finite_float)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: not readable as JSON: {str(error)!a}") from error


def _memory_key(tensor: Tensor) -> object:
    if tensor.numel() == 0:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(),
            tensor.is_neg())


def _check_tensor(tensor: Tensor, place: str) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(f"{place} is a tensor of layout {tensor.layout} on {tensor.device}, dtype {tensor.dtype}; a "
                        "checkpoint holds dense tensors with data: convert it before saving")
    return tensor


def _encode_key(key: object, place: str) -> JSON:
    if type(key) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{place} has a key of type {type(key).__name__} ({key!r}); keys must be str, int, float, bool "
                        "or None")
    return _encode_scalar(key, place)


def _encode_scalar(value: object, place: str) -> JSON:
    if isinstance(value, (np.bool_, np.integer, np.float16, np.float32, np.float64)):
        value = value.item()  # exact: all of these fit a Python number
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}  # type: ignore[arg-type]
    if kind is int and abs(value) >= 10**MAX_INT_DIGITS:  # type: ignore[arg-type]
        raise ValueError(f"{place} is an integer of more than {MAX_INT_DIGITS} digits; store it as text or as a tensor")
    if kind in (str, int, bool, type(None)):
        return value
    hint = next((hint for base, hint in _HINTS.items() if isinstance(value, base)), "store its plain data instead")
    raise TypeError(f"{place} is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds plain data (dict, list, "
                    f"tuple, tensor, str, int, float, bool, None): {hint}")


def _unique_keys(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return table


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"the number {text} is not finite")


def _short_int(text: str) -> int:
    if len(text) > MAX_INT_DIGITS + 1:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text) if len(text) <= 400 else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value
