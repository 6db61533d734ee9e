"""Checkpoints in bad weather: killed writers, full disks, rotten bits, hostile files.

Every trial ends with the same question: does `latest_checkpoint` give a state that was really saved, and nothing else?
Random choices are seeded; each count is asserted, so that a harness that tries nothing fails.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import checkpointing, tensorfile
from fasttrain.checkpointing import (
    CheckpointError,
    CheckpointSpaceError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_into,
    read_manifest,
    save_checkpoint,
    verify_checkpoint,
)
from fasttrain.retention import prune_checkpoints
from fasttrain.storage import collect_orphans
from fasttrain.trees import parse_json

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of fsyncs: the order matters, not the disk
DURABLE_CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def trees_of(mark: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((40,), mark), "b": torch.tensor(mark)}, "loop": {"mark": mark, "t": (1, None)}}


def save(root: Path, step: int, mark: float | None = None) -> Path:
    value = float(step) if mark is None else mark
    return save_checkpoint(root, step, trees_of(value), metadata={"val_loss": value})


def mark_of(path: Path | None) -> float | None:
    """The one number that a whole, unmixed checkpoint is made of."""
    if path is None:
        return None
    trees = load_checkpoint(path)
    marks = {*trees["model"]["w"].tolist(), trees["model"]["b"].item(), trees["loop"]["mark"],
             read_manifest(path).metadata["val_loss"]}
    assert len(marks) == 1, f"{path} mixes {marks}"
    return float(marks.pop())


def latest(root: Path) -> float | None:
    return mark_of(latest_checkpoint(root, log=lambda line: None))


def patched(calls: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    real = {name: getattr(os, name) for name in calls}
    try:
        for name, call in calls.items():
            setattr(os, name, call)
        yield
    finally:
        for name, call in real.items():
            setattr(os, name, call)


def counted(action: Callable[[int, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> dict[str, Any]:
    """Wrappers for the calls that change the disk (an `open` if it creates); each, numbered, is handed to `action`."""
    count = [0]

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            count[0] += 1
            return action(count[0], name, real, args, options)
        return call

    return {name: wrap(name, getattr(os, name)) for name in DURABLE_CALLS}


def die_at(k: int, torn: bool, work: Callable[[], object]) -> bool:
    """Runs `work` in a forked child that vanishes at its k-th durable call; True if it lived to the end."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def action(number: int, name: str, real: Callable[..., Any], args: Any, options: Any) -> Any:
        if number == k:
            if torn and name == "write":
                real(args[0], args[1][:len(args[1]) // 2])
            elif torn:
                real(*args, **options)  # dies after the call instead of before
            os._exit(9)
        return real(*args, **options)

    try:
        for _ in patched(counted(action)):
            work()
        os._exit(0)
    finally:
        os._exit(1)


SCENARIOS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], set[float | None]]] = {
    "first save": (lambda root: None, lambda root: save(root, 1), {None, 1.0}),
    "next save": (lambda root: save(root, 1), lambda root: save(root, 2), {1.0, 2.0}),
    "replacing the only one": (lambda root: save(root, 1), lambda root: save(root, 1, 7.0), {1.0, 7.0}),
    "pruning": (lambda root: [save(root, step) for step in (1, 2, 3)],
                lambda root: prune_checkpoints(root, keep_last=1, keep_best=0), {3.0}),
    "collecting a half-done replacement": (
        lambda root: (save(root, 1), os.rename(root / "step-00000001", root / "step-00000001~")),
        lambda root: save(root, 1, 7.0), {1.0, 7.0}),
    "collecting what a replacement left": (
        lambda root: (save(root, 1), os.rename(root / "step-00000001", root / "step-00000001~"),
                      save(root / "x", 1, 7.0), os.rename(root / "x" / "step-00000001", root / "step-00000001"),
                      os.rmdir(root / "x")),
        lambda root: save(root, 2), {7.0, 2.0}),
    "replacing a damaged one that has a good copy": (
        lambda root: (save(root, 1), shutil.copytree(root / "step-00000001", root / "step-00000001~"),
                      os.truncate(root / "step-00000001" / "loop.json", 3)),
        lambda root: save(root, 1, 7.0), {1.0, 7.0}),
}


