"""Checkpoints in good weather: what goes in comes out exactly, in bounded memory, and the right ones are kept."""

from __future__ import annotations

import collections
import fcntl
import gc
import math
import multiprocessing
import os
import struct
import tempfile
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttrain.checkpointing import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_into,
    read_manifest,
    save_checkpoint,
    snapshot_trees,
    verify_checkpoint,
    write_snapshot,
)
from fasttrain.retention import prune_checkpoints
from fasttrain.saver import Arena
from fasttrain.tensorfile import DTYPES, parse_header
from fasttrain.trees import dump_json, flatten_tree, parse_json, transform_tensors, unflatten_tree

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # hundreds of saves need no disk
DISK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def raw(tensor: torch.Tensor) -> bytes:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def same(a: Any, b: Any) -> bool:
    """Equal in value, type and bits, all the way down."""
    if isinstance(a, torch.Tensor):
        return (isinstance(b, torch.Tensor) and a.dtype is b.dtype and a.shape == b.shape and raw(a) == raw(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, dict):
        return (len(a) == len(b) and all(type(k) is type(m) and k == m for k, m in zip(a, b))
                and all(same(a[key], b[key]) for key in a))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int, form: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        bits &= 1
    tensor = bits.view(dtype).reshape(shape)
    if form == "strided" and tensor.dim():
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if form == "transposed" and tensor.dim():
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if form == "expanded" and tensor.dim() and len(tensor):
        return tensor[:1].expand(3, *tensor.shape[1:])
    if form == "conj" and dtype is torch.complex64:
        return tensor.conj()
    return tensor


TENSORS = st.builds(tensor_of, st.sampled_from(list(DTYPES.values())), st.sampled_from(
    [(), (0,), (1,), (3,), (2, 3), (0, 4), (4, 0, 2), (2, 1, 3)]), st.integers(0, 9),
    st.sampled_from(["plain", "strided", "transposed", "expanded", "conj"]))
FLOATS = st.one_of(st.floats(), st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", n.to_bytes(8, "big"))[0]))
INTS = st.one_of(st.integers(), st.integers(-2**128, 2**128))
TEXTS = st.one_of(st.text(), st.sampled_from(["$tensor", "$", "a/b", "..", "", "ключ", "\ud800", "\x00", "a" * 600]))
LEAVES = st.one_of(st.none(), st.booleans(), INTS, FLOATS, TEXTS, TENSORS)
KEYS = st.one_of(TEXTS, INTS, st.booleans(), st.none(), st.floats(allow_nan=False))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=20)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_any_tree_comes_back_exactly_from_its_json_and_tensors(tree: Any) -> None:
    structure, tensors = flatten_tree(tree, "tree")
    assert same(unflatten_tree(parse_json(dump_json(structure), "text"), tensors, "tree"), tree)


def test_a_trees_tensors_go_when_the_last_name_for_them_goes_without_a_garbage_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        structure, tensors = flatten_tree({"a": torch.zeros(3)}, "tree")
        copied = transform_tensors({"a": tensors["a"]}, torch.clone)
        back = unflatten_tree(structure, tensors, "tree")
        seen = [weakref.ref(tensors["a"]), weakref.ref(copied["a"]), weakref.ref(back["a"])]
        del structure, tensors, copied, back
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()


@DISK
@given(st.dictionaries(st.sampled_from(["model", "optimizer", "a", "b_2"]), TREES, min_size=1),
       st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), INTS, FLOATS, TEXTS), max_size=4))
