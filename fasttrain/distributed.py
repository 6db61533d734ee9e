"""Team: the processes that train one model together, as one object that is handed to whoever needs it.

`torchrun` starts them and says who is who in the environment; `join` makes the process group. Without torchrun there is
no group: `ALONE` has the same methods, each of which gives back what it was given, so nothing else asks how many there
are. Numbers of the host (flags, counts) travel over gloo, tensors over the device's own backend.

Who is stuck: every process writes a beat and the place it is at into the launcher's store, from a thread. When a
collective call fails or runs into its timeout, the others read these and name the ranks that no longer beat or that
wait elsewhere. Left out: what is sent (replicas.py, sharding.py) and how the work is divided (dealing.py).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class LostRankError(RuntimeError):
    """A collective call failed; the message names the ranks that are dead, stuck or elsewhere."""


class Team:
    """One process of a group.

    Args:
        rank, world_size: this process's number, and how many there are.
        device: where this process computes.
        timeout: seconds after which a call that waits for the others gives up.
        group: the gloo group that carries the host's numbers; None: there is nobody else.
        store: the launcher's key-value store, for beats and for messages between saving threads.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | None = None, timeout: float = 600.0,
                 group: Any = None, store: Any = None) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.device = device if device is not None else torch.device("cpu")
        self.store = store
        self._group = group
        self._number = 0
        self._heart: Heart | None = None
        self.seconds = 0.0
        """The host's time in collective calls, waiting for the others included, in seconds."""
        self.bytes = 0
        """Bytes of the whole tensors that went through sums and gathers; a ring sends 2 (N - 1) / N of a sum's and
        (N - 1) / N of a gather's or a scattered sum's from each rank."""

    @property
    def leads(self) -> bool:
        """Rank 0: it writes files and shows progress."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    def number(self) -> int:
        """0, 1, 2, ...: a name for something that all ranks do, each the same number of times."""
        self._number += 1
        return self._number - 1

    def add(self, values: Sequence[float]) -> list[float]:
        """The sum over all ranks of each number, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest over all ranks of each number: a flag is up if anyone's is."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def tell(self, text: str, source: int = 0) -> str:
        """The text of rank `source`, on every rank."""
        if self.is_alone:
            return text
        data = text.encode()
        size = int(self.agree([len(data) if self.rank == source else 0])[0])
        letters = torch.zeros(size, dtype=torch.uint8)
        if self.rank == source and size:
            letters.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        with self.calling("a message"):
            dist.broadcast(letters, source, group=self._group)
        return bytes(letters.numpy()).decode()

    def share(self, numbers: Tensor, source: int = 0) -> Tensor:
        """The 1-d CPU tensor of rank `source`, on every rank (all pass one of the same type)."""
        if self.is_alone:
            return numbers
        size = int(self.agree([numbers.numel() if self.rank == source else 0])[0])
        shared = numbers.contiguous() if self.rank == source else torch.empty(size, dtype=numbers.dtype)
        with self.calling("a message"):
            dist.broadcast(shared, source, group=self._group)
        return shared

    def sum_tensors(self, tensors: Sequence[Tensor], place: str = "summing tensors") -> None:
        """Each tensor becomes its sum over all ranks, in place; they are on the way at the same time."""
        if self.is_alone or not tensors:
            return
        for work in [self.start_sum(tensor, place) for tensor in tensors]:
            self.finish(work, place)

    def start_sum(self, tensor: Tensor, place: str) -> Any:
        """Begins to sum a tensor over all ranks, in place: it holds the sum after `finish` of what this returns."""
        with self.calling(place):
            self.bytes += tensor.nbytes
            return dist.all_reduce(tensor, async_op=True)

    def finish(self, work: Any, place: str) -> None:
        """Waits for what `start_sum` began (on a GPU: makes the device wait)."""
        with self.calling(place):
            work.wait()

    def sum_within(self, tensor: Tensor, group: Any) -> None:
        """The same for one tensor and the ranks of a device mesh's group."""
        with self.calling("summing a norm"):
            dist.all_reduce(tensor, group=group)

    def copy_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes rank 0's, in place."""
        if self.is_alone:
            return
        dense = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
        with self.calling("sharing weights"):
            for work in [dist.broadcast(tensor, 0, async_op=True) for tensor in dense]:
                work.wait()
        for tensor, copy in zip(tensors, dense):
            if copy is not tensor:
                tensor.copy_(copy)

    def barrier(self, place: str) -> None:
        """Returns once every rank is here."""
        if not self.is_alone:
            with self.calling(place):
                dist.barrier(group=self._group)

    def close(self) -> None:
        """Leaves the group; the object is of no use afterwards, and `join` makes another."""
        if self._heart is not None:
            self._heart.stop()
        if not self.is_alone and dist.is_initialized():
            _JOINED.clear()
            dist.destroy_process_group()

    @contextlib.contextmanager
    def calling(self, place: str) -> Iterator[None]:
        """Around a collective call: `guarding`, and its time is counted."""
        start = time.perf_counter()
        with self.guarding(place):
            yield
        self.seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def guarding(self, place: str) -> Iterator[None]:
        """Turns the failure of a collective call inside into LostRankError, which says who did not come to `place`."""
        if self._heart is None:
            yield
            return
        before, self._heart.place = self._heart.place, place
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, LostRankError) or not is_of_communication(error):
                raise
            raise LostRankError(self._heart.diagnosis(place, error)) from error
        finally:
            self._heart.place = before

    def start_beating(self) -> None:
        """Starts the thread that tells the others that this process lives; returns once all do."""
        assert self.store is not None
        self._heart = Heart(self.store, self.rank, self.world_size, self.timeout)
        self.barrier("starting")

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.is_alone:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        with self.calling("agreeing"):
            dist.all_reduce(numbers, operation, group=self._group)
        return list(numbers.tolist())