def assert_next_save_works_and_cleans_up(root: Path) -> None:
    save(root, 9)
    assert latest(root) == 9.0
    assert all(name.startswith("step-") and not name.endswith("~") for name in os.listdir(root)), os.listdir(root)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_any_durable_call_the_state_before_or_after_is_there_and_the_next_save_works(
        tmp_path: Path, scenario: str) -> None:
    prepare, work, allowed = SCENARIOS[scenario]
    seen, trials = set(), 0
    for torn in (False, True):
        for k in range(1, 1000):
            root = tmp_path / f"{torn}{k}"
            root.mkdir()
            prepare(root)
            lived = die_at(k, torn, lambda root=root: work(root))  # type: ignore[misc]
            state = latest(root)
            assert state in allowed, f"killed at call {k}: {state}"
            seen.add(state)
            trials += 1
            assert_next_save_works_and_cleans_up(root)
            if lived:
                break
            shutil.rmtree(root)
    assert trials > 10 and seen == allowed


def test_killed_at_random_instants_the_last_finished_or_the_running_save_is_there(tmp_path: Path) -> None:
    chance, root, killed = random.Random(0), tmp_path / "root", 0
    for _ in range(40):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for step in range(1000):
                    save(root, step // 2, step)  # each second save replaces
                    prune_checkpoints(root, keep_last=2, keep_best=0)
                    os.write(write, b"%d\n" % step)
            finally:
                os._exit(1)
        os.close(write)
        first = os.read(read, 4)
        time.sleep(chance.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(read, "rb") as rest:
            finished = int((first + rest.read()).split()[-1])
        marks = {mark_of(path) for path in list_checkpoints(root)}
        assert max(mark for mark in marks if mark is not None) in (finished, finished + 1)
        killed += 1
        shutil.rmtree(root)
    assert killed == 40


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("scenario", ["first save", "next save", "replacing the only one", "pruning"])
def test_an_error_of_any_durable_call_is_raised_and_costs_no_checkpoint(
        tmp_path: Path, scenario: str, persistent: bool, number: int) -> None:
    prepare, work, allowed = SCENARIOS[scenario]
    raised = 0
    for k in range(1, 1000):
        root = tmp_path / f"{k}"
        root.mkdir()
        prepare(root)
        failed = [False]

        def action(count: int, name: str, real: Callable[..., Any], args: Any, options: Any, k: int = k,
                   failed: list[bool] = failed) -> Any:
            if count == k or (persistent and count > k):
                failed[0] = True
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        error: OSError | None = None
        try:
            for _ in patched(counted(action)):
                work(root)
        except OSError as caught:
            error = caught
        state = latest(root)
        assert state in allowed
        if error is not None:
            raised += 1
            assert error.errno == (errno.ENOSPC if isinstance(error, CheckpointSpaceError) else number)
            if not persistent:
                assert not [name for name in os.listdir(root) if name.startswith(".inflight")]
                assert scenario != "replacing the only one" or (root / "step-00000001").exists()
        elif scenario != "pruning":
            assert state == [mark for mark in (1.0, 2.0, 7.0) if mark in allowed][-1], "it said that it had saved"
        assert_next_save_works_and_cleans_up(root)
        if not failed[0]:
            break
    assert raised >= (2 if scenario == "pruning" else 10)  # what fails while removing is left to a later collection


def test_a_disk_that_fills_up_while_writing_is_reported_with_path_and_bytes(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def action(count: int, name: str, real: Callable[..., Any], args: Any, options: Any) -> Any:
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **options)

    with pytest.raises(CheckpointSpaceError, match="free") as caught:
        for _ in patched(counted(action)):
            save(tmp_path, 2)
    assert caught.value.path == tmp_path and caught.value.needed > 160 and str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == ["step-00000001"] and latest(tmp_path) == 1.0


def test_space_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    save(tmp_path, 1)
    huge = torch.zeros(1).expand(2**58)  # a view: 2^60 bytes only if written
    with pytest.raises(CheckpointSpaceError) as caught:
        save_checkpoint(tmp_path, 2, {"model": {"w": huge}}, metadata={})
    assert caught.value.needed >= 2**60 and os.listdir(tmp_path) == ["step-00000001"]


def test_a_real_limit_of_the_kernel_mid_write_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    large = torch.zeros(100_000)  # made here: a forked child has lost the threads that would fill it
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                save_checkpoint(tmp_path, 2, {"model": {"w": large}}, metadata={})
            except OSError as error:
                os._exit(42 if error.errno == errno.EFBIG and str(tmp_path) in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert os.listdir(tmp_path) == ["step-00000001"] and latest(tmp_path) == 1.0


def test_everything_is_fsynced_before_the_rename_that_publishes_it(tmp_path: Path) -> None:
    """The order that a power cut needs: files, manifest last, their directory, the rename, the parent."""
    root, steps = tmp_path / "root", list[tuple[str, str]]()
    save(root, 1)

    def name_of(descriptor: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return "private" if path.name.startswith(".inflight") else path.name

    def action(count: int, name: str, real: Callable[..., Any], args: Any, options: Any) -> Any:
        if name in ("write", "fsync"):
            steps.append((name, name_of(args[0])))
        elif name == "rename":
            steps.append((name, " ".join("private" if "inflight" in str(arg) else Path(arg).name for arg in args)))
        return real(*args, **options)

    for _ in patched(counted(action)):
        save(root, 1, 7.0)
    shape = [step for i, step in enumerate(steps) if step != steps[i - 1]]  # a file may take several writes
    files = [("write", "model.json"), ("fsync", "model.json"), ("write", "loop.json"), ("fsync", "loop.json"),
             ("write", "model.safetensors"), ("fsync", "model.safetensors")]
    assert shape == [
        *files, ("write", "manifest.json"), ("fsync", "manifest.json"), ("fsync", "private"),
        ("rename", "step-00000001 step-00000001~"), ("fsync", "root"), ("rename", "private step-00000001"),
        ("fsync", "root"), ("rename", "step-00000001~ private")]


# ---------------------------------------------------------------------------------------------------------- corruption

Damage = Callable[[Path], object]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A good step 1 and a step 2 to be damaged."""
    save(tmp_path, 1)
    return tmp_path, save(tmp_path, 2)


def assert_refused(root: Path, path: Path) -> None:
    assert verify_checkpoint(path) != []
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    with pytest.raises((CheckpointError, ValueError)):
        load_into(path, "model", trees_of(0.0)["model"])
        load_checkpoint(path, ["loop"])
    lines: list[str] = []
    found = latest_checkpoint(root, log=lines.append)
    assert found is not None and found.name == "step-00000001" and mark_of(found) == 1.0
    assert any(str(path) in line for line in lines), "fell back in silence"


def test_every_flipped_bit_is_found_and_the_previous_checkpoint_used(two: tuple[Path, Path]) -> None:
    root, path = two
    chance, flips = random.Random(0), 0
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        places = {0, 7, 8, len(good) // 2, len(good) - 1, *(chance.randrange(len(good)) for _ in range(130))}
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << chance.randrange(8)
            file.write_bytes(bad)
            assert_refused(root, path)
            flips += 1
        file.write_bytes(good)
    assert flips >= 300 and verify_checkpoint(path) == []


def test_truncated_extended_and_zeroed_files_are_found(two: tuple[Path, Path]) -> None:
    root, path = two
    cases = 0
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        cuts = {good[:len(good) * percent // 100] for percent in range(100)} | {good[:-1]}
        longer = [good + b"\0", good + b" ", good + b"\n", good + good]
        for bad in [*cuts, *longer, b"\0" * len(good), good[1:] + good[:1]]:
            file.write_bytes(bad)
            assert_refused(root, path)
            cases += 1
        file.write_bytes(good)
    assert cases > 300 and verify_checkpoint(path) == []


def contents(path: Path) -> dict[str, bytes | None]:
    return {file.name: file.read_bytes() if stat.S_ISREG(file.lstat().st_mode) else None for file in path.iterdir()}


def test_swapped_missing_and_replaced_files_are_found(two: tuple[Path, Path], tmp_path: Path) -> None:
    root, path = two
    other = root / "step-00000001"
    backup = tmp_path / "backup"
    shutil.copytree(path, backup)
    names = sorted(os.listdir(path))
    damages: list[Damage] = []
    for name in names:
        damages += [lambda p, n=name: (p / n).unlink(), lambda p, n=name: shutil.copy(other / n, p / n)]
        damages += [lambda p, n=name: ((p / n).unlink(), (p / n).mkdir()),
                    lambda p, n=name: ((p / n).unlink(), os.mkfifo(p / n)),
                    lambda p, n=name: ((p / n).unlink(), (p / n).symlink_to(backup / n)),
                    lambda p, n=name: ((p / n).unlink(), (p / n).symlink_to("/dev/zero")),
                    lambda p, n=name: ((p / n).unlink(), os.link(other / n, p / n))]
        damages += [lambda p, n=name, m=m: shutil.copy(backup / m, p / n) for m in names if m != name]
    damages.append(lambda p: (shutil.rmtree(p), shutil.copytree(other, p)))
    damages.append(lambda p: (shutil.rmtree(p), p.mkdir()))
    harmless = 0
    for damage in damages:
        damage(path)
        if contents(path) == contents(backup):
            harmless += 1  # model.json is the same in both steps
            assert verify_checkpoint(path) == []
        else:
            assert_refused(root, path)
        shutil.rmtree(path)
        shutil.copytree(backup, path)
    assert len(damages) > 40 and harmless == 2 and verify_checkpoint(path) == []


def test_the_damaged_tensor_is_named(two: tuple[Path, Path]) -> None:
    _, path = two
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    problem = "; ".join(verify_checkpoint(path))
    assert "model.safetensors" in problem and "tensor 'w' (1 in all)" in problem and "loop" not in problem
    data[-1] ^= 1
    data[9] ^= 1
    file.write_bytes(data)
    assert "header" in "; ".join(verify_checkpoint(path))


def test_several_bad_ones_are_passed_over_one_by_one_and_all_are_told(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in range(5)]
    for path in paths[2:]:
        (path / "loop.json").write_bytes(b"{}")
    lines: list[str] = []
    assert latest_checkpoint(tmp_path, log=lines.append) == paths[1]
    assert [str(path) in line for path, line in zip(reversed(paths[2:]), lines, strict=True)] == [True] * 3
    for path in paths[:2]:
        (path / "manifest.json").write_bytes(b"")
    lines.clear()
    assert latest_checkpoint(tmp_path, log=lines.append) is None
    assert "NO CHECKPOINT" in lines[-1] and len(lines) == 6
    with pytest.warns(RuntimeWarning, match="nothing is pruned"):
        assert prune_checkpoints(tmp_path, keep_last=1, keep_best=0) == []
    assert list_checkpoints(tmp_path) == paths


# ------------------------------------------------------------------------------------------------------------- hostile

BOMB = b"cos\nsystem\n(S'touch pwned'\ntR."


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A forger can compute hashes: the manifest is changed and sealed again."""
    body = json.loads((path / "manifest.json").read_bytes())["manifest"]
    change(body)
    text = json.dumps(body, separators=(",", ":")).encode()
    seal_text(path, text)


def seal_text(path: Path, text: bytes) -> None:
    digest = hashlib.sha256(text).hexdigest().encode()
    (path / "manifest.json").write_bytes(b'{"sha256":"%s","manifest":%s}\n' % (digest, text))


def forge(path: Path, name: str, data: bytes) -> None:
    """Another file content with the size and hash to match."""
    (path / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(path, lambda body: body["trees"][name.split(".")[0]]["files"].__setitem__(name, entry))


def tensors_file(header: object, data: bytes = b"\0" * 164, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


W = {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}
B = {"dtype": "F32", "shape": [], "data_offsets": [160, 164]}


def header(**changes: Any) -> dict[str, Any]:
    return {"w": {**W, **changes}, "b": B}


HOSTILE_HEADERS: dict[str, bytes] = {
    "pickle": BOMB,
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "length beyond the file": tensors_file(header(), length=10**6),
    "length of 2^64-1": tensors_file(header(), length=2**64 - 1),
    "header over the limit": tensors_file(b" " * (tensorfile.MAX_HEADER_BYTES + 1)),
    "not json": tensors_file(b"{{{"),
    "a list": tensors_file([]),
    "not utf-8": tensors_file(b'{"\xff":1}'),
    "deep": tensors_file(b"[" * 100_000),
    "deep in metadata": tensors_file(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001),
    "a name twice": tensors_file(json.dumps(header()).encode()[:-1] + b',"w":' + json.dumps(W).encode() + b"}"),
    "a million tensors": tensors_file(("{" + ",".join(
        f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(120_000)) + "}").encode(), b""),
    "overlap": tensors_file(header(data_offsets=[4, 164])),
    "gap": tensors_file({"w": W, "b": {**B, "data_offsets": [164, 168]}}, b"\0" * 168),
    "beyond the end": tensors_file({"w": W, "b": {**B, "data_offsets": [161, 165]}}),
    "bytes left over": tensors_file(header(), b"\0" * 200),
    "offsets backwards": tensors_file(header(data_offsets=[160, 0])),
    "negative offset": tensors_file(header(data_offsets=[-4, 156])),
    "offset 2^63": tensors_file(header(data_offsets=[2**63, 2**63 + 160])),
    "offset of a thousand digits": tensors_file(json.dumps(header()).encode().replace(b"160]},", b"1" * 1000 + b"]},")),
    "float offsets": tensors_file(header(data_offsets=[0.0, 160.0])),
    "true as a size": tensors_file(header(shape=[True, 40])),
    "infinite size": tensors_file(json.dumps(header()).encode().replace(b"[40]", b"[1e999]")),
    "NaN size": tensors_file(json.dumps(header()).encode().replace(b"[40]", b"[NaN]")),
    "negative size": tensors_file(header(shape=[-40, -1])),
    "sizes that overflow to the right product": tensors_file(header(shape=[2**33, 2**33, 2**33])),
    "zero beside overflow": tensors_file({"w": {**W, "shape": [0, 2**53, 2**53], "data_offsets": [0, 0]}, "b": {
        **B, "data_offsets": [0, 4]}}, b"\0" * 4),
    "a hundred dimensions": tensors_file(header(shape=[1] * 100 + [40])),
    "shape is text": tensors_file(header(shape="40")),
    "unknown dtype": tensors_file(header(dtype="F128")),
    "dtype is a list": tensors_file(header(dtype=["F32"])),
    "extra key": tensors_file(header(loader="os.system")),
    "missing key": tensors_file({"w": {"dtype": "F32", "shape": [40]}, "b": B}),
    "entry is text": tensors_file({"w": "F32", "b": B}),
    "path as a name": tensors_file({"../../w": W, "b": B}),
    "nul in a name": tensors_file({"w\0": W, "b": B}),
    "surrogate in a name": tensors_file({"\ud800": W, "b": B}),
    "other dtype than the manifest's": tensors_file(header(dtype="I32")),
    "other shape than the manifest's": tensors_file(header(shape=[4, 10])),
    "other tensor than the manifest's": tensors_file({"v": W, "b": B}),
    "one tensor less": tensors_file({"w": W}, b"\0" * 160),
}
HOSTILE_TREES: dict[str, bytes] = {
    "pickle": BOMB,
    "empty": b"",
    "deep": b"[" * 200 + b"]" * 200,
    "very deep": b"[" * 100_000 + b"]" * 100_000,
    "deep dicts": b'{"a":' * 100 + b"1" + b"}" * 100,
    "key twice": b'{"mark":1,"mark":2}',
    "NaN": b"[NaN]",
    "infinity": b"[-Infinity]",
    "1e999": b"[1e999]",
    "huge integer": b"[" + b"9" * 3000 + b"]",
    "huge float": b"[0." + b"9" * 5000 + b"]",
    "two values": b"1 2",
    "utf-16": "[1]".encode("utf-16"),
    "unknown tag": b'{"$object":"os.system"}',
    "python object tag": b'{"$py":["os","system"]}',
    "tag beside keys": b'{"$tuple":[],"a":1}',
    "two tags": b'{"$tuple":[],"$dict":[]}',
    "tuple of no list": b'{"$tuple":"ab"}',
    "unhashable key": b'{"$dict":[[[1],2]]}',
    "tuple key": b'{"$dict":[[{"$tuple":[1]},2]]}',
    "pair of three": b'{"$dict":[[1,2,3]]}',
    "equal keys": b'{"$dict":[[1,2],[true,3]]}',
    "float bits of the wrong length": b'{"$float":"7ff8"}',
    "missing tensor": b'{"$tensor":"w"}',
    "tensor by number": b'{"$tensor":5}',
    "tensor by path": b'{"$tensor":"../model/w"}',
}


def manifest_edit(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda path: reseal(path, change)


def rename_tree(name: str) -> Damage:
    return manifest_edit(lambda body: body["trees"].__setitem__(name, body["trees"].pop("loop")))


def loop_files(files: Any) -> Damage:
    return manifest_edit(lambda body: body["trees"]["loop"].__setitem__("files", files))


HOSTILE_MANIFESTS: dict[str, Damage] = {
    "pickle": lambda path: (path / "manifest.json").write_bytes(BOMB),
    "sealed pickle": lambda path: seal_text(path, BOMB),
    "sealed list": lambda path: seal_text(path, b"[]"),
    "sealed deep": lambda path: seal_text(path, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "sealed duplicate": lambda path: seal_text(path, b'{"step":2,"step":2}'),
    "sealed empty": lambda path: seal_text(path, b"{}"),
    "second line": lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes() + b"x\n"),
    "upper-case hash": lambda path: (path / "manifest.json").write_bytes(
        (data := (path / "manifest.json").read_bytes())[:11] + data[11:75].upper() + data[75:]),
    "newer version": manifest_edit(lambda body: body.__setitem__("version", 4)),
    "older version": manifest_edit(lambda body: body.__setitem__("version", 1)),
    "a tree that would list its own tensors": manifest_edit(lambda body: body["trees"]["model"].pop("tensors")),
    "version is true": manifest_edit(lambda body: body.__setitem__("version", "1")),
    "other format": manifest_edit(lambda body: body.__setitem__("format", "pickle")),
    "extra key": manifest_edit(lambda body: body.__setitem__("loader", "os.system")),
    "missing key": manifest_edit(lambda body: body.pop("libraries")),
    "step 2^63": manifest_edit(lambda body: body.__setitem__("step", 2**63)),
    "step -1": manifest_edit(lambda body: body.__setitem__("step", -1)),
    "step of another": manifest_edit(lambda body: body.__setitem__("step", 1)),
    "step is true": manifest_edit(lambda body: body.__setitem__("step", True)),
    "parent is text": manifest_edit(lambda body: body.__setitem__("parent_step", "1")),
    "libraries is a list": manifest_edit(lambda body: body.__setitem__("libraries", [1])),
    "metadata is a list": manifest_edit(lambda body: body.__setitem__("metadata", [])),
    "tensor in metadata": manifest_edit(lambda body: body["metadata"].__setitem__("x", {"$tensor": "w"})),
    "trees is a list": manifest_edit(lambda body: body.__setitem__("trees", [])),
    "tree with a path": rename_tree("../step-00000001/loop"),
    "absolute tree": rename_tree("/etc/passwd"),
    "tree with a nul": rename_tree("loop\0"),
    "tree called manifest": rename_tree("manifest"),
    "empty tree name": rename_tree(""),
    "file with a path": loop_files({"../step-00000001/loop.json": {"size": 1, "sha256": "0" * 64}}),
    "other file": loop_files({"model.json": {"size": 1, "sha256": "0" * 64}}),
    "no files": loop_files({}),
    "files is a list": loop_files([]),
    "negative size": loop_files({"loop.json": {"size": -1, "sha256": "0" * 64}}),
    "size 2^64": loop_files({"loop.json": {"size": 2**64, "sha256": "0" * 64}}),
    "hash is a number": loop_files({"loop.json": {"size": 1, "sha256": 0}}),
    "short hash": loop_files({"loop.json": {"size": 1, "sha256": "0"}}),
    "tensors without a file": manifest_edit(lambda body: body["trees"]["loop"].__setitem__(
        "tensors", {"w": ["F32", [1], "0" * 16]})),
    "a file without tensors": manifest_edit(lambda body: body["trees"]["model"].__setitem__("tensors", {})),
    "tensor entry is a table": manifest_edit(lambda body: body["trees"]["model"]["tensors"].__setitem__("w", {})),
    "tensor with a path": manifest_edit(lambda body: body["trees"]["model"]["tensors"].__setitem__(
        "../w", body["trees"]["model"]["tensors"].pop("w"))),
    "tensor of text sizes": manifest_edit(lambda body: body["trees"]["model"]["tensors"].__setitem__(
        "w", ["F32", ["40"], "0" * 16])),
}
NO_JSON: dict[str, bytes] = {
    "a zip archive": b"PK\x03\x04" + bytes(60), "gzip": b"\x1f\x8b\x08" + bytes(60),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"a":1}',
    "a nul first": b'\0{"a":1}', "NaN": b'{"a":NaN}',
    "-Infinity": b"[-Infinity]",
    "1e999": b'{"a":1e999}', "a million digits": b"[" + b"9" * 10**6 + b"]", "something behind": b"{}{}",
    "cut short": b'{"a":', "single quotes": b"{'a':1}", "100,000 deep": b"[" * 10**5 + b"]" * 10**5,
    "a torch file": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.",
}


def put(path: Path, name: str, data: bytes) -> None:
    """The content in that file, with hash and size to match wherever a manifest says so."""
    if name == "manifest.json":
        (path / name).write_bytes(data)
    else:
        forge(path, name, data)


HOSTILE: dict[str, Damage] = {
    **{f"{name}: {kind}": lambda path, name=name, data=data: put(path, name, data)
       for name in ("manifest.json", "model.json", "loop.json", "model.safetensors") for kind, data in NO_JSON.items()},
    **{f"header: {name}": lambda path, data=data: forge(path, "model.safetensors", data)
       for name, data in HOSTILE_HEADERS.items()},
    **{f"tree: {name}": lambda path, data=data: forge(path, "loop.json", data) for name, data in HOSTILE_TREES.items()},
    "tree: a tensor that nothing refers to": lambda path: forge(path, "model.json", b'{"w":{"$tensor":"w"}}'),
    **{f"manifest: {name}": damage for name, damage in HOSTILE_MANIFESTS.items()},
}

opened: list[str] = []
watching = [False]


def watch(event: str, args: tuple[Any, ...]) -> None:
    if watching[0] and (event in ("os.system", "subprocess.Popen", "exec", "import", "socket.connect", "os.exec")
                        or event == "open"):
        opened.append(f"{event} {args[0] if event != 'exec' else ''}")


@pytest.fixture(scope="module")
def audit() -> None:
    sys.addaudithook(watch)  # stays for the process, asleep


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_checkpoint_is_refused_without_running_or_reading_anything_else(
        two: tuple[Path, Path], case: str, audit: None) -> None:
    root, path = two
    HOSTILE[case](path)
    opened.clear()
    watching[0] = True
    try:
        problems = verify_checkpoint(path)
    finally:
        watching[0] = False
    files = {f"open {name}" for name in ("manifest.json", "model.json", "model.safetensors", "loop.json")}
    assert set(opened) <= {*files, f"open {path}"}, opened
    assert problems and all(problem.isascii() and len(problem) < 2000 for problem in problems)
    assert_refused(root, path)
    assert not (Path.cwd() / "pwned").exists()


@pytest.mark.parametrize("case", [case for case in HOSTILE_HEADERS if case[:5] not in ("other", "one t")])
def test_a_hostile_header_is_refused_by_itself_whatever_the_manifest_says(case: str) -> None:
    data = HOSTILE_HEADERS[case]
    with pytest.raises(ValueError, match="file"):
        tensorfile.parse_header(data, len(data), "file")


def test_the_forgers_tools_forge(two: tuple[Path, Path]) -> None:
    """Without a change the forged files load: the cases above fail for what they change."""
    _, path = two
    assert len(HOSTILE) >= 150
    reseal(path, lambda body: None)
    forge(path, "model.safetensors", tensors_file(header()))
    forge(path, "loop.json", b'{"mark":2.0}')
    assert verify_checkpoint(path) == []
    assert load_checkpoint(path)["model"]["w"].eq(0).all()


def test_a_bool_tensor_with_other_bytes_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": {"m": torch.tensor([True, False])}}, metadata={})
    data = (path / "model.safetensors").read_bytes()
    forge(path, "model.safetensors", data[:-1] + b"\2")
    assert "neither 0 nor 1" in verify_checkpoint(path)[0]


def test_a_misaligned_tensor_of_another_writer_loads(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": {"b": torch.tensor(3, dtype=torch.uint8), "w": torch.ones(2)}},
                           metadata={})
    data = b"\3" + torch.tensor([5.0, 6.0]).numpy().tobytes()
    forge(path, "model.safetensors", tensors_file({
        "b": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}, data))
    loaded = load_checkpoint(path)["model"]
    assert loaded["w"].tolist() == [5.0, 6.0] and loaded["w"].data_ptr() % 4 == 0 and loaded["b"].item() == 3


def test_oversized_text_is_refused_before_it_is_parsed() -> None:
    tracemalloc.start()
    try:
        for text in (b"[" + b"[]," * 3_000_000 + b"[]]", b" " * (64 * 2**20 + 1)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(ValueError, match="JSON"):
                parse_json(text, "text")
            assert tracemalloc.get_traced_memory()[1] - before < 2**20
    finally:
        tracemalloc.stop()


def test_any_bytes_as_a_header_or_manifest_give_an_error_or_a_table(two: tuple[Path, Path]) -> None:
    """A small fuzzer: mutations of good texts must never raise anything but ValueError."""
    _, path = two
    chance, refused = random.Random(0), 0
    sealed = json.loads((path / "manifest.json").read_bytes())["manifest"]
    pool: list[Any] = [None, True, -1, 0, 2**63, 1.5, "", "x", "$tensor", [], {}, [1], {"$tuple": [1]}, 10**99]
    for _ in range(600):
        body = copy.deepcopy(sealed)
        place: Any = body
        while True:  # walk down to a random place and put a random value there
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = chance.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.8:
                place = place[key]
                continue
            place[key] = chance.choice(pool)
            break
        seal_text(path, json.dumps(body).encode())
        refused += bool(verify_checkpoint(path))
    assert refused > 400
    good = tensors_file(header())
    for _ in range(1500):
        bad = bytearray(good)
        for _ in range(chance.randrange(1, 5)):
            bad[chance.randrange(len(bad) - 164)] = chance.randrange(256)
        try:
            tensorfile.parse_header(bytes(bad), len(bad), "fuzz")
        except ValueError:
            refused += 1
    assert refused > 1400


def test_leftovers_of_this_process_are_collected_too(tmp_path: Path) -> None:
    """A disk that failed while cleaning up leaves a private directory whose owner still runs."""
    save(tmp_path, 1)

    def action(count: int, name: str, real: Callable[..., Any], args: Any, options: Any) -> Any:
        if name in ("write", "unlink", "rmdir"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **options)

    with pytest.raises(OSError, match=str(tmp_path)):
        for _ in patched(counted(action)):
            save(tmp_path, 2)
    assert len(os.listdir(tmp_path)) == 2
    assert len(collect_orphans(tmp_path)) == 1 and os.listdir(tmp_path) == ["step-00000001"]


def test_the_package_has_no_other_way_to_read_a_checkpoint() -> None:
    for module in (checkpointing, tensorfile):
        source = Path(str(module.__file__)).read_text()
        for word in ("import pickle", "torch.load", "torch.save", "eval(", "marshal", "yaml"):
            assert word not in source
