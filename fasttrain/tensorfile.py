"""The safetensors format, written as a stream and read as hostile input.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors'
bytes without gaps. The library of the same name reads these files; it is not used here because it offers no place to
hash and fsync while writing (or else a second copy of all bytes), and accepts headers that cost gigabytes to parse.
Deliberately left out: opening files (storage.py) and deciding which to trust (checkpointing.py).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrain.trees import JSON, ReadBudget, dump_json, is_tensor_name, parse_json

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 64
MAX_SIZE = 2**53  # of a dimension or an offset
TENSOR_BYTES = 1024  # of memory for a tensor's objects, beside its elements

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}
_DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies: bytes [start, end) of the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def layout(tensors: Mapping[str, Tensor], where: str) -> tuple[bytes, dict[str, TensorSpec]]:
    """The file's first bytes (length and header) and each tensor's place, in file order: widest dtypes first, so that
    every tensor is aligned to its own width.

    Raises TypeError/ValueError for a dtype, name or number of tensors that the format or its limits do not allow.
    """
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{where} holds {len(tensors)} tensors; a checkpoint's file holds at most {MAX_TENSORS}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"{where}: tensor {name!r} is {tensor.dtype}; the file format has {', '.join(DTYPES)}")
        if tensor.dim() > MAX_DIMENSIONS:
            raise ValueError(f"{where}: tensor {name!r} has {tensor.dim()} dimensions; at most {MAX_DIMENSIONS} fit")
        assert is_tensor_name(name), name
    header: dict[str, JSON] = {"__metadata__": {"format": "pt"}}  # Hugging Face refuses files without this entry
    places, offset = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor, start = tensors[name], offset
        offset += tensor.numel() * tensor.element_size()
        dtype, shape = _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, offset]}
        places[name] = TensorSpec(dtype, shape, start, offset)
    text = dump_json(header)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{where}: the names of its {len(tensors)} tensors need a header of {len(text)} bytes; at "
                         f"most {MAX_HEADER_BYTES} are read")
    base = 8 + len(text)
    specs = {name: TensorSpec(s.dtype, s.shape, base + s.start, base + s.end) for name, s in places.items()}
    return len(text).to_bytes(8, "little") + text, specs


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in order as bytes: a view where it is contiguous on the CPU, else a copy of this one."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Not reshape(-1): a contiguous tensor of one element or none may have any stride, which a view as bytes refuses.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


def parse_header(prefix: bytes, file_size: int, what: str, budget: ReadBudget | None = None) -> dict[str, TensorSpec]:
    """Reads length and header; `prefix` holds at least the file's first bytes up to the header's end (or its whole).

    Every tensor must fit its dtype and shape, and together they must cover the rest of the file in order: no gap, no
    overlap, nothing beyond the end. Raises ValueError, naming `what`.
    """
    length = header_length(prefix, file_size, what)
    text = prefix[8:8 + length]
    budget = budget or ReadBudget.of_size(file_size)
    if text.count(b"{") > MAX_TENSORS + 2:  # before the parser builds a table of them
        raise ValueError(f"{what}: {text.count(b'{')} tables in the header; at most {MAX_TENSORS} tensors are read")
    header = parse_json(text, f"{what}: header", max_bytes=MAX_HEADER_BYTES, budget=budget)
    if not isinstance(header, dict):
        raise ValueError(f"{what}: the header is not a table")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{what}: {len(header)} tensors; at most {MAX_TENSORS} are read")
    budget.take(len(header) * TENSOR_BYTES, what)
    specs = {name: _parse_spec(name, entry, 8 + length, what) for name, entry in header.items()}
    position = 8 + length
    for name, spec in sorted(specs.items(), key=lambda item: (item[1].start, item[1].end)):
        if spec.start != position:
            raise ValueError(f"{what}: tensor {name!r} starts at byte {spec.start}; {position} is next")
        position = spec.end
    if position != file_size:
        raise ValueError(f"{what}: the tensors end at byte {position}; the file at {file_size}")
    return specs


def header_length(prefix: bytes, file_size: int, what: str) -> int:
    """The header's length in bytes, checked against the limit and the file."""
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, file_size - 8):
        raise ValueError(f"{what}: a header of {length} bytes in a file of {file_size} bytes; at most "
                         f"{MAX_HEADER_BYTES} are read")
    return length


def map_tensors(descriptor: int, specs: Mapping[str, TensorSpec], budget: ReadBudget) -> Iterator[tuple[str, Tensor]]:
    """The tensors, backed by a private mapping of the file: read when touched, writable, and never written back.

    They outlive the file's name (the mapping holds the inode): a checkpoint may be pruned while its tensors are in use.
    """
    mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    for name, spec in specs.items():
        yield name, _mapped(mapping, 0, name, spec, budget)


def map_tensor(descriptor: int, name: str, spec: TensorSpec, budget: ReadBudget) -> Tensor:
    """One tensor, backed by a mapping of its own pages alone: address space is limited, too."""
    base = spec.start - spec.start % mmap.ALLOCATIONGRANULARITY
    if spec.start == spec.end:
        return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    mapping = mmap.mmap(descriptor, spec.end - base, access=mmap.ACCESS_COPY, offset=base)
    return _mapped(mapping, base, name, spec, budget)


def _mapped(mapping: mmap.mmap, base: int, name: str, spec: TensorSpec, budget: ReadBudget) -> Tensor:
    dtype = DTYPES[spec.dtype]
    if spec.start == spec.end:
        return torch.empty(spec.shape, dtype=dtype)
    raw = torch.frombuffer(mapping, dtype=torch.uint8, offset=spec.start - base, count=spec.end - spec.start)
    if raw.data_ptr() % dtype.itemsize:
        budget.take(len(raw), f"tensor {name!r}")
        raw = raw.clone()  # not one of our files: their tensors are aligned
    if dtype is torch.bool and int(raw.max()) > 1:
        raise ValueError(f"tensor {name!r} is bool but holds a byte that is neither 0 nor 1")
    return raw.view(dtype).reshape(spec.shape)


def _parse_spec(name: str, entry: JSON, base: int, what: str) -> TensorSpec:
    if not is_tensor_name(name):
        raise ValueError(f"{what}: {name[:80]!a} is no tensor name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what}: tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what}: tensor {name!r} has the unknown dtype {ascii(dtype)[:80]}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{what}: tensor {name!r} has a shape or data_offsets that are no sizes")
    begin, end = offsets
    count = math.prod(shape)
    # torch multiplies sizes before it sees a zero among them: the product of the others must fit as well.
    if math.prod(size for size in shape if size) > MAX_SIZE or end - begin != count * DTYPES[dtype].itemsize:
        raise ValueError(f"{what}: tensor {name!r} of shape {shape} and {dtype} does not fill bytes {begin} to {end}")
    return TensorSpec(dtype, tuple(shape), base + begin, base + end)


def _sizes(value: JSON) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)
