"""The parts of the campaign that need the shim: every call of a save is killed, failed or cut short, in forked children
of one process that has imported torch once. Run by campaign.py under LD_PRELOAD; prints one JSON line."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttrain import checkpointing
from fasttrain.checkpointing import latest_checkpoint, load_checkpoint, read_manifest, save_checkpoint
from fasttrain.config import TrainConfig
from fasttrain.retention import prune_checkpoints
from fasttrain.saver import CheckpointSaver

KILLS = {"before": 1, "after": 2, "half-way through": 3}
ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EINTR")}

shim = ctypes.CDLL(os.environ["FAULTFS"])
shim.fault_count.restype = shim.fault_hits.restype = ctypes.c_long


def trees_of(mark: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((40,), mark), "b": torch.tensor(mark)}, "training": {"mark": mark}}


def save(root: Path, step: int, mark: float | None = None) -> None:
    value = float(step) if mark is None else mark
    save_checkpoint(root, step, trees_of(value), metadata={"val_loss": value})


def save_behind(root: Path, step: int) -> None:
    saver = CheckpointSaver(root, TrainConfig(keep_last=1, keep_best=0), log=lambda line: None)
    saver.save(step, trees_of(float(step)), {"val_loss": 1.0})
    saver.collect(wait=True)
    if saver.failures:
        raise OSError(errno.EIO, "told as it should be")


def mark_of(path: Path | None) -> float | None:
    if path is None:
        return None
    trees = load_checkpoint(path)
    marks = {*trees["model"]["w"].tolist(), trees["model"]["b"].item(), trees["training"]["mark"]}
    assert len(marks) == 1, f"{path} mixes {marks}"
    return float(marks.pop())


Scenario = tuple[Callable[[Path], object], Callable[[Path], object], set[float | None]]
SCENARIOS: dict[str, Scenario] = {
    "first save": (lambda root: None, lambda root: save(root, 1), {None, 1.0}),
    "next save": (lambda root: save(root, 1), lambda root: save(root, 2), {1.0, 2.0}),
    "replacing a step": (lambda root: save(root, 1), lambda root: save(root, 1, 7.0), {1.0, 7.0}),
    "retention": (
        lambda root: [save(root, step) for step in (1, 2, 3)],
        lambda root: prune_checkpoints(root, keep_last=1, keep_best=0),
        {3.0},
    ),
    "save behind, read back, retention": (
        lambda root: [save(root, step) for step in (1, 2)],
        lambda root: save_behind(root, 3),
        {2.0, 3.0},
    ),
}


def child(work: Callable[[], object]) -> int:
    """Exit status of `work` in a forked child: 0 done, 7 OSError, 1 anything else, -9 killed."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)  # a signal to this campaign is not one to the trial
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
        os._exit(0)
    except OSError:
        os._exit(7)
    finally:
        os._exit(1)


def trial(base: Path, scenario: Scenario, k: int, action: int, number: int = 0) -> tuple[bool, str]:
    """(whether call k existed, what is wrong)."""
    prepare, work, allowed = scenario
    root = base / "run"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    prepare(root)
    read, write = os.pipe()

    def armed() -> None:
        shim.fault_arm(str(root).encode(), k, action, number)
        try:
            work(root)
        finally:
            os.write(write, b"%d" % shim.fault_hits())

    status = child(armed)
    os.close(write)
    with os.fdopen(read) as pipe:
        happened = pipe.read() not in ("0", "")
    happened = happened or status == -9
    state = mark_of(latest_checkpoint(root, log=lambda line: None))
    if state not in allowed:
        return happened, f"state {state}"
    if status == 0 and action <= 3 and not happened and state != max(m for m in allowed if m is not None):
        return happened, "finished without saving"
    if status == 1:
        return happened, "an error that is no OSError"
    if action == 6 and status != 0:
        return happened, "a short write was an error"
    save(root, 9)
    left = sorted(os.listdir(root))
    if mark_of(latest_checkpoint(root, log=lambda line: None)) != 9.0 or any(not n.startswith("step-") for n in left):
        return happened, f"the next save: {left}"
    return happened, ""


