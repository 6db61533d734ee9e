"""CheckpointSaver: saves behind the training. The step waits for a copy of the tensors in memory and for nothing else.

Hashing, writing, fsync, reading back and retention run behind; training may change the weights at once. What goes wrong
there is told at the next step, never swallowed, and `collect(wait=True)` waits for the last one. An OSError (a full
disk, a quota) does not end a run: it is counted, told with the bytes needed and free, and the next interval tries
again.
Deliberately left out: a copy where memory is short: then the step waits for the file, and the log says so.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpointing import Snapshot, snapshot_trees, verify_checkpoint, write_snapshot
from .config import TrainConfig
from .distributed import ALONE, Team
from .manifest import TreeEntry, is_rank_tree
from .retention import prune_checkpoints
from .shard_files import SharedSave
from .state import TrainState
from .storage import CheckpointSpaceError, free_bytes
from .treefiles import describe, verify_tree
from .trees import ReadBudget
from .utils import available_memory_bytes, format_bytes


@dataclass
class Outcome:
    """What became of one save: its path once it is durable and was read back whole, or the error."""

    step: int
    path: Path | None = None
    error: BaseException | None = None


class CheckpointSaver:
    """One save at a time; a second one waits for the first. Use from one thread.

    Args:
        root: the checkpoint directory.
        config: keep_last, keep_best, keep_every_steps, max_save_failures.
        log: prints a line.
        behind: False: every save is waited for.
        team: the ranks that write each checkpoint together; all of them save, at the same steps.
    """

    observer = False

    def __init__(self, root: Path, config: TrainConfig, *, log: Callable[[str], None] = print,
                 behind: bool = True, team: Team = ALONE) -> None:
        self.root, self.config, self.behind = root, config, behind
        self.newest: Path | None = None
        """The newest checkpoint that this saver made durable."""
        self.failures = 0
        """Saves that failed in a row."""
        self.on_saved: Callable[[Path], None] = lambda path: None
        """Called with the path of each finished checkpoint, by whoever collects it."""
        self._log, self._team = log, team
        self._shared: SharedSave | None = None
        self._arena = Arena()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._told_memory = False

    def save(self, step: int, trees: Mapping[str, Any], metadata: Mapping[str, Any], *, wait: bool = False) -> None:
        """Takes a snapshot of `trees` and writes it behind the caller; with `wait`, writes it from where it is.

        Errors of earlier saves, and data that cannot be saved (TypeError, ValueError), are raised here.
        """
        self.collect(wait=True)
        plain = snapshot_trees(trees)
        if not wait and self._has_memory(plain):
            plain = self._arena.copy(plain)
        else:
            wait = True
        outcome = self._outcome = Outcome(step)
        self._shared = None if self._team.is_alone else SharedSave(self._team)
        self._thread = threading.Thread(target=self._work, args=(outcome, plain, dict(metadata)),
                                        name="fasttrain-save", daemon=True)  # a second signal must not wait for it
        self._thread.start()
        if wait:
            self.collect(wait=True)

    def collect(self, *, wait: bool = False) -> bool:
        """Reports the running save if it has ended (or once it has, with `wait`). False if none ended.

        What the disk does is logged and counted; any other error is raised.
        """
        if self._thread is None or (self._thread.is_alive() and not wait):
            return False
        self._thread.join()
        self._thread, outcome = None, self._outcome
        assert outcome is not None
        if outcome.error is None and outcome.path is not None:
            self.newest, self.failures = outcome.path, 0
            self.on_saved(outcome.path)
            return True
        if not isinstance(outcome.error, OSError):
            assert outcome.error is not None
            raise outcome.error
        self.failures += 1
        self._log(f"WARNING: step {outcome.step} could not be saved ({self.failures} in a row), training goes on and "
                  f"tries again at the next interval: {describe(outcome.error)}")
        return True

    def on_step(self, state: TrainState) -> None:
        """The loop's hook: tells of a save that has ended, and stops the run after too many failures."""
        if self._thread is not None:
            self.collect()
        limit = self.config.max_save_failures
        if limit and self.failures >= limit:
            state.request_stop(f"{self.failures} checkpoints in a row could not be saved (max_save_failures={limit})")

    def finish_quietly(self) -> None:
        """Waits for the last save while another error is on its way; what goes wrong is told."""
        if self._shared is not None:
            self._shared.give_up()
        try:
            self.collect(wait=True)
        except Exception as error:
            self._log(f"WARNING: the last checkpoint could not be saved: {error}")

    def _work(self, outcome: Outcome, snapshot: Snapshot, metadata: dict[str, Any]) -> None:
        try:
            metadata["finite"] = _finite(snapshot)
            outcome.path = self._write(outcome.step, snapshot, metadata)
            if self._team.leads:
                self._prune(outcome.path)
        except OSError as error:
            outcome.error = self._explained(error, snapshot.num_bytes)
        except BaseException as error:  # not swallowed: raised at the next step
            outcome.error = error

    def _write(self, step: int, snapshot: Snapshot, metadata: dict[str, Any]) -> Path:
        shared = self._shared
        if shared is not None and not self._team.leads:
            return shared.write_part(self.root, snapshot.trees, metadata["finite"], _read_back)
        name, problem = "", "it failed"
        try:
            path = write_snapshot(self.root, step, snapshot, metadata=metadata, shared=shared)
            problems = verify_checkpoint(path, from_disk=True, names=snapshot.trees)
            if problems:
                raise OSError(f"{str(path)!r} reads back otherwise than it was written: {'; '.join(problems)}")
            name, problem = path.name, ""
            return path
        except OSError as error:
            problem = describe(error)
            raise
        finally:
            if shared is not None:
                shared.conclude(name, problem)

    def _prune(self, newest: Path) -> None:
        config = self.config
        try:
            prune_checkpoints(self.root, keep_last=config.keep_last, keep_best=config.keep_best,
                              keep_every_steps=config.keep_every_steps, verified=newest)
        except OSError as error:  # the new one is safe; what should have gone stays until the next save
            self._log(f"WARNING: old checkpoints could not be removed: {error}")

    def _explained(self, error: OSError, needed: int) -> OSError:
        if isinstance(error, CheckpointSpaceError):
            return error
        try:
            free = format_bytes(free_bytes(self.root))
        except OSError:
            free = "unknown"
        what, where = error.strerror or error, str(error.filename or self.root)
        return OSError(error.errno or errno.EIO, f"{what} ({where!r}; about {format_bytes(needed)} needed, {free} "
                                                 "free). Earlier checkpoints are intact")

    def _has_memory(self, snapshot: Snapshot) -> bool:
        if not self.behind:
            return False
        missing, free = snapshot.num_bytes - self._arena.size, available_memory_bytes()
        if missing <= 0 or free is None or missing * 1.25 < free:
            return True
        if not self._told_memory:
            self._told_memory = True
            self._log(f"saving without a copy, so the step waits for the file: the copy needs {format_bytes(missing)} "
                      f"and {format_bytes(free)} of memory are free")
        return False