def test_any_trees_come_back_exactly_from_the_disk(trees: dict[str, Any], metadata: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as root:
        path = save_checkpoint(root, 7, trees, metadata=metadata)
        assert verify_checkpoint(path) == []
        loaded = load_checkpoint(path)
        assert loaded.keys() == trees.keys() and all(same(loaded[name], trees[name]) for name in trees)
        assert same(dict(read_manifest(path).metadata), metadata) and read_manifest(path).step == 7


@pytest.mark.parametrize("name", list(DTYPES))
def test_the_safetensors_library_reads_the_same_tensors(tmp_path: Path, name: str) -> None:
    from safetensors import safe_open

    tensors = {f"layer.{i}.weight": tensor_of(DTYPES[name], shape, i, "plain")
               for i, shape in enumerate([(), (3,), (2, 5), (0, 2)])}
    tensors["other"] = torch.arange(3.0)
    path = save_checkpoint(tmp_path, 1, {"model": tensors}, metadata={})
    with safe_open(path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors) and file.metadata() == {"format": "pt"}
        for key, tensor in tensors.items():
            assert same(file.get_tensor(key), tensor)


def test_tensors_of_one_element_or_none_may_have_any_stride(tmp_path: Path) -> None:
    tensors = {f"{dtype}{count}": torch.zeros(4, dtype=dtype).as_strided((count,), (2,))
               for dtype in (torch.int16, torch.float32, torch.bool) for count in (0, 1)}
    assert same(load_checkpoint(save_checkpoint(tmp_path, 1, {"model": tensors}, metadata={})),
                {"model": tensors})


def test_every_tensor_is_aligned_to_its_own_width_so_that_none_is_copied_on_load(tmp_path: Path) -> None:
    tensors = {f"{i}{name}": tensor_of(dtype, (3,), i, "plain") for i, (name, dtype) in enumerate(DTYPES.items())}
    file = save_checkpoint(tmp_path, 1, {"model": tensors}, metadata={}) / "model.safetensors"
    specs = parse_header(file.read_bytes(), file.stat().st_size, "file")
    assert len(specs) == len(DTYPES) and all(spec.start % DTYPES[spec.dtype].itemsize == 0 for spec in specs.values())


def test_tied_weights_are_stored_once_and_come_back_as_one_tensor(tmp_path: Path) -> None:
    shared, buffer = torch.randn(300, 300), torch.randn(10)
    trees = {"model": {"embed": shared, "head": shared, "left": buffer[:6], "right": buffer[4:], "t": shared.T}}
    path = save_checkpoint(tmp_path, 1, trees, metadata={})
    model = load_checkpoint(path)["model"]
    assert model["embed"] is model["head"]
    assert same(model, trees["model"])
    model["left"][5] = 99.0  # overlapping views that differ are copies
    assert model["right"][1] == buffer[5]
    assert (path / "model.safetensors").stat().st_size < 2 * 300 * 300 * 4 + 5000


@pytest.mark.parametrize("scheduler", ["multistep", "onecycle", "cosine", "lambda"])
def test_real_optimizer_and_scheduler_states_continue_bit_for_bit(tmp_path: Path, scheduler: str) -> None:
    def build() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)).bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=np.float64(0.01))
        schedulers = torch.optim.lr_scheduler
        return model, optimizer, {
            "multistep": lambda: schedulers.MultiStepLR(optimizer, [2, 2, 5]),
            "onecycle": lambda: schedulers.OneCycleLR(optimizer, 0.1, total_steps=20),
            "cosine": lambda: schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
            "lambda": lambda: schedulers.LambdaLR(optimizer, lambda step: 0.9**step),
        }[scheduler]()

    def train(parts: tuple[Any, Any, Any], steps: int) -> None:
        model, optimizer, schedule = parts
        for _ in range(steps):
            model(torch.ones(3, 4, dtype=torch.bfloat16) * torch.arange(1, 4)[:, None]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    parts, other = build(), build()
    train(parts, 3)
    path = save_checkpoint(tmp_path, 3, {"model": parts[0].state_dict(), "optimizer": parts[1].state_dict(),
                                         "scheduler": parts[2].state_dict()}, metadata={})
    train(parts, 4)
    trees = load_checkpoint(path)
    for part, name in zip(other, ("model", "optimizer", "scheduler")):
        part.load_state_dict(trees[name])
    train(other, 4)
    assert same(dict(parts[0].state_dict()), dict(other[0].state_dict()))
    assert same(parts[1].state_dict()["state"], other[1].state_dict()["state"])
    assert parts[1].state_dict()["param_groups"] == other[1].state_dict()["param_groups"]
    assert parts[2].get_last_lr() == other[2].get_last_lr()


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize("value", [
    object(), {1, 2}, b"bytes", np.zeros(3), 1j, Point(1, 2), torch.float32, torch.device("cpu"), Path("x"), print,
    torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse(), torch.empty(2, device="meta"),
    collections.defaultdict(list), collections.OrderedDict([((1, 2), 3)]), 10**100],
    ids=lambda value: str(value).split(" at 0x")[0][:30])
def test_what_is_not_plain_data_is_refused_by_its_place_and_nothing_is_written(tmp_path: Path, value: object) -> None:
    place = r"callbacks.*stop.*best.*0|tensor 'stop/best/0' is torch.complex"
    with pytest.raises((TypeError, ValueError), match=place):
        save_checkpoint(tmp_path, 1, {"callbacks": {"stop": {"best": [value]}}}, metadata={})
    assert os.listdir(tmp_path) == []


def test_bad_names_steps_and_metadata_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    for step, trees, metadata in [(-1, {}, {}), (True, {}, {}), (10**15, {}, {}), (1.0, {}, {}), (1, {"a/b": 1}, {}),
                                  (1, {"manifest": 1}, {}), (1, {"Model": 1}, {}), (1, {"a": cycle}, {}),
                                  (1, {"": 1}, {}), (1, {}, {"x": object()}), (1, {}, {"x": torch.zeros(1)})]:
        with pytest.raises((ValueError, TypeError)):
            save_checkpoint(tmp_path, step, trees, metadata=metadata)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_what_the_reader_would_refuse_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.tensorfile.MAX_TENSORS", 5)
    monkeypatch.setattr("fasttrain.trees.FREE_BYTES", 10_000)
    with pytest.raises(ValueError, match="'model' holds 6 tensors"):
        save_checkpoint(tmp_path, 1, {"model": [torch.zeros(i) for i in range(6)]}, metadata={})
    with pytest.raises(ValueError, match=r"'data'.*keep long lists in tensors"):
        save_checkpoint(tmp_path, 1, {"data": list(range(60))}, metadata={})
    with pytest.raises(ValueError, match=r"manifest.*keep long lists in tensors"):
        save_checkpoint(tmp_path, 1, {}, metadata={"history": list(range(60))})
    assert os.listdir(tmp_path) == []


def test_names_choose_trees_and_a_wrong_one_is_told_the_right_ones(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}, "rng": [1]}, metadata={})
    assert load_checkpoint(path, ["rng"]) == {"rng": [1]}
    with pytest.raises(ValueError, match=r"no tree 'optimizer'.*'model', 'rng'"):
        load_checkpoint(path, ["optimizer"])
    (path / "model.safetensors").unlink()
    assert load_checkpoint(path, ["rng"]) == {"rng": [1]}
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
        load_checkpoint(path)


