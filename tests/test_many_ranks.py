"""Checkpoints of thousands of ranks: the manifest stays small, and a rank opens the files that hold its rows alone.

No process is started: the ranks' files are written one after the other, as the ranks would write theirs.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fasttrain.checkpointing import list_checkpoints, load_checkpoint, read_manifest, snapshot_trees, verify_checkpoint
from fasttrain.manifest import Manifest, TreeEntry, open_manifest, seal_manifest, tree_of_rank
from fasttrain.shards import _SPREAD, Pieces, box_of, divided
from fasttrain.storage import open_directory, write_file
from fasttrain.treefiles import write_trees
from fasttrain.trees import MAX_JSON_BYTES

Shapes = dict[str, tuple[int, ...]]


def rows_of(shape: Sequence[int], ranks: int) -> int:
    return -(-shape[0] // ranks)


def whole(name: str, shape: Sequence[int]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(tuple(shape)) + len(name)


def tree_of(rank: int, ranks: int, shapes: Shapes) -> dict[str, Any]:
    """What a rank writes of a model and its two moments."""
    parts = {}
    for name, shape in shapes.items():
        rows = rows_of(shape, ranks)
        part = whole(name, shape)[rank * rows:(rank + 1) * rows]
        if part.numel():
            for place in (f"model/{name}", f"optimizer/state/{name}/exp_avg", f"optimizer/state/{name}/exp_avg_sq"):
                parts[place] = {"start": [rank * rows, *(0,) * (len(shape) - 1)], "part": part.clone()}
    return {"parts": parts, "rng": {"torch": torch.zeros(16, dtype=torch.uint8)}}


def write_run(folder: Path, ranks: int, shapes: Shapes) -> tuple[Path, dict[str, TreeEntry]]:
    """A checkpoint of `ranks` ranks, as `saver.py` writes it."""
    def note(shape: Sequence[int]) -> dict[str, Any]:
        return {_SPREAD: list(shape), "dtype": "float32", "rows": rows_of(shape, ranks)}

    moments = {name: {"exp_avg": note(shape), "exp_avg_sq": note(shape)} for name, shape in shapes.items()}
    common = {"model": {name: note(shape) for name, shape in shapes.items()}, "optimizer": {"state": moments}}
    path = folder / "step-00000001"
    path.mkdir(parents=True)
    with open_directory(path) as directory:
        entries = write_trees(directory, snapshot_trees(common).trees)
        for rank in range(ranks):
            own = {tree_of_rank(rank): tree_of(rank, ranks, shapes)}
            entries.update(write_trees(directory, snapshot_trees(own).trees))
        write_file(directory, "manifest.json", [seal_manifest(Manifest(1, None, entries, {}, {}))])
    return path, entries


def test_a_manifest_of_4096_ranks_is_far_below_its_limit_whatever_the_number_of_parameters(tmp_path: Path) -> None:
    shapes = {f"layers.{index}.weight": (8, 2) for index in range(300)}
    _, entries = write_run(tmp_path, 1, shapes)
    own = entries.pop(tree_of_rank(0))
    assert own.structure.size > 70_000  # 900 tensors, each with its type, shape and checksum
    trees = {**entries, **{tree_of_rank(rank): own for rank in range(4096)}}
    sealed = seal_manifest(Manifest(1, None, trees, {}, {}))
    assert len(sealed) < MAX_JSON_BYTES / 30
    tracemalloc.start()
    try:
        manifest = open_manifest(sealed)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    assert manifest.trees == trees


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """32 more files than are open now: fewer than the run has ranks. No garbage collection gives any back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    gc.disable()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 32, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    gc.enable()


SHAPES: Shapes = {"matrix": (500, 3), "vector": (130,), "few": (5, 2), "even": (200, 2)}