class Arena:
    """One block of memory that holds a snapshot and is used again for the next: pages are touched once a run."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    @property
    def size(self) -> int:
        return 0 if self._memory is None else len(self._memory)

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with its tensors copied in here. The one before is overwritten."""
        tensors = [tensor for _, table in snapshot.trees.values() for tensor in table.values()]
        needed = sum(_padded(tensor.nbytes) for tensor in tensors)
        if needed > self.size:
            self._memory = None  # given back first
            self._memory = mmap.mmap(-1, needed)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._memory.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults in the first stall
        start, trees = 0, {}
        for name, (text, table) in snapshot.trees.items():
            copies = {}
            for key, tensor in table.items():
                copies[key] = self._place(tensor, start)
                start += _padded(tensor.nbytes)
            trees[name] = (text, copies)
        return replace(snapshot, trees=trees)

    def _place(self, tensor: Tensor, start: int) -> Tensor:
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        assert self._memory is not None
        raw = torch.frombuffer(self._memory, dtype=torch.uint8, offset=start, count=tensor.nbytes)
        return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _padded(size: int) -> int:
    return -(-size // 64) * 64


def _read_back(directory: int, name: str, entry: TreeEntry) -> None:
    size = 0 if entry.tensor_file is None else entry.tensor_file.size
    verify_tree(directory, name, entry, ReadBudget.of_size(size), from_disk=True)


def _finite(snapshot: Snapshot) -> bool:
    """Whether every weight is finite (the sum of a tensor is not if one of its elements is not)."""
    _, weights = snapshot.trees.get("model", (b"", {}))
    parts = (tensor for name, (_, tensors) in snapshot.trees.items() if is_rank_tree(name)
             for key, tensor in tensors.items() if key.startswith("parts/model/"))
    for tensor in (*weights.values(), *parts):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))) \
                and not bool(torch.isfinite(tensor.float()).all()):  # or the sum itself ran over
            return False
    return True