ALONE = Team()
"""The team of a process that was started by itself."""


class Heart:
    """Tells the others, from a thread, that this process lives and where it is."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float) -> None:
        self.place = "computing"
        self._store, self._rank, self._world_size = store, rank, world_size
        self._pause = min(5.0, max(timeout / 20.0, 0.05))
        self._beats = 0
        self._stopped = threading.Event()
        self._own = f"{os.uname().nodename if hasattr(os, 'uname') else 'this host'}, process {os.getpid()}"
        self._beat()
        threading.Thread(target=self._run, name="fasttrain-heart", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def diagnosis(self, place: str, error: BaseException) -> str:
        """In words, who did not come to `place`: reads every rank's beat twice, some beats apart."""
        problem = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        start = f"rank {self._rank} gave up in {place!r}"
        try:
            first = self._read()
            time.sleep(3 * self._pause)
            second = self._read()
        except RuntimeError as lost:
            return f"{start}, and the launcher's store does not answer (its host is gone: {lost}). {problem}"
        named = []
        for rank, (one, two) in enumerate(zip(first, second)):
            beats, where, who = two
            if rank == self._rank:
                continue
            if beats == one[0]:
                named.append(f"rank {rank} ({who}) is dead or stopped; it was last heard of in {where!r}")
            elif where != place:
                named.append(f"rank {rank} ({who}) lives, and is in {where!r}")
        what = "; ".join(named[:8]) or "every rank lives and is there: the network, or a rank that left in between"
        more = f" (and {len(named) - 8} more)" if len(named) > 8 else ""
        return f"{start}: {what}{more}. The newest complete checkpoint is intact; start again to continue. {problem}"

    def _run(self) -> None:
        while not self._stopped.wait(self._pause):
            try:
                self._beat()
            except RuntimeError:  # the store is gone: the main thread will notice by itself
                return

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", f"{self._beats}\n{self.place}\n{self._own}")

    def _read(self) -> list[tuple[int, str, str]]:
        texts = [self._store.get(f"beat/{rank}").decode().split("\n") for rank in range(self._world_size)]
        return [(int(beats), place, who) for beats, place, who in texts]


def is_of_communication(error: BaseException) -> bool:
    """Whether an error came from a process group: lost connections and timeouts."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in text for words in _OF_COMMUNICATION)


_OF_COMMUNICATION = ("gloo", "nccl", "process group", "pair closure", "timed out waiting", "closed by peer",
                     "reset by peer")
"""The last four: what gloo says when it leaves its name out."""


def launched_world_size() -> int:
    """How many processes torchrun (or another launcher with its environment) has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def join() -> Team:
    """The team that this process was started in: `ALONE` without torchrun (or with one process), else the group that
    the environment describes, made now unless the script has made it.

    The environment variable FASTTRAIN_RANK_TIMEOUT says after how many seconds a rank that does not answer is given up
    (600): longer than the longest time that one rank may keep the others waiting.

    Raises:
        ValueError: the environment names a rank without saying how to reach the others.
    """
    if not dist.is_available() or (launched_world_size() == 1 and not dist.is_initialized()):
        return ALONE
    timeout = float(os.environ.get("FASTTRAIN_RANK_TIMEOUT", "600"))
    limit = timedelta(seconds=timeout)
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda else torch.device("cpu")
    if not dist.is_initialized():
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not; start the script with "
                             "torchrun, or unset RANK to train with one process")
        if on_cuda:
            torch.cuda.set_device(device)
        # torchrun keeps one store over its restarts: without a prefix, a rank finds its neighbour's old address.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"attempt/{attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=world_size,
                                timeout=limit)
        atexit.register(_leave)
    if dist.get_world_size() == 1:
        return ALONE
    if _JOINED:
        return _JOINED[0]
    group = dist.new_group(backend="gloo", timeout=limit)
    store = dist.PrefixStore(  # type: ignore[attr-defined]
        "fasttrain", dist.distributed_c10d._get_default_store())
    team = Team(dist.get_rank(), dist.get_world_size(), device, timeout, group, store)
    team.start_beating()
    _JOINED.append(team)
    return team


_JOINED: list[Team] = []  # the process group is one of the whole process, and so is its Team


def _leave() -> None:
    if dist.is_initialized():
        with contextlib.suppress(Exception):  # the others may be gone already
            dist.destroy_process_group()