def test_manifest_records_parent_versions_and_hashes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"model": {"w": torch.ones(2)}}, metadata={})
    manifest = read_manifest(save_checkpoint(tmp_path, 9, {"model": {"w": torch.ones(2)}}, metadata={"val_loss": 1.5}))
    assert manifest.parent_step == 5 and manifest.libraries["torch"] == torch.__version__
    entry = manifest.trees["model"].tensors["w"]
    assert (entry.dtype, entry.shape, len(entry.checksum)) == ("F32", (2,), 16)
    assert read_manifest(tmp_path / "step-00000005").parent_step is None


def test_loaded_tensors_are_writable_without_touching_the_file_and_outlive_it(tmp_path: Path) -> None:
    weights = torch.randn(1000)
    path = save_checkpoint(tmp_path, 1, {"model": {"w": weights}}, metadata={})
    loaded = load_checkpoint(path)["model"]["w"]
    loaded[:500] = 0.0
    assert verify_checkpoint(path) == []
    save_checkpoint(tmp_path, 2, {}, metadata={})
    assert prune_checkpoints(tmp_path, keep_last=1, keep_best=0) == [path]
    assert torch.equal(loaded[500:], weights[500:]) and not loaded[:500].any()


def test_saving_what_was_loaded_over_itself_keeps_both(tmp_path: Path) -> None:
    trees = {"model": {"w": torch.randn(5000), "b": torch.randn(3)}}
    path = save_checkpoint(tmp_path, 1, trees, metadata={})
    loaded = load_checkpoint(path)
    assert save_checkpoint(tmp_path, 1, loaded, metadata={}) == path
    assert same(loaded, trees) and same(load_checkpoint(path), trees)
    assert os.listdir(tmp_path) == [path.name]