def test_a_rank_reads_the_files_that_hold_its_rows_and_no_others(tmp_path: Path, few_descriptors: None) -> None:
    path, _ = write_run(tmp_path, 100, SHAPES)
    assert verify_checkpoint(path) == []
    trees = load_checkpoint(path)
    for name, shape in SHAPES.items():
        assert trees["model"][name].equal(whole(name, shape))
        assert trees["optimizer"]["state"][name]["exp_avg"].equal(whole(name, shape))
    own = load_checkpoint(path, [tree_of_rank(7)])[tree_of_rank(7)]
    assert set(own) == {"rng"} and own["rng"]["torch"].shape == (16,)  # without a mapping of its parts
    for file in path.glob("rank_*"):  # rank 1 of 4 needs rows 125 to 249, of 5 each; without their neighbours' files
        if int(file.stem.removeprefix("rank_")) not in (*range(25, 50), 2, 3):
            file.unlink()
    trees = load_checkpoint(path, whole=False, hashed=False)
    for tree in (trees["model"], {name: state["exp_avg"] for name, state in trees["optimizer"]["state"].items()}):
        assert isinstance(tree["matrix"], Pieces)
        assert tree["matrix"].cut((125, 0), (125, 3)).equal(whole("matrix", (500, 3))[125:250])
        assert tree["vector"].cut((50,), (40,)).equal(whole("vector", (130,))[50:90])
        assert tree["few"].cut((2, 0), (2, 2)).equal(whole("few", (5, 2))[2:4])
    with pytest.raises(ValueError, match=r"rank_00000\.json"):
        trees["model"]["matrix"].cut((0, 0), (6, 3))
    (path / "rank_00025.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rank_00025\.safetensors"):
        trees["model"]["matrix"].cut((125, 0), (1, 3))


@pytest.mark.parametrize(("rank", "ranks"), [(0, 8), (7, 8), (0, 4096), (33, 4096), (4095, 4096)])
def test_the_note_of_a_spread_tensor_says_where_each_ranks_rows_are(rank: int, ranks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        hybrid = init_device_mesh("cpu", (2, ranks // 2))
        for size in (1, 5, 8, 1009, 8192):
            spread = distribute_tensor(torch.zeros(size, 2), mesh, [Shard(0)])
            copied = distribute_tensor(torch.zeros(size, 2), hybrid, [Replicate(), Shard(0)])
            note = divided({"model": {"w": spread, "h": copied}})[0]["model"]
            for tensor, at, own in ((spread, note["w"], rank), (copied, note["h"], rank % (ranks // 2))):
                (start, _), (rows, _) = box_of(tensor)
                assert not rows or (start == own * at["rows"] and rows == min(at["rows"], size - start))
        columns = distribute_tensor(torch.zeros(8, 16), mesh, [Shard(1)])
        assert divided({"model": {"w": columns}})[0]["model"]["w"]["rows"] is None
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_4096_ranks_in_figures(tmp_path: Path, few_descriptors: None) -> None:
    """Prints what the manifest, one rank's load and a verification cost."""
    ranks, shapes = 4096, {f"layers.{index // 10}.matrix.{index % 10}.weight": (4096, 2) for index in range(300)}
    write_run(tmp_path, ranks, shapes)
    path = list_checkpoints(tmp_path)[-1]

    def timed(what: str, function: Any, *, traced: bool = True) -> None:
        if traced:  # slower by a factor of three
            tracemalloc.start()
        start = time.perf_counter()
        function()
        seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"{what}: {seconds:.2f} s" + (f", {peak / 2**20:.1f} MiB of Python's memory" if traced else ""))

    def one_rank() -> None:
        trees = load_checkpoint(path, whole=False, hashed=False)
        for name in shapes:
            got = [trees["model"][name], *trees["optimizer"]["state"][name].values()]
            assert all(pieces.cut((2048, 0), (2, 2)).equal(whole(name, (4096, 2))[2048:2050]) for pieces in got)

    size = (path / "manifest.json").stat().st_size
    print(f"manifest of {ranks} ranks x {3 * len(shapes)} tensors: {size / 2**20:.2f} MiB")
    timed("reading it", lambda: read_manifest(path))
    timed("one of 2048 ranks loads its rows", one_rank)
    names = [tree_of_rank(rank) for rank in range(0, ranks, 64)]
    timed("one of 64 ranks verifies its share", lambda: verify_checkpoint(path, names=names))
    timed("one process loads all", lambda: load_checkpoint(path), traced=False)