def every_call(base: Path, action: int, number: int, stride: int) -> tuple[int, list[str]]:
    trials, wrong = 0, []
    for name, scenario in SCENARIOS.items():
        for k in range(1, 1000, stride):
            happened, problem = trial(base, scenario, k, action, number)
            trials += 1
            if problem:
                wrong.append(f"{name}, call {k}, action {action}/{number}: {problem}")
            if not happened:
                break
    return trials, wrong


def random_kills(base: Path, count: int, seed: int) -> tuple[int, list[str]]:
    """SIGKILL at any instant of a process that saves, replaces and prunes for ever."""
    chance, wrong = random.Random(seed), []
    for index in range(count):
        root = base / "random"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setpgid(0, 0)
                for step in range(10_000):
                    save(root, step // 2, float(step))
                    prune_checkpoints(root, keep_last=2, keep_best=0)
                    os.write(write, b"%d\n" % step)
            finally:
                os._exit(1)
        os.close(write)
        first = os.read(read, 4)
        time.sleep(chance.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(read, "rb") as rest:
            finished = int((first + rest.read()).split()[-1])
        mark = mark_of(latest_checkpoint(root, log=lambda line: None))
        if mark not in (finished, finished + 1):
            wrong.append(f"kill {index}: {mark} after {finished}")
    return count, wrong


def full_disk(base: Path) -> str:
    """A real tmpfs of 1.5 MB that a second checkpoint does not fit into; needs root."""
    mount = base / "small"
    mount.mkdir()
    if os.system(f"mount -t tmpfs -o size=1536k tmpfs {mount} 2>/dev/null"):
        return "not run: mounting needs root"
    asks = checkpointing.require_space
    try:
        trees = {"model": {"w": torch.zeros(100_000)}}
        save_checkpoint(mount, 1, trees, metadata={})
        (mount / "other").write_bytes(b"x" * (1_572_864 - 400_000 - 300_000))
        for ask in (asks, lambda *args: None):  # refused before, and refused by the kernel while writing
            checkpointing.require_space = ask  # type: ignore[assignment]
            try:
                save_checkpoint(mount, 2, trees, metadata={})
                return "WRONG: it fitted"
            except OSError as error:
                if not all(word in str(error) for word in ("free", str(mount))):
                    return f"WRONG message: {error}"
            found = latest_checkpoint(mount, log=lambda line: None)
            if found is None or read_manifest(found).step != 1 or len(os.listdir(mount)) != 2:
                return f"WRONG: {os.listdir(mount)}"
        return "ok: refused beforehand, and by the kernel while writing; step 1 whole, nothing left behind"
    finally:
        checkpointing.require_space = asks
        gc.collect()
        os.system(f"umount -l {mount}")  # lazily: tensors may still be mapped from it


def main(stride: int, kills: int, seed: int, only: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        base = Path(folder)
        shim.fault_arm(str(base).encode(), 0, 0, 0)
        save(base / "count", 1)
        result["calls"] = shim.fault_count()
        shim.fault_disarm()
        kinds = {
            **{f"SIGKILL {name} the call": (action, 0) for name, action in KILLS.items()},
            **{f"{name} once": (4, number) for name, number in ERRORS.items()},
            **{f"{name} from then on": (5, number) for name, number in ERRORS.items() if name != "EINTR"},
            "short write once": (6, 0),
        }
        result["kinds"] = {}
        for kind, (action, number) in ((kind, kinds[kind]) for kind in kinds if only in kind):
            trials, wrong = every_call(base, action, number, stride)
            result["kinds"][kind] = {"trials": trials, "wrong": wrong}
        if only in "SIGKILL at a random instant":
            trials, wrong = random_kills(base, kills, seed)
            result["kinds"]["SIGKILL at a random instant"] = {"trials": trials, "wrong": wrong}
            result["full tmpfs"] = full_disk(base)
    return result


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:4]), sys.argv[4])))