def anonymous_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def test_neither_saving_nor_loading_makes_a_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 64 * 2**20
    tensors = {f"w{i}": torch.full((size // 16,), float(i)) for i in range(4)}
    tensors["w0"] = tensors["w0"].reshape(2, -1).T.contiguous().T  # not contiguous: copied alone
    before, seen, write = anonymous_memory(), [0], os.write

    def spy(descriptor: int, data: Any) -> int:
        seen.append(anonymous_memory())
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", spy)
    path = save_checkpoint(tmp_path, 1, {"model": tensors}, metadata={})
    assert max(seen) - before < size // 4 + 8 * 2**20
    target = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    before = anonymous_memory()
    loaded = load_checkpoint(path)
    assert sum(float(tensor[..., -1].sum()) for tensor in loaded["model"].values()) == 6.0
    load_into(path, "model", target)
    assert anonymous_memory() - before < size // 4
    assert same(target, tensors)


def test_load_into_fills_in_place_or_changes_nothing(tmp_path: Path) -> None:
    source = {"a": torch.randn(3), "b": [torch.randn(2, 2), 5]}
    path = save_checkpoint(tmp_path, 1, {"model": source}, metadata={})
    target = {"a": torch.zeros(3), "b": [torch.zeros(2, 2), 6]}
    first, second = target["a"], target["b"][0]  # type: ignore[index]
    load_into(path, "model", target)
    assert same(target["a"], source["a"]) and same(second, source["b"][0]) and target["b"][1] == 6  # type: ignore[index]
    assert target["a"] is first
    for bad, message in [({"a": torch.zeros(3)}, r"only in the checkpoint.*'b'"),
                         ({"a": torch.zeros(3), "b": [torch.zeros(2, 3)]}, r"model\['b'\]\[0\] is \(2, 2\)"),
                         ({"a": torch.zeros(3), "b": [torch.zeros(2, 2).double()]}, "float64")]:
        with pytest.raises(ValueError, match=message):
            load_into(path, "model", bad)
        assert not bad["a"].any()  # type: ignore[attr-defined]


def test_a_copied_snapshot_does_not_see_later_changes(tmp_path: Path) -> None:
    weights, history = torch.randn(100).expand(4, 100), [1, 2]
    trees = {"model": {"w": weights, "tied": weights}, "loop": history}
    expected = {"model": {"w": weights.clone(), "tied": weights.clone()}, "loop": [1, 2]}
    snapshot = Arena().copy(snapshot_trees(trees))
    weights[0].zero_()
    history.append(3)
    loaded = load_checkpoint(write_snapshot(tmp_path, 1, snapshot, metadata={}))
    assert same(loaded, expected) and loaded["model"]["w"] is loaded["model"]["tied"]


def test_checkpoints_are_listed_by_number_and_nothing_else_is(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "missing") == []
    for step in (3, 123456789, 20):
        save_checkpoint(tmp_path, step, {}, metadata={})
    for name in ("step-1", "step-00000004.tmp", "step-000000005", "latest", ".inflight-1-2-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000007").write_bytes(b"")
    (tmp_path / "step-00000008").symlink_to("step-00000003")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000020", "step-123456789"]


def test_an_empty_or_missing_root_has_no_latest_and_says_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    assert latest_checkpoint(tmp_path, log=lines.append) is None
    assert latest_checkpoint(tmp_path / "missing", log=lines.append) is None
    assert lines == []


def test_a_renamed_step_directory_is_refused_and_a_copy_under_another_name_loads(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, {"loop": [1]}, metadata={})
    path.rename(tmp_path / "step-00000004")
    assert "step 3" in verify_checkpoint(tmp_path / "step-00000004")[0]
    (tmp_path / "step-00000004").rename(tmp_path / "my-model")
    (tmp_path / "link").symlink_to("my-model")
    assert load_checkpoint(tmp_path / "my-model") == load_checkpoint(tmp_path / "link") == {"loop": [1]}


LOSSES = st.one_of(st.none(), st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from([0.5, 1.0, 2]))


@DISK
@given(losses=st.lists(LOSSES, min_size=1, max_size=8), keep_last=st.integers(0, 4), keep_best=st.integers(0, 3),
       protect=st.sets(st.integers(0, 7)), damage=st.sampled_from(["none", "none", "newest", "oldest manifest"]))
def test_pruning_keeps_exactly_the_last_the_best_the_protected_and_a_finite_one(
        losses: list[float | None], keep_last: int, keep_best: int, protect: set[int], damage: str) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as root:
        paths = [save_checkpoint(root, step, {"loop": step}, metadata={"val_loss": loss})
                 for step, loss in enumerate(losses)]
        steps = list(range(len(losses)))
        if damage == "newest":
            (paths[-1] / "loop.json").write_bytes(b"")
        if damage == "oldest manifest" and len(paths) > 1:
            (paths[0] / "manifest.json").unlink()
            del steps[0]  # neither counted nor removed
        finite = [step for step in steps if (loss := losses[step]) is not None and math.isfinite(loss)]
        wanted = set(steps[-keep_last:] if keep_last else steps) | (protect & set(steps))
        pool = set(finite)
        for _ in range(min(keep_best, len(pool))):
            lowest = min(float(losses[step]) for step in pool)  # type: ignore[arg-type]
            wanted.add(best := max(step for step in pool if losses[step] == lowest))
            pool.remove(best)
        if finite and any(losses[step] is not None for step in steps if step > finite[-1]):
            wanted.add(finite[-1])
        if damage == "newest" or keep_last == 0:
            wanted = set(steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            removed = prune_checkpoints(root, keep_last=keep_last, keep_best=keep_best,
                                        protect=[f"{root}/step-{step:08d}" for step in protect])
        assert bool(caught) == (damage == "newest" and keep_last > 0)
        assert removed == [paths[step] for step in steps if step not in wanted]
        assert list_checkpoints(root) == [path for path in paths if path not in removed]
        assert not [name for name in os.listdir(root) if name.startswith(".")]


@pytest.mark.parametrize("losses, keep_best, kept", [
    ([1.0, math.nan, math.nan], 0, [0, 2]), ([1.0, 2.0, math.inf], 0, [1, 2]), ([1.0, 2.0, math.inf], 1, [0, 1, 2]),
    ([1.0, None, None], 0, [2]), ([math.nan, 1.0, 2.0], 0, [2]), ([math.nan, 1.0, None], 1, [1, 2]),
    ([math.nan, math.nan], 1, [1]), ([-math.inf, 5.0, 6.0], 1, [1, 2]), ([1.0, 1.0, 3.0], 1, [1, 2])])
def test_a_run_that_turned_nan_keeps_its_last_finite_checkpoint_and_others_nothing_more(
        tmp_path: Path, losses: list[float | None], keep_best: int, kept: list[int]) -> None:
    for step, loss in enumerate(losses):
        save_checkpoint(tmp_path, step, {}, metadata={"val_loss": loss})
    prune_checkpoints(tmp_path, keep_last=1, keep_best=keep_best)
    assert [read_manifest(path).step for path in list_checkpoints(tmp_path)] == kept


def test_pruning_refuses_negative_counts_and_survives_an_empty_root(tmp_path: Path) -> None:
    assert prune_checkpoints(tmp_path, keep_last=1, keep_best=1) == []
    for keep_last, keep_best in ((-1, 0), (1, -1)):
        with pytest.raises(ValueError, match="none may be negative"):
            prune_checkpoints(tmp_path, keep_last=keep_last, keep_best=keep_best)


def busy_writer(root: str, number: int, rounds: int) -> None:
    for index in range(rounds):
        step = index * 2 + number if index % 3 else index * 2  # each third step is written by both
        save_checkpoint(root, step, {"model": {"w": torch.full((500,), float(step))}}, metadata={"val_loss": 1.0})
        prune_checkpoints(root, keep_last=2, keep_best=1)


def test_two_processes_may_save_replace_and_prune_while_a_third_loads(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=busy_writer, args=(str(tmp_path), number, 60)) for number in range(2)]
    for writer in writers:
        writer.start()
    loads, lines = 0, list[str]()
    while any(writer.is_alive() for writer in writers):
        path = latest_checkpoint(tmp_path, log=lines.append)
        if path is not None:
            try:
                weights = load_checkpoint(path)["model"]["w"]
            except CheckpointError:
                continue  # pruned or replaced between the two calls
            loads += 1
            assert weights.unique().tolist() == [float(path.name[5:].rstrip("~"))]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0] and loads > 0
    assert lines == [], "what was replaced or pruned meanwhile is no damage"
    save_checkpoint(tmp_path, 1000, {}, metadata={})
    assert all(name.startswith("step-") and not name.endswith("~") for name in os.listdir(tmp_path))


def test_publishing_waits_for_another_process_that_is_renaming(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {}, metadata={})
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    writer = threading.Thread(target=save_checkpoint, args=(tmp_path, 2, {}), kwargs={"metadata": {}})
    writer.start()
    while not list(tmp_path.glob(".inflight-*/manifest.json")):
        assert writer.is_alive()
    writer.join(0.1)
    assert writer.is_alive() and [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    os.close(descriptor)
    writer.join()
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]
